"""Convolutions and linear layers of a network in oneDNN's own memory layout, arranged once instead of at every call.

oneDNN's packed operators are private to torch (its compiler's own); `unavailable` says where they are missing, and plain ones run then.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DecoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn

from ..models.convolution import Convolution
from ..models.unet import SelfAttention, TransformerBlock
from .base import counted


@functools.cache
def unavailable() -> str:
    """Why weights cannot be packed here, or ""."""
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    try:
        x, weight = torch.ones(1, 16, 4, 4).to(memory_format=torch.channels_last), torch.ones(16, 16, 3, 3)
        convolution = Packed(weight, torch.ones(16), stride=1, padding=1)
        if not torch.equal(convolution(x, x), F.conv2d(x, weight, torch.ones(16), padding=1) + x):
            return "torch's packed convolution gives other results"
        linear = PackedLinear(nn.Linear(16, 16))
        if not torch.allclose(linear(x.flatten(1)[:, :16]), linear.plain(x.flatten(1)[:, :16])):
            return "torch's packed linear layer gives other results"
    except Exception as error:  # whatever a private operator that has changed may raise
        return f"torch's packed operators do not run: {str(error).splitlines()[0]}"
    return ""


class Packed:
    """A convolution of one group, with bias, sum and ReLU in one go, for x (N, C, H, W) with channels innermost."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, relu: bool = False):
        self.weight, self.bias = weight, bias
        self.stride, self.padding = ([v, v] if isinstance(v, int) else list(v) for v in (stride, padding))
        self.activation = "relu" if relu else "none"
        self.packed: Tensor | None = None
        self.halves: tuple[Packed, Packed] | None = None

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if self.packed is None:
            shape = list(x.shape)
            self.packed = counted(torch.ops.mkldnn._reorder_convolution_weight(self.weight, self.padding, self.stride, [1, 1], 1, shape))
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.packed, self.bias, self.padding, self.stride, [1, 1], 1, self.activation, [], ""
            )
        unary = self.activation if self.activation != "none" else None
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, self.packed, self.bias, self.padding, self.stride, [1, 1], 1, "add", None, unary, [], ""
        )

    def of_both(self, x: Tensor, skip: Tensor) -> Tensor:
        if self.halves is None:
            cut = x.shape[1]
            first, second = (part.contiguous() for part in (self.weight[:, :cut], self.weight[:, cut:]))
            self.halves = Packed(first, None, self.stride, self.padding), Packed(second, self.bias, self.stride, self.padding)
        return self.halves[1](skip, self.halves[0](x))


class PackedLinear(nn.Module):
    """nn.Linear on packed weights."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.plain = linear
        self.packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            rows = x.numel() // x.shape[-1]
            self.packed = counted(torch.ops.mkldnn._reorder_linear_weight(self.plain.weight.detach(), rows))
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.plain.bias, "none", [], "")


def pack(network: nn.Module) -> None:
    """Have every `Convolution` of the UNet, and the linear layers of its attention, run on packed weights."""
    for module in list(network.modules()):
        if isinstance(module, Convolution):
            module.fused = packed(module)
        if isinstance(module, SelfAttention):
            module.attend = attention
        if isinstance(module, (SelfAttention, TransformerBlock)):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(child))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for (N, heads, L, D). As two products for wide heads and few positions, where torch's fused kernel takes
    two to three times as long (D = L = 256, bfloat16); not for many positions, whose weights would not stay in a cache."""
    n, heads, length, width = q.shape
    if width < 128 or length > 512:
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (x.reshape(n * heads, length, width) for x in (q, k, v))
    weights = torch.baddbmm(q.new_empty(n * heads, length, length), q, k.transpose(1, 2), beta=0, alpha=width**-0.5)
    return torch.bmm(weights.softmax(-1), v).view(n, heads, length, width)


def packed(convolution: nn.Conv2d, relu: bool = False) -> Packed:
    bias = None if convolution.bias is None else convolution.bias.detach()
    return Packed(convolution.weight.detach(), bias, convolution.stride, convolution.padding, relu)


class PackedConvolution(nn.Module):
    """A convolution, and the ReLU behind it, on packed weights."""

    def __init__(self, convolution: nn.Conv2d, relu: bool):
        super().__init__()
        self.run = packed(convolution, relu)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return self.run(x, other)


class PackedBlock(nn.Module):
    """relu(f(x) + x) of a decoder's residual block, f ending in a convolution that adds x and applies the ReLU."""

    def __init__(self, block: AutoencoderTinyBlock):
        super().__init__()
        *first, last = block.conv
        self.first = nn.Sequential(*fuse_relu(first))
        self.last = PackedConvolution(last, relu=True)
        self.skip = block.skip

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x), self.skip(x))


def fuse_relu(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The layers with every convolution packed, together with the ReLU behind it."""
    fused: list[nn.Module] = []
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            fused.append(PackedConvolution(layer, i + 1 < len(layers) and isinstance(layers[i + 1], nn.ReLU)))
        elif isinstance(layer, AutoencoderTinyBlock) and isinstance(layer.skip, nn.Identity):
            fused.append(PackedBlock(layer))
        elif not (isinstance(layer, nn.ReLU) and i and isinstance(layers[i - 1], nn.Conv2d)):
            fused.append(layer)
    return fused


def pack_decoder(decoder: DecoderTiny) -> None:
    """Have diffusers' decoder run on packed weights."""
    decoder.layers = nn.Sequential(*fuse_relu(list(decoder.layers)))
