from __future__ import annotations

import csv

import pytest
from PIL import Image

from benchmarks.quality import fashion
from tests.helpers.fashion import write_fashion


@pytest.mark.slow
def test_every_objective_is_trained_and_measured(tmp_path, monkeypatch):
    write_fashion(tmp_path)
    monkeypatch.setenv("COALESCER_FAST_FASHION_MNIST", str(tmp_path))
    monkeypatch.setattr(fashion, "PICTURES", 4)
    monkeypatch.setattr(fashion, "SHOWN_STEPS", (2,))
    where = (tmp_path / "run", tmp_path / "f.csv", tmp_path / "f.png")
    rows = fashion.compare(*where, steps=(1, 2), short=4, progress=False)
    with (tmp_path / "f.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert [row["model"] for row in rows[:2]] == ["held-out pictures", "autoencoder"]
    for name in fashion.OBJECTIVES:
        of_model = [row for row in rows if row["model"] == name.replace("_", " ")]
        assert [row["evaluations"] for row in of_model] == [1, 2]
        assert all(0 <= row["accuracy"] <= 1 and row["frechet_distance"] >= 0 for row in of_model)
        assert all(row["cpu_seconds"] > 0 for row in of_model)
    assert Image.open(tmp_path / "f.png").width > 20 * 64
    again = fashion.compare(*where[:2], steps=(1, 2), short=4, progress=False)
    for before, after in zip(rows, again, strict=True):  # nothing is trained again
        assert after.pop("cpu_seconds", 0) == pytest.approx(before.pop("cpu_seconds", 0), rel=1e-5)
        assert after == before
