"""What the benchmarks share: their rows, the environment that those were measured in, CSV files, and how a user's mistake is said."""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from coalescer_fast import files
from coalescer_fast.cli import check_writable, cpu_name, sentence

try:
    from tqdm.auto import tqdm
except ImportError:  # benchmarks of kernels need torch alone
    tqdm = None

Row = dict[str, float | int | str]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def command(prog: str, work: Callable[[], int]) -> int:
    """The exit status of a benchmark; what its user did wrong is said in one sentence."""
    try:
        return work()
    except (ValueError, OSError, ImportError) as error:
        print(f"{prog}: {sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--summary", type=Path, metavar="F.csv", help="sum up the results in a file, measure nothing")
    parser.add_argument(
        "--plot", type=Path, metavar="F.png", help="draw the results in the file --from, measure nothing"
    )
    parser.add_argument("--from", type=Path, dest="source", metavar="F.csv", help="what --plot draws")


def reported(args: argparse.Namespace, report: Any) -> bool:
    """Whether a report on a file was asked for; it is then made, by the module's ``summary(rows)`` and ``plot(rows, path)``."""
    if args.summary is None and args.plot is None and args.source is None:
        return False
    if (args.plot is None) != (args.source is None):
        raise ValueError("--plot and --from go together: name the picture and the CSV file that it is drawn from")
    if args.summary is not None:
        print("\n".join(report.summary(read(args.summary))))
    if args.plot is not None:
        report.plot(read(args.source), args.plot)
    return True


def open_csv(path: Path, columns: Sequence[str]) -> None:
    """Raise an OSError or ValueError now if rows of these columns cannot be added to the file later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    if path.exists():
        append(path, [], columns)


def environment() -> Row:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions: Row = {"torch": str(torch.__version__), "python": platform.python_version()}
    return {**versions, "cpu": cpu_name(), "threads": torch.get_num_threads(), "gpu": gpu}


def text(row: Row) -> dict[str, str | int]:
    """The row as a CSV file holds it: numbers to six digits."""
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}


def write(path: Path, rows: Sequence[Row]) -> None:
    """A file of these rows; its columns are all that occur."""
    columns = dict.fromkeys(key for row in rows for key in row)
    files.write_csv(path, map(text, rows), list(columns))


def append(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Add rows to a file of these columns, made if there is none. Raises ValueError if the file has other columns."""
    new = not path.exists() or not path.stat().st_size
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            if next(csv.reader(file), []) != list(columns):
                raise ValueError(
                    f"{path} has other columns than this benchmark writes: name another file, or remove it"
                )
    with path.open("a", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(columns), lineterminator="\n")
        if new:
            table.writeheader()
        table.writerows(text(row) for row in rows)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
