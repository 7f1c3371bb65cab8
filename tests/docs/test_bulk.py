"""docs/bulk.md: its figures are those of the committed CSV file."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import results

ROOT = Path(__file__).parents[2]


def test_what_a_picture_takes():
    page = " ".join((ROOT / "docs" / "bulk.md").read_text("utf-8").split())
    [row] = results.read(ROOT / "benchmarks" / "results" / "cpu" / "bulk.csv")
    assert row["wrong_pictures"] == "0"
    milliseconds = float(row["cpu_ms_a_picture"])
    assert f"takes {milliseconds:.1f} ms of one core" in page
    assert f"A million are {milliseconds / 3.6:.1f} hours of a core" in page
    assert f"{int(row['pictures']):,} pictures, one worker" in page
    assert row["rows"] == "1000000"
    assert f"takes {float(row['read_s']):.1f} s and {float(row['read_mb']) / 1e3:.1f} GB" in page
