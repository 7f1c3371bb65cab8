"""The rule that group_norm_silu is held to: its formula in extended precision, and what plain torch makes of it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ..numerics import assert_accurate, call, exact, statistics_eps

OP = "group_norm_silu"


def formula(
    x, num_groups, weight=None, bias=None, eps=1e-5, scale=None, shift=None, skip=None, pre_bias=None, activation="silu"
):
    """The op in extended precision, the size of its largest intermediate result, and its condition: |z| in output
    units."""

    def per_channel(v, absent):
        return absent if v is None else exact(v).reshape(*v.shape, *[1] * (x.ndim - 2))

    z = exact(x) if skip is None else np.concatenate([exact(x), exact(skip)], 1)
    z = z + per_channel(pre_bias, 0)
    grouped = z.reshape(z.shape[0], num_groups, z.shape[1] // num_groups, *z.shape[2:])
    axes = tuple(range(2, grouped.ndim))
    centred = grouped - grouped.mean(axes, keepdims=True)
    inverse = np.ones_like(grouped) / np.sqrt((centred**2).mean(axes, keepdims=True) + eps)
    normalised, inverse = (centred * inverse).reshape(z.shape), inverse.reshape(z.shape)
    weight, bias = per_channel(weight, 1), per_channel(bias, 0)
    scale, shift = per_channel(scale, 0), per_channel(shift, 0)
    y = (normalised * weight + bias) * (1 + scale) + shift
    size = (np.abs(normalised * weight) + np.abs(bias)) * (1 + np.abs(scale)) + np.abs(shift)
    condition = np.abs(z * inverse * weight * (1 + scale))
    if activation == "silu":
        y = y / (1 + np.exp(-y))
    return y, float(size.max(initial=0)), float(condition.max(initial=0))


def plain(
    x, num_groups, weight=None, bias=None, eps=1e-5, scale=None, shift=None, skip=None, pre_bias=None, activation="silu"
):
    """The op in torch's own functions, in x's dtype."""

    def like(v):
        return None if v is None else v.to(x.dtype)

    def per_channel(v):
        return like(v).view(*v.shape, *[1] * (x.ndim - 2))

    z = x if skip is None else torch.cat([x, skip], 1)
    z = z if pre_bias is None else z + per_channel(pre_bias)
    y = torch.group_norm(z, num_groups, like(weight), like(bias), eps)
    y = y if scale is None else y * (1 + per_channel(scale))
    y = y if shift is None else y + per_channel(shift)
    return F.silu(y) if activation == "silu" else y


def check(
    backend: str, x: torch.Tensor, num_groups: int, weight=None, bias=None, eps: float = 1e-5, **kwargs
) -> torch.Tensor:
    result = call(OP, backend, x, num_groups, weight, bias, eps, **kwargs)
    judge(result, x, num_groups, weight, bias, eps, **kwargs)
    return result


def judge(
    result: torch.Tensor, x: torch.Tensor, num_groups: int, weight=None, bias=None, eps: float = 1e-5, **kwargs
) -> None:
    """Hold the result to the rule."""
    truth, size, condition = formula(x, num_groups, weight, bias, eps, **kwargs)
    # z is rounded to x's dtype where a bias is added before the statistics, which otherwise round in float32
    rounding = torch.finfo(x.dtype).eps if kwargs.get("pre_bias") is not None else statistics_eps(x.dtype)
    reference = plain(x, num_groups, weight, bias, eps, **kwargs)
    assert result.dtype == x.dtype
    assert_accurate(OP, result, reference, truth, x.dtype, size, condition * rounding)
