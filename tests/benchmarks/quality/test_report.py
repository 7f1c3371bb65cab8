"""The tables of the quality benchmark, from made-up rows."""

from __future__ import annotations

import pytest

from benchmarks.harness.results import Text
from benchmarks.quality import benchmark, report


def row(method: str, scale: str, steps: int, evaluations: int, distance: float, **more: str) -> Text:
    figures = {"name_top1": "0.5", "below_q5": "0.25"}
    labels = {"method": method, "guidance_scale": scale, "steps": str(steps), "evaluations": str(evaluations)}
    return {**labels, "fd_name": str(distance), **figures, **more}


ROWS = [
    row("ours", "1", 2, 2, 20.0),
    row("ours", "1.5", 2, 3, 10.0, name_top1="0.75"),
    row("ours", "1.5", 2, 3, 14.0, name_top1="1"),
    row("ours", "1.5", 4, 5, 13.0),
    row("rival", "1", 2, 2, 11.0),
    row("rival", "1.5", 2, 4, 9.0),
]


def test_tables():
    lines = list(report.tables(ROWS))
    assert lines[:6] == [
        "| steps | 2 | 4 |",
        "|---|---|---|",
        "| ours | 20.0 (2) | – |",
        "| ours, guidance 1.5 | 12.0 (3) | 13.0 (5) |",
        "| rival | 11.0 (2) | – |",
        "| rival, guidance 1.5 | 9.0 (4) | – |",
    ]
    start = lines.index("At most 3 evaluations:")
    assert lines[start + 2 : start + 6] == [
        "| method | steps | evaluations | Fréchet distance | right emoji, by name | near-copies |",
        "|---|---|---|---|---|---|",
        "| rival | 2 | 2 | 11.0 | 0.500 | 0.25 |",
        "| ours, guidance 1.5 | 2 | 3 | 10.0, 14.0 | 0.875 | 0.25 |",
    ]


@pytest.mark.parametrize(("budget", "expected"), [(1, []), (2, [11.0, 20.0]), (3, [11.0, 12.0]), (50, [9.0, 12.0])])
def test_the_best_within_a_budget(budget, expected):
    found = report.best(report.settings(ROWS), budget)
    assert [report.mean(some, "fd_name") for _, some in found] == expected


def test_no_row():
    with pytest.raises(ValueError, match="measure first"):
        list(report.tables([]))


def test_on_the_command_line(tmp_path, capsys):
    benchmark.write(tmp_path / "q.csv", ROWS)
    assert benchmark.main(["--summary", str(tmp_path / "q.csv")]) == 0
    assert capsys.readouterr().out.splitlines() == list(report.tables(ROWS))
