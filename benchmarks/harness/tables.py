"""Aligned text tables."""

from __future__ import annotations

from collections.abc import Mapping


class Table:
    """A table whose lines are printed one by one, as results come in.

    Args:
        columns: head of each column -> alignment and width, as in a format string: "<15", ">8".
        indent: what each line begins with.
    """

    def __init__(self, columns: Mapping[str, str], indent: str = ""):
        self.columns, self.indent = dict(columns), indent

    @property
    def head(self) -> str:
        return self.line(*self.columns)

    def line(self, *cells: object) -> str:
        aligned = (f"{cell!s:{layout}}" for cell, layout in zip(cells, self.columns.values(), strict=True))
        return self.indent + " ".join(aligned).rstrip()
