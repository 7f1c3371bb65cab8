from __future__ import annotations

import csv
import inspect
import shutil

import pytest

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"needs the package {package}")
from benchmarks.export import benchmark as export  # noqa: E402
from coalescer_fast.bench import timing  # noqa: E402
from coalescer_fast.runtime.engines import artefact  # noqa: E402
from export.onnx import exporter  # noqa: E402
from export.quantize import quantizer  # noqa: E402

from ...helpers.artefacts import small_artefacts, small_model_folder  # noqa: E402

WORDS = ["--what", "unet", "--batch", "1,3", "--prompts", "4"]
WORDS += ["--budget", "0.001", "--allocator", "system"]


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """The small model has been exported before."""
    signature = inspect.signature(exporter.export_onnx)

    def export_onnx(*args, **options):
        given = signature.bind(*args, **options).arguments
        assert (given["kind"], given["batch"]) == ("unet", (1, 3, 3))
        shutil.copytree(small_artefacts() / "unet", given["folder"], dirs_exist_ok=True)
        return artefact.read(given["folder"])

    monkeypatch.setattr(exporter, "export_onnx", export_onnx)
    monkeypatch.setattr(timing, "ROUNDS", (2, 3))
    monkeypatch.setattr(quantizer, "HELD_OUT", 4)


def test_rows_of_both_precisions(tmp_path, capsys):
    path = tmp_path / "export.csv"
    assert export.main([*WORDS, "--model", str(small_model_folder()), "--csv", str(path)]) == 0
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
    # a line for each row; exporters print lines of their own, now and then
    assert sum(" unet " in line for line in capsys.readouterr().out.splitlines()) == 4


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    assert export.main([*WORDS, "--csv", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
