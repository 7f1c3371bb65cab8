"""bias_residual in plain torch."""

from __future__ import annotations

import torch

from ... import layout


def bias_residual(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    y = x.clone() if bias is None else x + bias.to(x.dtype).view(-1, *[1] * (x.ndim - 2))
    return layout.arrange(y if residual is None else y + residual, layout.is_channels_last(x))
