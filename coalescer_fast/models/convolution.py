"""A convolution that says how it is used, so that a runtime can fuse what stands around it."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops


class Fused(Protocol):
    """A convolution with its weights packed: ``convolution(x) + other``, other (N, Cout, H, W) or None; and its parts by input channels."""

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor: ...

    def of_both(self, x: Tensor, skip: Tensor) -> Tensor: ...


class Convolution(nn.Conv2d):
    """nn.Conv2d of one group; ``fused``, if a runtime has set it, runs in its place."""

    fused: Fused | None = None

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.fused is None else self.fused(input)

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The convolution, and the bias that is still to be added: None if it has been."""
        if self.fused is not None:
            return self.fused(x), None
        return F.conv2d(x, self.weight, None, self.stride, self.padding), self.bias

    def plus(self, x: Tensor, residual: Tensor, backend: str) -> Tensor:
        """convolution(x) + residual."""
        if self.fused is not None:
            return self.fused(x, residual)
        y, bias = self.without_bias(x)
        return ops.bias_residual(y, bias, residual, backend=backend)

    def of_both(self, x: Tensor, skip: Tensor) -> Tensor:
        """convolution(cat([x, skip], 1)) of a 1x1 convolution, as the sum of two: nothing is copied."""
        if self.fused is not None:
            return self.fused.of_both(x, skip)
        weight = self.weight
        return F.conv2d(x, weight[:, : x.shape[1]]) + F.conv2d(skip, weight[:, x.shape[1] :], self.bias)

