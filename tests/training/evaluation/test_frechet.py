from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from coalescer_fast.training.evaluation import frechet_distance


def test_frechet_distance_agrees_with_scipy():
    torch.manual_seed(0)
    a = torch.randn(300, 8) @ torch.randn(8, 8)
    b = torch.randn(200, 8) @ torch.randn(8, 8) + 1
    mean = [x.double().mean(0).numpy() for x in (a, b)]
    cov = [np.cov(x.double().numpy().T) for x in (a, b)]
    expected = np.square(mean[0] - mean[1]).sum() + np.trace(
        cov[0] + cov[1] - 2 * scipy.linalg.sqrtm(cov[0] @ cov[1]).real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_known_normal_distributions():
    torch.manual_seed(0)
    a = torch.randn(500, 3, dtype=torch.float64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + torch.tensor([3.0, 0, 4])) == pytest.approx(25)
    # a doubled standard deviation, about the origin: tr(A + 4A - 2 * 2A) = tr(A)
    a -= a.mean(0)
    assert frechet_distance(a, 2 * a) == pytest.approx(float(torch.cov(a.T).trace()))


def test_frechet_distance_of_fewer_samples_than_features_is_finite():
    assert frechet_distance(torch.randn(5, 64), torch.randn(500, 64)) > 0
