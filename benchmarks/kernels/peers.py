"""The four ops as an expert writes them in plain torch for speed: what the package's backends are measured against.

Each takes the arguments of the op of its name. They are at least as fast as the reference backend: intermediate results
are changed in place, products and sums are one call where torch has one, and nothing is checked. They are right for
inference only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    pre_bias: Tensor | None = None,
) -> Tensor:
    z = joined(x, skip, pre_bias)
    y = F.group_norm(z, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = torch.addcmul(per_channel(shift), y, 1 + per_channel(scale))
    return F.silu(y, inplace=True) if activation == "silu" else y


def bias_residual(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return (x + per_channel(bias)).add_(residual)


def dual_head(
    h: Tensor,
    direction_weight: Tensor,
    direction_bias: Tensor,
    distance_weight: Tensor,
    distance_bias: Tensor,
    sample: Tensor | None = None,
    anchor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    direction = F.conv2d(h, direction_weight, direction_bias, padding=1)
    pooled = h.mean((2, 3), dtype=torch.float32)
    distance = F.softplus(F.linear(pooled, distance_weight.float(), distance_bias.float())).squeeze(1)
    if sample is not None and anchor is not None:
        offset = anchor.float() - sample.float()
        length = torch.linalg.vector_norm(offset, dim=(1, 2, 3)) * offset[0].numel() ** -0.5
        direction = direction.add_((offset / length.clamp_min(1e-6).view(-1, 1, 1, 1)).to(direction.dtype))
        distance = distance * length
    return direction, distance


def coalesce_step(sample: Tensor, direction: Tensor, distance: Tensor, mode: str) -> Tensor:
    v = direction.float()
    if mode == "unit":
        distance = distance / (torch.linalg.vector_norm(v, dim=(1, 2, 3)) * v[0].numel() ** -0.5).clamp_min(1e-6)
    return torch.addcmul(sample.float(), v, distance.view(-1, 1, 1, 1)).to(sample.dtype)


def joined(x: Tensor, skip: Tensor | None, pre_bias: Tensor | None) -> Tensor:
    """What a GroupNorm normalises."""
    z = x if skip is None else torch.cat([x, skip], 1)
    return z if pre_bias is None else z + per_channel(pre_bias)


def per_channel(v: Tensor) -> Tensor:
    return v.view(*v.shape, 1, 1)


EAGER: dict[str, Callable[..., Any]] = {
    "group_norm_silu": group_norm_silu,
    "bias_residual": bias_residual,
    "dual_head": dual_head,
    "coalesce_step": coalesce_step,
}
