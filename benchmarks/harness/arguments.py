"""Command lines of the benchmarks, and how a user's mistake is reported: in one sentence."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from coalescer_fast.console import sentence

from .results import Text, read

ROOT = Path(__file__).resolve().parents[2]


class Parser(argparse.ArgumentParser):
    """Reports an error in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def command(prog: str, work: Callable[[], int]) -> int:
    """The exit status of a benchmark; an error that its user can fix is reported in one sentence."""
    try:
        return work()
    except (ValueError, OSError, ImportError) as error:
        print(f"{prog}: {sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"{prog}: interrupted {where(error)}", file=sys.stderr)
        return 130


def where(error: BaseException) -> str:
    """Where it was raised: the last line of the package's or the benchmarks' own, and the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
    shown = [f"{frame.name} ({Path(frame.filename).name}:{frame.lineno})" for frame in (*own[-1:], *frames[-1:])]
    return "in " + ", ".join(dict.fromkeys(shown))


def listed(*allowed: str) -> Callable[[str], list[str]]:
    """The type of an argument that is some of these names, separated by commas."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is unknown: use some of {', '.join(allowed)}")
        return names

    return parse


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def positive_list(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def add_timing_options(parser: argparse.ArgumentParser, budget: float, unit: str) -> None:
    """Add --threads, --budget (None if it is not given), --allocator and --csv.

    Args:
        parser: of the benchmark.
        budget: default of --budget in seconds, for the help.
        unit: what takes that long.
    """
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's own choice)")
    parser.add_argument("--budget", type=float, metavar="S", help=f"seconds for {unit} (default: {budget:g})")
    parser.add_argument(
        "--allocator",
        choices=["keep", "system"],
        default="keep",
        help="whether the process keeps freed memory, as torch does on a GPU (default: %(default)s)",
    )
    parser.add_argument("--csv", type=Path, metavar="F.csv", help="add the results to a file")


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add --summary, --plot and --from."""
    parser.add_argument("--summary", type=Path, metavar="F.csv", help="sum up the results in a file, measure nothing")
    parser.add_argument(
        "--plot", type=Path, metavar="F.png", help="draw the results in the file --from, measure nothing"
    )
    parser.add_argument("--from", type=Path, dest="source", metavar="F.csv", help="what --plot draws")


def reported(
    args: argparse.Namespace,
    summary: Callable[[Sequence[Text]], Iterator[str]],
    draw: Callable[[Sequence[Text], Path], None],
) -> bool:
    """Make the reports that the arguments ask for.

    Args:
        args: with those of `add_report_options`.
        summary: lines of text that sum up the rows of a file.
        draw: draws the rows of a file as a picture.

    Returns:
        Whether there was a report to make.
    """
    if args.summary is None and args.plot is None and args.source is None:
        return False
    if (args.plot is None) != (args.source is None):
        raise ValueError("--plot and --from go together: name the picture and the CSV file that it is drawn from")
    if args.summary is not None:
        print("\n".join(summary(read(args.summary))))
    if args.plot is not None:
        draw(read(args.source), args.plot)
    return True
