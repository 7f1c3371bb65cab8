"""docs/building.md: its table of compilers holds what the committed CSV file holds."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import results

ROOT = Path(__file__).parents[2]
NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def test_two_compilers():
    found: dict[tuple[str, str], dict[bool, list[float]]] = {}
    for row in results.read(ROOT / "benchmarks" / "results" / "cpu" / "compilers.csv"):
        assert row["same_bits"] == "1"
        ratios = found.setdefault((row["isa"], row["dtype"]), {}).setdefault(row["form"] == "direct", [])
        ratios.append(float(row["y_value_50"]))
    page = (ROOT / "docs" / "building.md").read_text("utf-8")
    assert found
    for (isa, dtype), ratios in found.items():
        cells = [f"{min(ratios[direct]):.2f} to {max(ratios[direct]):.2f}" for direct in (True, False)]
        assert f"| `{isa}`, {NAMES[dtype]} | {' | '.join(cells)} |" in page
