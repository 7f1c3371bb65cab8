"""Networks of random weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def seeded(network: Network, seed: int = 0) -> Network:
    """The network, for inference, with random weights of variance 1 / fan-in, so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) / fan**0.5
    return network.eval().requires_grad_(False)
