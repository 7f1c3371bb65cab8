"""A convolution that leaves what stands around it to the fused ops."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops


class Convolution(nn.Conv2d):
    """nn.Conv2d of one group."""

    def without_bias(self, x: Tensor) -> Tensor:
        """The convolution; the bias is still to be added."""
        return F.conv2d(x, self.weight, None, self.stride, self.padding)

    def plus(self, x: Tensor, residual: Tensor, backend: str) -> Tensor:
        """convolution(x) + residual."""
        return ops.bias_residual(self.without_bias(x), self.bias, residual, backend=backend)

    def of_both(self, x: Tensor, skip: Tensor) -> Tensor:
        """convolution(cat([x, skip], 1)) of a 1x1 convolution, as the sum of two: nothing is copied."""
        weight = self.weight
        return F.conv2d(x, weight[:, : x.shape[1]]) + F.conv2d(skip, weight[:, x.shape[1] :], self.bias)
