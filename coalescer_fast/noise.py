"""Normal noise from a counter: the same for a seed on every machine and in a browser, whatever is drawn beside it."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .schema import shown

WORD = 2**32
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by from round to round
ROUNDS = 10


class PhiloxGenerator:
    r"""A generator for ``generator=`` of a `CoalescerPipeline`, in the place of a torch.Generator.

    Picture p of seed s has the normal numbers that Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", 2011) and Box and Muller's transform give::

        (u0, u1, u2, u3) = philox(counter=(j, 0, p mod 2^32, p div 2^32), key=(s mod 2^32, s div 2^32)),  j = 0, 1, ...
        r = sqrt(-2 ln v0),  t = 2 pi v1,  v = (u + 0.5) / 2^32
        z[4j] = r cos t,  z[4j + 1] = r sin t,  and z[4j + 2], z[4j + 3] of u2, u3 in the same way

    in float64, rounded to float32. The page of ``coalescer-export web`` draws the same numbers. No picture depends on
    another: picture 7 of a call is also the first one of ``PhiloxGenerator(seed, picture=7)``.

    Each picture that is drawn advances ``picture`` by one, so that a second call draws others.

    Args:
        seed: from 0 up to 2^64 - 1.
        picture: number of the next picture, from 0 up to 2^64 - 1.

    Raises:
        ValueError: for other numbers.
    """

    def __init__(self, seed: int, picture: int = 0):
        self.seed = _uint64("seed", seed)
        self.picture = _uint64("picture", picture)

    def normal(self, count: int) -> NDArray[np.float32]:
        """Draw the ``count`` numbers of the next picture, (count,)."""
        drawn = normal(self.seed, self.picture, _uint64("count", count))
        self.picture = (self.picture + 1) % WORD**2
        return drawn

    def __repr__(self) -> str:
        return f"PhiloxGenerator({self.seed}, picture={self.picture})"


def normal(seed: int, picture: int, count: int) -> NDArray[np.float32]:
    """The first ``count`` normal numbers of a picture, (count,), see `PhiloxGenerator`."""
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    counter = np.zeros((4, len(blocks)), dtype=np.uint64)
    counter[0] = blocks
    counter[2], counter[3] = picture % WORD, picture // WORD
    v = (philox(counter, (seed % WORD, seed // WORD)) + np.float64(0.5)) / np.float64(WORD)
    radius, angle = np.sqrt(-2 * np.log(v[0::2])), 2 * np.pi * v[1::2]  # (2, blocks) each
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)  # [pair, cos or sin, block]
    return z.reshape(4, -1).T.reshape(-1)[:count].astype(np.float32)


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10 of counters (4, N) of 32-bit words, to as many words."""
    mask = np.uint64(WORD - 1)
    shift = np.uint64(32)
    a, b, c, d = counter
    left, right = key
    for _ in range(ROUNDS):
        first, second = a * np.uint64(MULTIPLIERS[0]), c * np.uint64(MULTIPLIERS[1])
        a, b, c, d = (
            (second >> shift) ^ b ^ np.uint64(left),
            second & mask,
            (first >> shift) ^ d ^ np.uint64(right),
            first & mask,
        )
        left, right = (left + WEYL[0]) % WORD, (right + WEYL[1]) % WORD
    return np.stack([a, b, c, d])


def draw(generators: list[PhiloxGenerator], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Draw a picture of each generator, in order: ``shape`` (N, ...) for N of them, float32."""
    count = int(np.prod(shape[1:]))
    rows = np.stack([one.normal(count) for one in generators]) if generators else np.zeros((0, count), np.float32)
    return torch.from_numpy(rows).view(shape).to(device)


def _uint64(name: str, value: Any) -> int:
    number = -1 if isinstance(value, bool) or not hasattr(value, "__index__") else operator.index(value)
    if not 0 <= number < WORD**2:
        raise ValueError(f"{name} is {shown(value)}; expected a whole number from 0 up to 2^64 - 1")
    return number
