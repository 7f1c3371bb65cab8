"""coalesce_step in plain torch."""

from __future__ import annotations

import torch

from ... import layout


def coalesce_step(
    sample: torch.Tensor, direction: torch.Tensor, distance: torch.Tensor, eta: float, mode: str, eps: float
) -> torch.Tensor:
    wide = torch.promote_types(sample.dtype, torch.float32)
    length = eta * distance.to(wide)
    v = direction.to(wide)
    if mode == "unit":
        length = length / v.flatten(1).square().mean(1).sqrt().clamp_min(eps)
    moved = (sample.to(wide) + length.view(-1, *[1] * (sample.ndim - 1)) * v).to(sample.dtype)
    return layout.arrange(moved, layout.is_channels_last(sample))
