from __future__ import annotations

import numpy as np
import pytest
import torch

from coalescer_fast.training.evaluation import metrics


def test_nearest_and_hits():
    references = torch.tensor([[0.0, 0], [1, 0], [5, 0], [5, 1]])
    queries = torch.tensor([[0.9, 0], [5, 0.8]])
    distance, index = metrics.nearest(queries, references, 3)
    assert index.tolist() == [[1, 0, 2], [3, 2, 1]]
    torch.testing.assert_close(distance[:, 0], torch.tensor([0.1, 0.2]))
    labels = torch.tensor([7, 8, 9, 9])
    assert metrics.hits(labels[index], torch.tensor([7, 9])) == (0.5, 1.0)
    assert metrics.nearest(queries, references, 10)[1].shape == (2, 4)


def test_chance_is_the_expected_hit_of_a_random_picture():
    labels, wanted = np.array(["a"] * 6 + ["b"] * 3 + ["c"]), np.array(["a", "b", "b", "z"])
    every_pair = np.mean([x == y for x in labels for y in wanted])
    assert metrics.chance(labels, wanted) == pytest.approx(every_pair) == pytest.approx(0.3)


def test_spearman_and_r_squared():
    rng = np.random.default_rng(0)
    a = torch.from_numpy(rng.normal(size=50))
    assert metrics.spearman(a, a.exp()) == pytest.approx(1)
    assert metrics.spearman(a, -a) == pytest.approx(-1)
    ties, others = torch.tensor([1.0, 2, 2, 4]), torch.tensor([1.0, 3, 2, 4])  # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4
    assert metrics.spearman(ties, others) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert metrics.r_squared(a, a) == 1
    assert metrics.r_squared(a.mean().expand(50), a) == pytest.approx(0)
    assert metrics.r_squared(-a, a) < 0


def test_density_and_coverage_on_a_line():
    """Real pictures at 0, 1, 3, 6; with k = 1 their balls reach to 1, 1, 2 and 3."""
    real = torch.tensor([[0.0], [1], [3], [6]])
    samples = torch.tensor([[0.5], [1.5], [20]])  # in the balls of 0 and 1; of 1 and 3; of none
    assert metrics.density_and_coverage(real, samples, 1) == (pytest.approx(4 / 3), 0.75)
    assert metrics.density_and_coverage(real, samples[2:], 1) == (0.0, 0.0)


def test_density_and_coverage_of_the_same_distribution():
    draws = torch.Generator().manual_seed(0)
    real, same = torch.randn(1000, 3, generator=draws), torch.randn(1000, 3, generator=draws)
    density, coverage = metrics.density_and_coverage(real, same)
    assert density == pytest.approx(1, abs=0.1)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.02)
    half = metrics.density_and_coverage(real, same[same[:, 0] > 0][:400].repeat(2, 1))
    assert half[1] == pytest.approx(coverage / 2, abs=0.1)
