"""group_norm_silu in plain torch."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F

from ... import layout


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    skip: torch.Tensor | None,
    pre_bias: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    wide = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)

    def per_channel(v: torch.Tensor) -> torch.Tensor:
        return v.to(wide).view(*v.shape, *[1] * (x.ndim - 2))

    z = (x if skip is None else torch.cat([x, skip], 1)).to(wide)
    if pre_bias is not None:
        z = z + per_channel(pre_bias)
    if _needs_contiguous(z, weight, bias):
        z = z.contiguous()
    # not F.group_norm, which refuses a group of one element: its normalised value is 0
    y = torch.group_norm(z, num_groups, _like(weight, z), _like(bias, z), eps)
    if scale is not None:
        y = y * (1 + per_channel(scale))
    if shift is not None:
        y = y + per_channel(shift)
    return layout.arrange((F.silu(y) if activation == "silu" else y).to(x.dtype), layout.is_channels_last(x))


def _needs_contiguous(z: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> bool:
    """Whether torch.group_norm fails if z has its channels innermost.

    It does under torch.vmap and in forward mode. In the backward pass it crashes with a segmentation fault where a
    parameter needs a gradient and z does not (seen with torch 2.13 on a CPU).
    """
    if layout.transforms_active() or forward_ad._current_level >= 0:
        return True
    return (
        torch.is_grad_enabled()
        and not z.requires_grad
        and any(p is not None and p.requires_grad for p in (weight, bias))
    )


def _like(parameter: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)
