"""Values: what the steps of a program read and write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ops.abi import cf_dtype

if TYPE_CHECKING:
    from .steps import Step

BALANCE = 0.5  # see Range.quantisation
# The dtypes that a value can have, and their bytes; a bool is a byte that is 0 or 1.
BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.uint8: 1, torch.bool: 1}
CODES = {
    torch.float32: cf_dtype.CF_FLOAT32,
    torch.bfloat16: cf_dtype.CF_BFLOAT16,
    torch.uint8: cf_dtype.CF_UINT8,
    torch.bool: cf_dtype.CF_UINT8,
}


class Unsupported(Exception):
    """A module does something that no step does; the message says what."""


@dataclass
class Range:
    """The lowest and highest numbers that a value was seen to hold, by channel.

    Attributes:
        low: (C,), float32, at most 0.
        high: (C,), float32, at least 0.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def empty(cls, channels: int) -> Range:
        """The range of a value that nothing was seen of."""
        return cls(torch.zeros(channels, dtype=torch.float32), torch.zeros(channels, dtype=torch.float32))

    def extend(self, rows: Tensor) -> None:
        """Include what the value holds now, (..., C)."""
        flat = rows.reshape(-1, rows.shape[-1]).float()
        self.low, self.high = torch.minimum(self.low, flat.amin(0)), torch.maximum(self.high, flat.amax(0))

    def include(self, other: Range) -> None:
        """Include another range."""
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)

    def quantisation(self) -> tuple[Tensor, Tensor]:
        r"""Step size and zero point of each channel, for ``q = round(x / step) + zero`` in 0 ... 255.

        ``step = max(r)^(1 - a) r^a / 255`` with r the channels' ranges and a = `BALANCE`. With a = 0 all channels share
        one step size. With a = 1 each channel uses all 8 bits, but the weights, which are multiplied by the step sizes,
        then have a wider range and lose bits of theirs. The zero point has the middle of a range at the middle of
        0 ... 255, so that most channels can hold more than was seen of them.

        Returns:
            (step, zero), both (C,), float32.
        """
        reach = (self.high - self.low).clamp_min(1e-6)
        step = reach.max() ** (1 - BALANCE) * reach**BALANCE / 255
        return step, (127.5 - (self.low + self.high) / (2 * step)).round().clamp(0, 255)


@dataclass(eq=False)
class Value:
    """Images (n, height, width, channels) in a program's memory, channels innermost.

    Rows of vectors are images, too: tokens (n, length, channels) have height 1 and width ``length``.

    Attributes:
        n: samples.
        height: positions, without the border.
        width: likewise.
        channels: those that mean something, see ``padded``.
        dtype: None until the program chooses it.
        tensor: of an input of the program, its shape and strides as a caller sees it; it has no data.
        strides: of one whose channels are not innermost, as (n, channels, height, width); a `Gather` alone reads it.
        step: the step that writes it, None for an input of the program.
        readers: the steps that read it.
        border: positions of zeros on every side of an image, 0 or 1, so that a 3x3 convolution reads no other memory.
        padded: channels in memory: those after ``channels`` are zeros, so that a convolution reads whole groups of 4
            bytes. 0 in the constructor stands for ``channels``.
        range: of uint8, what its float numbers may be; see `Range.quantisation`.
        address: where it begins, its border included.
    """

    n: int
    height: int
    width: int
    channels: int
    dtype: torch.dtype | None = None
    tensor: Tensor | None = None
    strides: tuple[int, ...] | None = None
    step: Step | None = None
    readers: list[Step] = field(default_factory=list)
    border: int = 0
    padded: int = 0
    range: Range | None = None
    address: int = 0

    def __post_init__(self) -> None:
        self.padded = self.padded or self.channels

    def like(self, channels: int | None = None) -> Value:
        """A new value of this size, and of this number of channels unless another is given."""
        return Value(self.n, self.height, self.width, self.channels if channels is None else channels)

    @property
    def rows(self) -> int:
        """Vectors of ``channels`` numbers."""
        return self.n * self.height * self.width

    @property
    def count(self) -> int:
        """Numbers, without border and padding."""
        return self.rows * self.channels

    @property
    def code(self) -> cf_dtype:
        """The dtype in csrc/abi.h."""
        assert self.dtype is not None
        return CODES[self.dtype]

    @property
    def element_bytes(self) -> int:
        assert self.dtype is not None
        return BYTES[self.dtype]

    @property
    def pixel_bytes(self) -> int:
        return self.padded * self.element_bytes

    @property
    def row_bytes(self) -> int:
        return (self.width + 2 * self.border) * self.pixel_bytes

    @property
    def sample_bytes(self) -> int:
        return (self.height + 2 * self.border) * self.row_bytes

    @property
    def bytes(self) -> int:
        return self.n * self.sample_bytes
