from __future__ import annotations

import csv

import pytest

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"needs the package {package}")
from benchmarks.export import benchmark as export  # noqa: E402
from benchmarks.harness import timing  # noqa: E402
from export.quantize import quantizer  # noqa: E402

from ...helpers.pipelines import small_pipeline  # noqa: E402


def test_rows_of_both_precisions(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "ROUNDS", (2, 3))
    monkeypatch.setattr(quantizer, "HELD_OUT", 4)
    small_pipeline(anchor="mlp", anchor_hidden_dim=16).save_pretrained(tmp_path / "model")
    path = tmp_path / "export.csv"
    words = [
        "--model",
        str(tmp_path / "model"),
        "--what",
        "unet",
        "--batch",
        "1,3",
        "--prompts",
        "4",
        "--budget",
        "0.001",
        "--allocator",
        "system",
    ]
    assert export.main([*words, "--csv", str(path)]) == 0
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(export.COLUMNS)
    assert [(row["what"], row["precision"], row["batch"]) for row in rows] == [
        ("unet", precision, batch) for batch in "13" for precision in ("fp32", "int8")
    ]
    for row in rows:
        assert float(row["y_value_20"]) <= float(row["y_value_50"]) <= float(row["y_value_80"])
        assert float(row["direction_error"]) >= 0
    assert float(rows[0]["speedup_over_fp32"]) == 1
    assert float(rows[1]["direction_error"]) > float(rows[0]["direction_error"])
    assert rows[1]["method"] == "percentile 99.999"
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert export.main([*words, "--csv", str(tmp_path)]) == 1
