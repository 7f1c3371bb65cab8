from __future__ import annotations

import pytest

from benchmarks.harness.tables import Table


def test_lines_are_aligned():
    table = Table({"op": "<8", "% of copy": ">9"}, indent="  ")
    assert [table.head, table.line("step", 61), table.line("norm", "")] == [
        "  op       % of copy",
        "  step            61",
        "  norm",
    ]
    with pytest.raises(ValueError, match="argument 2"):
        table.line("step")
