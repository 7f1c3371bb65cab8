"""The grading's benchmarks: `benchmarks.quality.grading`, `.best_of` and `.auto`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.quality import auto, best_of, grading
from coalescer_fast.training.grading import Drawn, Judge, calibrate, draw, listed_wordings

from ...helpers.evaluation import classifier, pipeline_for, tiny_data

FREE = {"kitten": ["cat"], "a dog": ["dog"]}


@pytest.fixture(scope="module")
def pipe():
    return pipeline_for(tiny_data())


def test_rows_and_plot_of_the_grading(pipe, tmp_path):
    rows = list(grading.measure(pipe, tiny_data(), FREE, 8, 2, progress=False))
    by_kind = {row["wordings"]: row for row in rows if "auc" in row}
    assert next(iter(by_kind)) == grading.UNSEEN
    assert [*by_kind][-1] == grading.FREE
    assert by_kind[grading.FREE]["pictures"] == 2 * 4
    parts = [row for name, row in by_kind.items() if name not in (grading.UNSEEN, grading.FREE)]
    assert sum(row["pictures"] for row in parts) == by_kind[grading.UNSEEN]["pictures"]
    bins = [row for row in rows if row["wordings"] == f"reliability, {grading.UNSEEN}"]
    assert sum(row["pictures"] for row in bins) == by_kind[grading.UNSEEN]["pictures"]
    mean = sum(row["pictures"] * row["quality"] for row in bins) / sum(row["pictures"] for row in bins)
    assert math.isclose(mean, by_kind[grading.UNSEEN]["quality"], rel_tol=1e-6)
    grading.write(tmp_path / "grading.csv", rows)
    grading.plot(grading.read(tmp_path / "grading.csv"), tmp_path / "grading.png")
    assert (tmp_path / "grading.png").stat().st_size > 5000


def test_what_a_signal_is_worth():
    wordings = listed_wordings({"a": ["a"], "b": ["b"]})
    right = np.array([1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0], bool)
    drawn = Drawn(wordings, 8, [], [], np.zeros(2), torch.zeros(16, 1, 1, 1), right)
    found = best_of.worth(drawn, right.astype(float))
    assert (found["within_auc"], found["one"], found["best_of_4"], found["any_of_4"]) == (1.0, 0.125, 0.5, 0.5)
    assert found["gain"] == 0.375
    assert best_of.worth(drawn, -right.astype(float))["best_of_4"] == 0


def test_every_signal_has_a_number_for_every_picture(pipe):
    data = tiny_data()
    calibrate(pipe, data, 4, 2, progress=False)
    drawn = draw(pipe, Judge(pipe, data), listed_wordings(FREE), 8, progress=False)
    found = best_of.signals(pipe, drawn, data)
    assert {"quality", "nearness to the anchor", "classifier's certainty"} <= found.keys()
    for score in found.values():
        assert score.shape == (16,)
        assert np.isfinite(score).all()
        assert len(np.unique(score)) > 1 or score is found["classifier's group of the matched name"]


def test_rows_of_auto(pipe, monkeypatch):
    monkeypatch.setattr(auto, "ARRIVAL_DISTANCES", (1e6, -1.0))
    rows = list(auto.measure(pipe, tiny_data(), classifier=classifier()))
    assert [row["sampler"] for row in rows] == ["1 step", "2 steps", "3 steps", "4 steps", *["auto", "chance"] * 2]
    assert [row["evaluations"] for row in rows] == [2, 3, 4, 5, 2, 2, 9, 9]
    assert rows[4]["fd_name"] == rows[0]["fd_name"]
    assert rows[5]["name_top1"] == rows[0]["name_top1"]
    assert pipe.scheduler.config.arrival_distance == 1.3
