"""The rule that coalesce_step is held to: its formula in extended precision, and what plain torch makes of it."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..numerics import assert_accurate, call, exact, randn

OP = "coalesce_step"
MODES = ("unit", "raw")


def formula(sample, direction, distance, eta=1.0, mode="unit", eps=1e-6):
    """The new R in extended precision, and the size of the larger term."""
    sample, direction, distance = exact(sample), exact(direction), exact(distance)
    length = eta * distance
    if mode == "unit":
        rms = np.sqrt((direction**2).mean(tuple(range(1, direction.ndim))))
        length = length / np.maximum(rms, eps)
    way = length.reshape(len(sample), *[1] * (sample.ndim - 1)) * direction
    return sample + way, float((np.abs(sample) + np.abs(way)).max(initial=0))


def plain(sample, direction, distance, eta=1.0, mode="unit", eps=1e-6):
    """The step in torch's own functions, in float32 or float64, rounded once."""
    wide = torch.promote_types(sample.dtype, torch.float32)
    column = (len(sample), *[1] * (sample.ndim - 1))
    direction = direction.to(wide)
    if mode == "unit":
        rms = torch.linalg.vector_norm(direction.flatten(1), dim=1) / math.prod(sample.shape[1:]) ** 0.5
        direction = direction / rms.clamp_min(eps).view(column)
    return (sample.to(wide) + eta * distance.to(wide).view(column) * direction).to(sample.dtype)


def check(
    backend: str, sample: torch.Tensor, direction: torch.Tensor, distance: torch.Tensor, **kwargs
) -> torch.Tensor:
    result = call(OP, backend, sample, direction, distance, **kwargs)
    judge(result, sample, direction, distance, **kwargs)
    return result


def judge(
    result: torch.Tensor, sample: torch.Tensor, direction: torch.Tensor, distance: torch.Tensor, **kwargs
) -> None:
    """Hold the result to the rule."""
    truth, size = formula(sample, direction, distance, **kwargs)
    assert result.dtype == sample.dtype
    assert_accurate(OP, result, plain(sample, direction, distance, **kwargs), truth, sample.dtype, size)


def batch(
    n: int = 3, *, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (4, 6, 5)
) -> tuple[torch.Tensor, ...]:
    return (
        randn(n, *shape, dtype=dtype),
        randn(n, *shape, dtype=dtype, seed=1),
        (0.1 + randn(n, seed=2).abs()).to(dtype),
    )
