from __future__ import annotations

import pytest
import torch

from coalescer_fast.training import losses

LOSSES = (
    lambda v, u, r, c: losses.distance_loss(u, r, c),
    lambda v, u, r, c: losses.sqrt_direction_loss(v, r, c),
    lambda v, u, r, c: losses.mse_direction_loss(v, r, c),
    lambda v, u, r, c: losses.distance_marching_loss(v, u, r, c),
)


def batch(n=5, shape=(3, 4, 4), seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(n, *shape), draw(n).abs(), draw(n, *shape), draw(n, *shape)


def rms(x):
    return (x**2).sum((1, 2, 3)).div(x[0].numel()).sqrt()


def test_formulas():
    v, u, r, c = batch()
    e = c - r
    n = e / (rms(e) ** 2 + 0.05**2).sqrt()[:, None, None, None]
    error = rms(v - n)
    torch.testing.assert_close(losses.distance_loss(u, r, c), (u - rms(e)) ** 2)
    torch.testing.assert_close(losses.sqrt_direction_loss(v, r, c), (error**2 + 0.05**2) ** 0.25)
    torch.testing.assert_close(losses.mse_direction_loss(v, r, c), error**2)
    one_step = rms(r + u[:, None, None, None] * v - c) ** 2 / (rms(e) ** 2 + 0.05**2)
    torch.testing.assert_close(losses.distance_marching_loss(v, u, r, c), one_step + 30 * error**2)


def test_sqrt_loss_is_the_seeds_away_from_zero():
    v, _, r, c = batch()
    literal = rms(100 * v - (c - r) / rms(c - r)[:, None, None, None]).sqrt()
    torch.testing.assert_close(losses.sqrt_direction_loss(100 * v, r, c), literal, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_finite_where_errors_vanish(loss):
    _, _, r, c = batch()
    for close in (c, r):  # on the target direction, and on the target itself
        v = losses.target_direction(r, close).requires_grad_()
        u = rms(close - r).requires_grad_()
        gradients = torch.autograd.grad(loss(v, u, r, close).sum(), (v, u), allow_unused=True)
        assert all(g.isfinite().all() for g in gradients if g is not None)


def test_total():
    v, u, r, c = batch()
    value, parts = losses.coalescer_loss(v, u, r, c, "sqrt")
    assert float(value) == pytest.approx(parts["distance"] + parts["direction"])
    assert parts["direction"] == pytest.approx(float(losses.sqrt_direction_loss(v, r, c).mean()))
    assert float(losses.coalescer_loss(v, u, r, c, "mse")[0]) == pytest.approx(
        float((losses.distance_loss(u, r, c) + losses.mse_direction_loss(v, r, c)).mean())
    )
    assert float(losses.coalescer_loss(v, u, r, c, "distance_marching")[0]) == pytest.approx(
        float(losses.distance_marching_loss(v, u, r, c).mean())
    )
    with pytest.raises(ValueError, match="'huber' is unknown"):
        losses.coalescer_loss(v, u, r, c, "huber")
