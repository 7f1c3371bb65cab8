"""Convolution weights in the order in which csrc/cpu/network.h reads them, in floating point or in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops import library
from .record import BYTES

BALANCE = 0.5  # see Range.quantised


@dataclass
class Range:
    """What a normalised value was seen to hold, by channel: low and high, (C,), float32."""

    low: Tensor
    high: Tensor

    @classmethod
    def of_nothing(cls, channels: int) -> Range:
        return cls(torch.zeros(channels, dtype=torch.float32), torch.zeros(channels, dtype=torch.float32))

    def extend(self, rows: Tensor) -> None:
        """Take in more of it, (..., C)."""
        flat = rows.reshape(-1, rows.shape[-1]).float()
        self.low, self.high = torch.minimum(self.low, flat.amin(0)), torch.maximum(self.high, flat.amax(0))

    def quantised(self) -> tuple[Tensor, Tensor]:
        r"""(step, zero), both (C,): q = round(x / step) + zero in 0 ... 255.

        ``step = max(r)^(1 - a) r^a / 255`` with r the channels' ranges: with a = 0 all channels share a step, with a = 1 each uses all of
        the 8 bits, and the weights, which take the steps in, need more of theirs.
        """
        reach = (self.high - self.low).clamp_min(1e-6)
        step = reach.max() ** (1 - BALANCE) * reach**BALANCE / 255
        return step, (-self.low / step).round().clamp(0, 255)


class Weights:
    """Packed weights of one network and dtype, shared by its programs: each is packed once."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.packed: dict[Any, tuple[Any, ...]] = {}

    def pack(self, weight: Tensor) -> Tensor:
        key = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)
        if key not in self.packed:
            # with the weight, whose address is then nobody else's
            self.packed[key] = arrange(weight, self.dtype), weight
        return self.packed[key][0]

    def quantise(self, weight: Tensor, of: Range) -> tuple[Tensor, ...]:
        r"""Packed int8 weights, the scale of their integer sums, and what a bias must have added, for an input quantised as ``of``.

        ``sum_c w_c x_c = scale (sum_c v_c q_c - sum_c v_c zero_c)`` with ``v = round(w step / scale)`` and, for every output,
        ``scale = max |w step| / 127``.
        """
        key = (weight.data_ptr(), weight.shape, weight.stride(), id(of))
        if key not in self.packed:
            step, zero = of.quantised()
            stepped = weight.float() * step[:, None, None]
            scale = stepped.abs().amax((1, 2, 3)).clamp_min(1e-30) / 127
            whole = (stepped / scale[:, None, None, None]).round()
            # whole numbers, exact in float64 whatever the order
            zeros = (whole.double().sum((2, 3)) * zero.double()).sum(1)
            self.packed[key] = arrange(whole, torch.uint8), scale, (-scale * zeros).float(), weight, of
        return self.packed[key][:3]


def arrange(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A convolution's weights (Cout, Cin, k, k) as cf_convolution_args wants them."""
    lanes, width = 4 // BYTES[dtype], library.vector_width()
    outputs, channels, *kernel = weight.shape
    taps, vectors, quads = kernel[0] * kernel[1], -(-outputs // width), -(-channels // lanes)
    rows = torch.zeros(vectors * width, taps, quads * lanes, dtype=torch.int8 if dtype == torch.uint8 else dtype)
    rows[:outputs, :, :channels] = weight.permute(0, 2, 3, 1).reshape(outputs, taps, channels)
    split = rows.view(vectors, width, taps, quads, lanes)
    blocks = -(-vectors // (4 if width == 16 else 3))
    least, larger = divmod(vectors, blocks)
    sizes = [least + (block < larger) for block in range(blocks)]
    return torch.cat([part.permute(2, 3, 0, 1, 4).reshape(-1) for part in split.split(sizes)])
