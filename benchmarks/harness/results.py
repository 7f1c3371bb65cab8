"""Rows of results, and the CSV files that hold them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from coalescer_fast import files
from coalescer_fast.bench import Row as Row

Text = dict[str, str]  # a row as it is read from a file


def text(row: Row) -> dict[str, str | int]:
    """The row as a CSV file holds it: numbers to six digits."""
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a file of these rows; its columns are all that occur."""
    columns = dict.fromkeys(key for row in rows for key in row)
    files.write_csv(path, map(text, rows), list(columns))


def open_csv(path: Path, columns: Sequence[str]) -> None:
    """Raise an OSError or ValueError now if rows of these columns cannot be added to the file later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.check_writable(path)
    if path.exists():
        append(path, [], columns)


def append(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Add rows to a file of these columns, which is made if there is none.

    Raises:
        ValueError: if the file has other columns.
    """
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


def read(path: Path) -> list[Text]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def as_text(rows: Sequence[Row]) -> list[Text]:
    """The rows as a report takes them."""
    return [{key: str(value) for key, value in row.items()} for row in rows]
