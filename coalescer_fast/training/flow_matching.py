"""The baseline: flow matching with the coalescer's network, anchor and descriptions, and a time as a further input."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.unet import CoalescerUNet, replace_empty


class FlowMatchingUNet(CoalescerUNet):
    """The same UNet as a velocity field v(x_t, t, description), x_t = (1 - t) noise + t picture.

    The time is embedded by sinusoids and added to the description's embedding. With an anchor p, the output is a
    residual of the velocity that leads to p: v = net + (1 - t) (p - x_t) + t x_t. The distance head is unused and
    frozen.
    """

    frequencies = 64

    # from_pretrained reads the arguments off the signature
    @functools.wraps(CoalescerUNet.__init__)  # type: ignore[misc]
    def __init__(self, **config: Any):
        super().__init__(**config)
        width = self.config.embedding_dim
        self.time_embedding = nn.Sequential(nn.Linear(2 * self.frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.distance_head.requires_grad_(False)
        self._time: torch.Tensor | None = None

    def embed(self, description: torch.Tensor) -> torch.Tensor:
        assert self._time is not None
        exponents = torch.linspace(
            0.0, math.log(100.0), self.frequencies, dtype=torch.float32, device=description.device
        )
        octaves = torch.exp(exponents) * math.pi
        angles = self._time[:, None] * octaves
        time = self.time_embedding(torch.cat([angles.sin(), angles.cos()], 1).to(description.dtype))
        return F.silu(self.embedding(replace_empty(description, self.null)) + time)

    def forward(self, sample: torch.Tensor, description: torch.Tensor, time: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Velocity (N, Cz, H, W) at x_t = ``sample``, t = ``time`` (N,) in [0, 1]."""
        self._time = time
        conditioning = self.condition(description)
        velocity = self.direction_head(self.features(sample, conditioning))
        if conditioning.anchor is not None:
            t = time.view(-1, 1, 1, 1)
            velocity = velocity + (1 - t) * (conditioning.anchor - sample) + t * sample
        return velocity


@torch.no_grad()
def euler(
    model: FlowMatchingUNet, noise: torch.Tensor, description: torch.Tensor, steps: int, guidance_scale: float = 1.0
) -> torch.Tensor:
    """Integrate the velocity from t = 0 to 1 in equal Euler steps.

    Args:
        model: the velocity field.
        noise: (N, Cz, H, W), at t = 0.
        description: (N, D).
        steps: how many.
        guidance_scale: as in classifier-free guidance; 1 for none.

    Returns:
        Latents (N, Cz, H, W), at t = 1.
    """
    x = noise
    for i in range(steps):
        time = torch.full((len(x),), i / steps, dtype=torch.float32, device=x.device)
        velocity = model(x, description, time)
        if guidance_scale != 1:
            empty = model(x, torch.zeros_like(description), time)
            velocity = empty + guidance_scale * (velocity - empty)
        x = x + velocity / steps
    return x
