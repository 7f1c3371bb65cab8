"""Use one op in a network of your own: GroupNorm, scale and shift, and SiLU in one call.

python examples/own_module.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalescer_fast import ops


class ResidualBlock(nn.Module):
    """A residual block of a UNet, conditioned by an embedding."""

    def __init__(self, channels: int, embedding: int, groups: int = 32):
        super().__init__()
        self.groups = groups
        self.norm = nn.GroupNorm(groups, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.film = nn.Linear(embedding, 2 * channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding).chunk(2, dim=1)  # [N, C] each
        h = ops.group_norm_silu(x, self.groups, self.norm.weight, self.norm.bias, scale=scale, shift=shift)
        return ops.bias_residual(self.conv(h), self.bias, x)

    def plain(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The same in plain PyTorch."""
        scale, shift = self.film(embedding).chunk(2, dim=1)
        h = F.silu(self.norm(x) * (1 + scale[..., None, None]) + shift[..., None, None])
        return self.conv(h) + self.bias[:, None, None] + x


torch.manual_seed(0)
block = ResidualBlock(128, 256).eval().to(memory_format=torch.channels_last)
x = torch.randn(2, 128, 32, 32).to(memory_format=torch.channels_last)  # the fastest layout
embedding = torch.randn(2, 256)

with torch.no_grad():  # with gradients, the ops run on plain PyTorch
    error = (block(x, embedding) - block.plain(x, embedding)).abs().max()
print(f"largest difference from plain PyTorch: {error:.1e}")
assert error < 1e-4

print(ops.backends("group_norm_silu", x, 32))  # which backends can run this call, and why not the others

# Training works, too: "auto" then takes the reference, which has gradients.
block(x, embedding).square().mean().backward()
assert block.norm.weight.grad is not None
