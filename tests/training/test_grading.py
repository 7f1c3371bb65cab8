from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from coalescer_fast import CoalescerPipeline, folders
from coalescer_fast.training import grading

from ..helpers.evaluation import pipeline_for, tiny_data


@pytest.fixture(scope="module")
def pipe():
    return pipeline_for(tiny_data())


def test_wordings_say_what_answers_them():
    data = tiny_data()
    made = grading.draw_wordings(data, ("3d", "flat"), 50)
    assert made == grading.draw_wordings(data, ("3d", "flat"), 50)
    assert len({wording.text for wording in made}) == len(made)
    of = {kind: [wording for wording in made if wording.kind == kind] for kind in grading.KINDS}
    assert {wording.text: wording.accepted for wording in of["name"]} == {
        name: {name} for name in ("cat", "dog", "pizza", "bread", "horse", "cake")
    }
    assert {wording.text for wording in of["held-out name"]} == {"tiger", "rice"}
    assert not of["name with a word left out"]  # all names are of one word
    for wording in of["three keywords"] + of["one keyword"]:
        assert wording.accepted == {wording.text.split()[0]}
    for wording in of["words of two names"]:
        assert wording.accepted == {*wording.text.split()}
    assert len(of["no word"]) == 5
    assert not any(wording.accepted for wording in of["no word"])


def test_halves_have_every_kind_and_nothing_in_common():
    made = grading.draw_wordings(tiny_data(), (), 6)
    fitted, others = grading.split(made)
    assert {*fitted} | {*others} == {*made}
    assert not {*fitted} & {*others}
    for kind in ("name", "held-out name", "words of two names"):
        counts = [sum(wording.kind == kind for wording in half) for half in (fitted, others)]
        assert 0 <= counts[0] - counts[1] <= 1


def test_a_logistic_regression_finds_the_odds():
    random = np.random.default_rng(0)
    x = random.normal((3.0, -40.0), (0.02, 10.0), (20000, 2))
    odds = 1.0 + 60.0 * (x[:, 0] - 3.0) - 0.2 * (x[:, 1] + 40.0)
    right = random.random(len(x)) < 1 / (1 + np.exp(-odds))
    bias, *weights = grading.logistic(x, right)
    np.testing.assert_allclose(weights, (60.0, -0.2), rtol=0.1)
    assert math.isclose(bias + weights[0] * 3.0 - weights[1] * 40.0, 1.0, abs_tol=0.1)


def test_area_under_curve():
    score, right = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert grading.area_under_curve(score, right) == 0.75
    assert grading.area_under_curve(np.ones(4), right) == 0.5
    assert math.isnan(grading.area_under_curve(score, np.ones(4, bool)))


def test_reliability():
    quality, right = np.array([0.05, 0.06, 0.95, 1.0]), np.array([False, True, True, True])
    found = list(grading.reliability(quality, right))
    np.testing.assert_allclose(found, [(0.055, 0.5, 2), (0.975, 1.0, 2)])


def test_the_nearest_real_picture_decides(pipe):
    data = tiny_data()
    judge = grading.Judge(pipe, data)
    shown = judge.latents[[0, 9, 31]].unflatten(1, (12, 4, 4)) + 1e-3
    assert judge(shown) == ["cat", "pizza", "rice"]


def test_a_model_is_calibrated_and_stored(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    numbers, unseen = grading.calibrate(pipe, tiny_data(), 8, 2, progress=False)
    assert unseen.right.any()
    assert not unseen.right.all()
    assert unseen.features().shape == (2 * len(unseen.wordings), 7)
    quality = unseen.quality(numbers)
    assert len({*quality.tolist()}) > len(quality) / 2
    name = unseen.wordings[0].text
    noise = torch.randn(len(quality), 12, 4, 4, generator=torch.Generator().manual_seed(1))
    out = pipe(name, latents=noise[:1], output_type="latent")
    assert math.isclose(out.quality[0], quality[0], abs_tol=1e-5)
    grading.store(pipe, tmp_path)
    assert (tmp_path / folders.CHECKSUMS).exists()
    assert CoalescerPipeline.from_pretrained(tmp_path).scheduler.config.grading == numbers


def test_nothing_to_fit_to(pipe):
    data = tiny_data()
    drawn = grading.draw(pipe, grading.Judge(pipe, data), [grading.Wording("no word", "zzz", frozenset())], 2)
    with pytest.raises(ValueError, match="all pictures are right or none is"):
        grading.fit(drawn)
