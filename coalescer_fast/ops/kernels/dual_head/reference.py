"""dual_head in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import layout


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
    score = h.mean((2, 3), dtype=wide) @ distance_weight.to(wide).view(-1) + distance_bias.to(wide)
    direction, distance = combine(direction, score, sample, anchor)
    return layout.arrange(direction, layout.is_channels_last(h)), distance


def combine(
    direction: torch.Tensor, score: torch.Tensor, sample: torch.Tensor | None, anchor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the heads give, of their layers' outputs: direction (N, Cz, H, W), and score (N,), the distance before
    softplus."""
    wide = torch.promote_types(direction.dtype, torch.float32)
    distance = F.softplus(score.to(wide))
    if sample is not None and anchor is not None:
        offset = anchor.to(wide) - sample.to(wide)
        length = offset.square().mean((1, 2, 3)).sqrt()
        way = offset / length.clamp_min(1e-6)[:, None, None, None]
        direction = direction + way.to(torch.promote_types(direction.dtype, sample.dtype))
        distance = distance * length
    return direction, distance
