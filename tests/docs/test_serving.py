"""docs/serving.md: its table holds what the committed CSV file holds."""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLUMNS = ("clients", "pictures_per_s", "ms_50", "ms_95", "batch", "server_cpu_ms", "memory_growth_mb")


def test_the_load_test():
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    with (ROOT / "benchmarks" / "results" / "cpu" / "serving.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        cells = [row["requests"], *(f"{float(row[name]):.3g}" for name in COLUMNS)]
        assert f"| {' | '.join(cells)} |" in page
        assert row["answered_429"] == row["other_errors"] == row["wrong_pictures"] == "0"
    for i in range(0, len(rows), 3):
        one, many, again = (float(row["pictures_per_s"]) for row in rows[i : i + 3])
        assert f"{2 * many / (one + again):.1f} times" in page
    pictures = sum(int(row["pictures"]) for row in rows)
    assert f"{pictures:,} pictures" in page
