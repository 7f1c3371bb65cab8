"""dual_head in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import layout


def dual_head(
    h: torch.Tensor,
    direction_weight: torch.Tensor,
    direction_bias: torch.Tensor,
    distance_weight: torch.Tensor,
    distance_bias: torch.Tensor,
    sample: torch.Tensor | None,
    anchor: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(h.dtype, torch.float32)
    direction = F.conv2d(h, direction_weight.to(h.dtype), direction_bias.to(h.dtype), padding=1)
    pooled = h.mean((2, 3), dtype=wide)
    distance = F.softplus(pooled @ distance_weight.to(wide).view(-1) + distance_bias.to(wide))
    if sample is not None and anchor is not None:
        offset = anchor.to(wide) - sample.to(wide)
        length = offset.square().mean((1, 2, 3)).sqrt()
        direction = direction + (offset / length.clamp_min(1e-6)[:, None, None, None]).to(torch.promote_types(h.dtype, sample.dtype))
        distance = distance * length
    return layout.arrange(direction, layout.is_channels_last(h)), distance
