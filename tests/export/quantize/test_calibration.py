from __future__ import annotations

import numpy as np
import pytest

from coalescer_fast.export.quantize import calibration
from coalescer_fast.export.quantize.calibration import Histogram


def histogram(*parts):
    found = Histogram()
    for part in parts:
        found.add(np.asarray(part))
    return found


def test_max_is_exact_over_all_that_was_seen():
    parts = [np.linspace(-0.25, 0.5, 100), np.array([-7.0, 3.0]), np.zeros(4), np.array([1e3])]
    found = histogram(*parts)
    assert found.range("max") == (-7.0, 1000.0)
    assert found.counts.sum() == sum(map(len, parts))


def test_a_growing_histogram_is_the_one_over_all():
    x = np.random.default_rng(0).standard_normal(10000).astype(np.float32)
    x[0] = 1.0
    grown = histogram([1.0], x[:5000], x[5000:])
    counts, _ = np.histogram(np.abs(np.append(x, np.float32(1))), calibration.BINS, (0, grown.top))
    assert grown.counts.sum() == counts.sum()
    assert np.abs(grown.counts - counts).sum() <= 10  # of values on a border between bins


def test_a_percentile_cuts_outliers():
    x = np.random.default_rng(0).uniform(-1, 2, 100000)
    x[0] = 100
    least, most = histogram(x).range("percentile", 99.99)
    assert least == pytest.approx(-1, abs=1e-3)
    assert most == pytest.approx(2, abs=0.03)
    assert histogram(x).range("percentile", 100) == pytest.approx(histogram(x).range("max"))


def test_entropy_cuts_a_long_tail_and_keeps_a_flat_one():
    generator = np.random.default_rng(0)
    x = generator.standard_normal(200000)
    x[:3] = 60
    least, most = histogram(x).range("entropy")
    assert 2.5 < most < 10
    assert least == pytest.approx(max(x.min(), -most), rel=1e-6)
    flat = histogram(generator.uniform(0, 1, 200000))
    assert flat.range("entropy")[1] > 0.98


@pytest.mark.parametrize("method", calibration.METHODS)
def test_nothing_but_zeros(method):
    assert histogram(np.zeros(10), np.zeros(3)).range(method) == (0, 0)


def test_not_finite():
    with pytest.raises(ValueError, match="is not finite"):
        histogram([1.0, np.nan])


@pytest.mark.parametrize("size", [1e-44, 1e-42, 1e-38, 2e-35, 1e-30, 1e30, 3e38])
def test_any_size_of_numbers_has_its_histogram(size):
    x = (np.linspace(-0.5, 1, 1001) * size).astype(np.float32)
    found = histogram(np.zeros(3, np.float32), x, x[::-1])
    assert found.counts.sum() == 3 + 2 * 1001
    assert found.range("max") == (float(x.min()), float(x.max()))
    for method in ("percentile", "entropy"):
        least, most = found.range(method, 100)
        assert float(x.min()) <= least < 0 < most <= float(x.max())
    if size > 1e-40:  # below, numbers have few digits
        assert found.range("percentile", 50)[1] == pytest.approx(0.375 * size, rel=0.02)


def test_numbers_that_are_not_finite():
    for x in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="is not finite"):
            histogram(np.array([0, x, 1], np.float32))
