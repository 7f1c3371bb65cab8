"""How each convolution of a program is computed: direct, or by Winograd's F(2x2, 3x3) or F(4x4, 3x3).

Winograd's forms need 2.25 and 4 times fewer multiplications, and weights that are 16/9 and 4 times as large: of float32
also float32, of bfloat16 16-bit integers (csrc/cpu/winograd.h). Which form is the fastest depends on the size of the
image, the channels, the dtype and the instruction set. forms.csv has the measured speeds, made by ``python -m
benchmarks.kernels.forms``. It never depends on the batch, so that neither do the bits of an output.

Where the fastest forms of all convolutions would take more memory than allowed, those get them that save the most time
for a byte.
"""

from __future__ import annotations

import csv
import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ...dtypes import dtype_name
from ...ops import native_library
from ...ops.abi import cf_form
from .pack import Weights
from .record import Recording
from .steps import Convolution, Gather

# What Winograd's weights may take beyond direct ones if nothing is said: this much, or two fifths of all weights if
# that is more.
MEMORY = 512 << 20


class Speed(NamedTuple):
    """A row of forms.csv: GFLOP/s, counted as those of the direct form, of a convolution of images of ``positions``."""

    positions: int
    channels: int
    gflops: float


def allowed_memory(given: int | None, weights: int) -> int:
    """The bytes that Winograd's weights may take beyond direct ones.

    Args:
        given: by the user, or None.
        weights: bytes of direct ones.
    """
    return max(MEMORY, 2 * weights // 5) if given is None else given


@functools.cache
def speeds(isa: str, dtype: str) -> dict[cf_form, list[Speed]]:
    """What was measured for this instruction set and dtype of images; nothing for those that were not."""
    found: dict[cf_form, list[Speed]] = {}
    with (Path(__file__).parent / "forms.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["isa"], row["dtype"]) == (isa, dtype):
                speed = Speed(int(row["positions"]), int(row["channels"]), float(row["gflops"]))
                found.setdefault(cf_form[row["form"]], []).append(speed)
    return found


def seconds(form: cf_form, dtype: str, positions: int, channels: int, outputs: int) -> float:
    """How long a convolution of one image takes, by the measured one most like it; infinite if there is none."""
    width = math.sqrt(channels * outputs)

    def distance(speed: Speed) -> float:
        return abs(math.log2(speed.positions / positions)) + abs(math.log2(speed.channels / width))

    measured = speeds(native_library.isa(), dtype).get(form)
    if not measured:
        return math.inf
    return 18e-9 * positions * channels * outputs / min(measured, key=distance).gflops


def weight_bytes(form: cf_form, dtype: str, channels: int, outputs: int) -> int:
    """Bytes of packed weights: of bfloat16 images, Winograd's are int16."""
    size = {"float32": 4, "bfloat16": 2, "uint8": 1}[dtype]
    return channels * outputs * size * (9 if form == cf_form.CF_DIRECT else (form + 2) ** 2)


def choose_forms(recording: Recording, weights: Weights, in_uint8: Collection[Convolution] = ()) -> str:
    """Choose the form of each convolution, and let those of Winograd do nearest upsamplings to twice the size.

    Args:
        recording: whose steps change; dtypes need not be chosen.
        weights: where its weights are packed.
        in_uint8: the convolutions that multiply in 8 bits if they are direct.

    Returns:
        How many have which form, and why the others are direct, for `explain`.
    """
    dtype = dtype_name(weights.dtype)
    options: list[tuple[float, int, int, cf_form]] = []  # time saved, bytes, number of the convolution, form
    direct_bytes = 0
    convolutions = [step for step in recording.steps if isinstance(step, Convolution)]
    for number, step in enumerate(convolutions):
        channels, outputs = step.x.channels, step.weight.shape[0]
        direct = "uint8" if step in in_uint8 else dtype
        size = weight_bytes(cf_form.CF_DIRECT, direct, channels, outputs) // (1 if step.wide else 9)
        direct_bytes += size
        if not step.can_be_winograd:
            continue
        positions = step.y.height * step.y.width
        time = seconds(cf_form.CF_DIRECT, direct, positions, channels, outputs)
        for form in (cf_form.CF_WINOGRAD_2, cf_form.CF_WINOGRAD_4):
            saved = time - seconds(form, dtype, positions, channels, outputs)
            if saved > 0:
                extra = weight_bytes(form, dtype, channels, outputs) - size
                options.append((saved, extra, number, form))
    left = allowed_memory(weights.winograd_memory, direct_bytes)
    taken: dict[int, tuple[float, int]] = {}
    for saved, extra, number, form in sorted(options, key=lambda each: (-each[0] / each[1], each[2])):
        saved_before, extra_before = taken.get(number, (0.0, 0))
        if saved > saved_before and extra - extra_before <= left:
            left -= extra - extra_before
            taken[number], convolutions[number].form = (saved, extra), form
    for step in convolutions:
        step.form = weights.form(step.weight, step.form, step in in_uint8)
        if step.form != cf_form.CF_DIRECT:
            _double_inside(recording, step)
    faster = {convolutions[number] for _, _, number, _ in options}

    def because(step: Convolution) -> str:
        if not step.can_be_winograd:
            return "strided"
        if weights.is_freed(step.weight.name):
            return "as packed before"
        return "by the memory limit" if step in faster else "by measured speed"

    return _described(convolutions, because, dtype)


def _double_inside(recording: Recording, step: Convolution) -> None:
    """Let a convolution read an image that is doubled before it as it was."""
    doubled = step.x
    upsampling = doubled.step
    alone = doubled.readers == [step] and all(doubled is not output for output, _ in recording.outputs)
    if isinstance(upsampling, Gather) and upsampling.doubles and alone:
        x = upsampling.x
        step.x, step.doubling = x, True
        x.readers = [step if reader is upsampling else reader for reader in x.readers]
        recording.steps = [each for each in recording.steps if each is not upsampling]
        doubled.step, doubled.readers = None, []  # no cycle of what is gone


def _described(convolutions: Iterable[Convolution], because: Callable[[Convolution], str], dtype: str) -> str:
    """How many 3x3 convolutions have which form, and why the direct ones are; "" if there are none.

    Args:
        convolutions: of all sizes, with their forms.
        because: why one is direct.
        dtype: of a program's images.
    """
    wide = [step for step in convolutions if step.wide]
    made = [step for step in wide if step.form != cf_form.CF_DIRECT]
    of_form = Counter(f"F({int(step.form)}x{int(step.form)})" for step in made)
    reasons = Counter(because(step) for step in wide if step.form == cf_form.CF_DIRECT)
    parts = []
    if made:
        size = sum(weight_bytes(step.form, dtype, step.x.channels, step.weight.shape[0]) for step in made)
        words = f"{_listed(of_form)}; weights {f'{size >> 20} MiB' if size >> 20 else f'{size >> 10} KiB'}"
        parts.append(f"{len(made)} of {len(wide)} 3x3 convolutions by Winograd ({words})")
    if direct := len(wide) - len(made):
        parts.append(f"{direct} {'' if made else '3x3 convolutions '}direct ({_listed(reasons)})")
    return ", ".join(parts)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
