"""Layers that hand what stands around them to the fused ops, and whether a layer is as the model made it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import ops
from ..ops.layout import transforms_active


def is_plain(*layers: nn.Module) -> bool:
    """Whether each layer does what its class says and nothing more: no hooks, no patched ``forward``, no subclass.

    The weights of such a layer may be given to an op that computes several layers at once; any other has to be called.
    """
    return not _global_hooks() and all(
        type(layer) in PLAIN and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
        for layer in layers
    )


def _global_hooks() -> bool:
    """Whether there are hooks of all modules, as profilers register."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


class Convolution(nn.Conv2d):
    """An nn.Conv2d of one group and zero padding, with the additions that follow it.

    Attributes:
        backend: of `ops.bias_residual`.
    """

    backend = "reference"

    def forward(
        self, x: Tensor, skip: Tensor | None = None, *, residual: Tensor | None = None, add_bias: bool = True
    ) -> Tensor:
        """Compute ``convolution(cat([x, skip], 1)) + bias + residual``.

        Args:
            x: (N, C1, H, W).
            skip: (N, C2, H, W), for a 1x1 convolution alone. It is computed as the sum of two convolutions, so that
                nothing is concatenated.
            residual: of the output's shape.
            add_bias: False leaves the bias to the next op.
        """
        bias = self.bias if add_bias and residual is None else None
        if skip is None:
            y = F.conv2d(x, self.weight, bias, self.stride, self.padding)
        elif x.is_cuda and self.backend != "reference" and _are_products(x, skip):
            y = of_halves(x, skip, self.weight, bias)
        else:
            split = x.shape[1]
            y = F.conv2d(x, self.weight[:, :split]) + F.conv2d(skip, self.weight[:, split:], bias)
        if residual is None:
            return y
        return ops.bias_residual(y, self.bias if add_bias else None, residual, backend=self.backend)


def _are_products(x: Tensor, skip: Tensor) -> bool:
    """Whether `of_halves` can take two images: of one size, and seen by no transform and no autocast."""
    seen = transforms_active() or torch.is_autocast_enabled(x.device.type)
    return not seen and x.ndim == skip.ndim == 4 and (x.shape[0], *x.shape[2:]) == (skip.shape[0], *skip.shape[2:])


def of_halves(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a 1x1 convolution of ``cat([x, skip], 1)`` as two products of matrices, one added to the other.

    cuDNN copies a part of a weight before it reads it, and has no sum; cuBLAS needs neither. Channels should be
    innermost in memory, as they are in the result.

    Args:
        x: (N, C1, H, W).
        skip: (N, C2, H, W).
        weight: (Cout, C1 + C2, 1, 1).
        bias: (Cout,).
    """
    n, split, height, width = x.shape
    first, second = (image.permute(0, 2, 3, 1).flatten(0, 2) for image in (x, skip))
    of_first, of_second = weight.flatten(1).split([split, skip.shape[1]], 1)
    y = F.linear(second, of_second, bias).addmm_(first, of_first.t())
    return y.view(n, height, width, len(weight)).permute(0, 3, 1, 2)


class GroupNormSiLU(nn.GroupNorm):
    """An nn.GroupNorm with conditioning and activation, see `ops.group_norm_silu`.

    Attributes:
        activation: "silu" or None.
        backend: of `ops.group_norm_silu`.
    """

    backend = "reference"

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, activation: str | None = "silu"):
        super().__init__(num_groups, num_channels, eps)
        self.activation = activation

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        pre_bias: Tensor | None = None,
    ) -> Tensor:
        """Compute ``act(GN(cat([x, skip], 1) + pre_bias) * (1 + scale) + shift)``.

        Args:
            x: (N, C1, H, W).
            skip: (N, C2, H, W).
            scale: (N, C), with C = C1 + C2.
            shift: (N, C).
            pre_bias: (C,).
        """
        return ops.group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            scale=scale,
            shift=shift,
            skip=skip,
            pre_bias=pre_bias,
            activation=self.activation,
            backend=self.backend,
        )


PLAIN = (Convolution, nn.Conv2d, nn.Linear)
