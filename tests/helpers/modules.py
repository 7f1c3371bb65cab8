"""Small modules of one function, and what they compute as views of any strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import coalescer_fast as cf

from .diffusers_networks import randn
from .networks import seeded


class Function(nn.Module):
    """A module whose forward is a function of it and its arguments."""

    def __init__(self, function: Any, **modules: Any):
        super().__init__()
        self.function = function
        for name, each in modules.items():
            setattr(self, name, each)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def heads(rows: Tensor) -> Tensor:
    return rows.unflatten(-1, (4, 4)).transpose(1, 2)


def head(m: Any, x: Tensor) -> Tensor:
    """The direction that dual_head gives of an image, (2, 3, 6, 6)."""
    direction = cf.ops.dual_head(x, m.d.weight, m.d.bias, m.w.weight, m.w.bias)
    return direction[0] if isinstance(direction, tuple) else direction.direction


TOKENS, IMAGE = randn(2, 16, 16), randn(2, 16, 6, 6)
VIEWS = {
    "LayerNorm, a dimension more": (lambda m, x: m.n(x)[:, None], TOKENS),
    "LayerNorm, tokens as an image": (lambda m, x: m.n(x).unflatten(1, (4, 4)), TOKENS),
    "LayerNorm, channels apart": (lambda m, x: m.n(x).unflatten(-1, (4, 4)), TOKENS),
    "LayerNorm, heads": (lambda m, x: heads(m.n(x)), TOKENS),
    "LayerNorm, two views": (lambda m, x: (heads(m.n(x)), m.n(x)[:, None]), TOKENS),
    "LayerNorm, five dimensions": (lambda m, x: m.n(x).unflatten(1, (2, 8)).unflatten(-1, (4, 4)), TOKENS),
    "GroupNorm, channels last": (lambda m, x: m.g(x).permute(0, 2, 3, 1), IMAGE),
    "GroupNorm, sides exchanged": (lambda m, x: m.g(x).transpose(2, 3), IMAGE),
    "GroupNorm, heads": (lambda m, x: heads(m.g(x).flatten(2).transpose(1, 2)), IMAGE),
    "GroupNorm, a crop": (lambda m, x: m.g(x)[:, 3:8, 1:3, 2:].transpose(1, 3), IMAGE),
    "attention": (lambda m, x: F.scaled_dot_product_attention(*[heads(m.l(x))] * 3), TOKENS),
    "attention of what was given": (lambda m, x: F.scaled_dot_product_attention(*[heads(x)] * 3), TOKENS),
    "Linear, heads": (lambda m, x: heads(m.l(x)), TOKENS),
    "a convolution, sides exchanged": (lambda m, x: m.c(x).transpose(2, 3), IMAGE),
    "dual_head": (head, IMAGE),
    "dual_head, channels last": (lambda m, x: head(m, x).permute(0, 2, 3, 1), IMAGE),
    "dual_head, a crop": (lambda m, x: head(m, x)[:, 1:, 2:4], IMAGE),
    "what was given": (lambda m, x: (m.c(x), x.permute(0, 2, 3, 1)), IMAGE),
    # of the prologue
    "tokens of four dimensions": (lambda m, x: m.n(x.unflatten(1, (4, 4)).softmax(-1).flatten(1, 2)), TOKENS),
    "tokens times Linear": (lambda m, x: m.l(x.unflatten(1, (16, 1)).softmax(-1).squeeze(2)), TOKENS),
}


def layers(function: Callable[..., Any]) -> Function:
    """A module of a function of `VIEWS`."""
    shared = {"n": nn.LayerNorm(16), "g": nn.GroupNorm(2, 16), "l": nn.Linear(16, 16), "c": nn.Conv2d(16, 16, 1)}
    return seeded(Function(function, **shared, d=nn.Conv2d(16, 3, 3), w=nn.Linear(16, 1)))
