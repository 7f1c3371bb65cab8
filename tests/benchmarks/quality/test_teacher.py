from __future__ import annotations

import csv

import pytest
from PIL import Image

from benchmarks.quality import teacher


@pytest.mark.slow
def test_every_model_has_its_losses_and_its_pictures(tmp_path, monkeypatch):
    pytest.importorskip("mlxtend")
    monkeypatch.setattr(teacher, "ROW_EVERY", 4)
    monkeypatch.setattr(teacher, "PICTURES", 4)
    rows = teacher.compare(tmp_path / "run", tmp_path / "t.csv", tmp_path / "t.png", steps=8, progress=False)
    with (tmp_path / "t.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    for name in ("teacher", *teacher.COALESCERS):
        of_model = [row for row in rows if row["model"] == name]
        assert [row["step"] for row in of_model if "loss" in row] == [4, 8]
        assert [row["evaluations"] for row in of_model if "accuracy" in row] == (
            [2, 2] if name == "teacher" else [1, 2]
        )
    assert Image.open(tmp_path / "t.png").width > 20 * 64
    assert len(list((tmp_path / "run" / "pictures").iterdir())) == 1  # both trainings with the teacher share them
