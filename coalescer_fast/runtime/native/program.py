"""A recorded network on the CPU as native steps over one piece of memory, run in a single call (csrc/cpu/network.h).

It is arranged for one batch and size: a value that 3x3 convolutions read gets a border of zeros where it is written, and memory is used
again as soon as nobody reads it any more.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ...ops import library
from .pack import Range, Weights
from .record import (
    ATTENTION,
    BYTES,
    CONVOLUTION,
    DUAL_HEAD,
    GATE,
    GATHER,
    GROUP_NORM_SILU,
    LAYER_NORM,
    POINTWISE,
    REPLACE_ZERO_ROWS,
    Recorder,
    Step,
    Unsupported,
    Value,
)

ALIGNMENT = 64
CODES = {torch.float32: 0, torch.bfloat16: 2, torch.uint8: 3, torch.bool: 3}
# The arguments of the kinds of steps, in their order, as csrc/abi.h has them.
ARGUMENTS = {
    "convolution": struct.Struct("26q"),
    "group_norm_image": struct.Struct("24qd8q"),
    "gather": struct.Struct("24q"),
    "attention": struct.Struct("20qd"),
    "dual_head": struct.Struct("35q"),
    "layer_norm": struct.Struct("7qd"),
    "gate": struct.Struct("7q"),
    "pointwise": struct.Struct("6q4d"),
    "replace_zero_rows": struct.Struct("5q"),
}
STEP, PROGRAM = struct.Struct("2q"), struct.Struct("3q")


class Program:
    """A recorded network, arranged: call `run` after writing to ``inputs``, then read ``outputs``, all of them tensors in its memory.

    ranges: of normalisations' results, by their number among these, that are to have 8 bits, for convolutions that multiply these.
    keep: every value stays in memory until the next run, to be looked at by `observe`.
    """

    def __init__(
        self,
        recorder: Recorder,
        outputs: Sequence[tuple[Value, Tensor]],
        weights: Weights,
        threads: int,
        ranges: dict[int, Range] | None = None,
        keep: bool = False,
    ):
        self.dtype, self.weights, self.threads = weights.dtype, weights, threads
        self.kept: list[Any] = []
        self.normalised = self._normalised(recorder.steps)
        self.ranges = {id(self.normalised[n]): each for n, each in (ranges or {}).items()}
        given = [value for value, _ in outputs]
        steps = self._arranged(recorder.steps, given)
        for value in recorder.inputs:
            value.dtype = value.dtype or self.dtype  # of one that no step reads
        with torch.inference_mode(False):  # written to by calls in any mode
            self.memory = torch.empty(self._place(steps, recorder.inputs, given, keep) + ALIGNMENT, dtype=torch.uint8)
        base = -(-self.memory.data_ptr() // ALIGNMENT) * ALIGNMENT
        for value in {v for step in steps for v in step.all} | {*recorder.inputs}:
            value.address += base
        self.inputs = [self._tensor(value, cast(Tensor, value.tensor)) for value in recorder.inputs]
        self.outputs = [self._tensor(value, tensor) for value, (_, tensor) in zip(given, outputs)]
        packers = (
            *(self._convolution, self._group_norm_silu, self._gather, self._attention, self._dual_head),
            *(self._layer_norm, self._gate, self._pointwise, self._replace_zero_rows),
        )
        table = b"".join(STEP.pack(step.kind, self._keep(packers[step.kind](step))) for step in steps)
        self.arguments = PROGRAM.pack(self._keep(table), len(steps), threads)
        self.call = library.function("cf_cpu_run")
        self.bound: object = None  # what was last written to all inputs but the first
        for value in {v for step in (*recorder.steps, *steps) for v in step.all}:
            value.step, value.readers = None, []  # no cycle keeps the weights

    def run(self) -> None:
        self.call(self.arguments)

    def _keep(self, data: bytes | Tensor) -> int:
        """Its address, for as long as the program lives."""
        if isinstance(data, Tensor):
            self.kept.append(data)
            return data.data_ptr()
        self.kept.append(ctypes.create_string_buffer(data, len(data)))
        return ctypes.addressof(self.kept[-1])

    def observe(self, ranges: dict[int, Range]) -> None:
        """Extend the ranges by what the last run has left, of a program that keeps it."""
        for n, value in self.normalised.items():
            at, b = value.address - self.memory.data_ptr(), value.border
            image = (
                self.memory[at : at + value.bytes]
                .view(value.dtype)
                .view(value.n, value.height + 2 * b, value.width + 2 * b, -1)
            )
            rows = image[:, b : b + value.height, b : b + value.width]
            ranges.setdefault(n, Range.of_nothing(value.channels)).extend(rows)

    @staticmethod
    def _normalised(steps: list[Step]) -> dict[int, Value]:
        """What 3x3 convolutions alone read, and may have in 8 bits, of the results of normalisations, by their number among these."""
        norms = [step.y for step in steps if step.kind == GROUP_NORM_SILU]
        return {
            n: y
            for n, y in enumerate(norms)
            if y.channels % 4 == 0
            and y.readers
            and all(r.kind == CONVOLUTION and r.attributes["weight"].shape[2] == 3 for r in y.readers)
        }

    def _arranged(self, steps: list[Step], outputs: list[Value]) -> list[Step]:
        """The steps with dtypes and borders chosen, and one more where a value has to be copied to have those that a step needs."""
        for value in outputs:
            while value.step is not None and value.step.kind in (CONVOLUTION, DUAL_HEAD, POINTWISE, REPLACE_ZERO_ROWS):
                value.dtype = torch.float32
                if value.step.kind in (CONVOLUTION, DUAL_HEAD):
                    break
                value = value.step.read[0]
        for step in steps:
            for value in step.read:
                value.dtype = value.dtype or self.dtype
            # a function of what is float32 is so, too
            wide = step.kind == POINTWISE and step.read[0].dtype == torch.float32
            for value in step.all:
                value.dtype = value.dtype or (
                    torch.uint8 if id(value) in self.ranges else torch.float32 if wide else self.dtype
                )
        done: list[Step] = []
        copies: dict[Any, Value] = {}

        def copied(value: Value, dtype: torch.dtype, border: int = 0, padded: int = 0) -> Value:
            key = id(value), dtype, border, padded
            if key not in copies:
                copy = Value(
                    value.n,
                    value.height,
                    value.width,
                    value.channels,
                    dtype,
                    border=border,
                    padded=padded or value.channels,
                )
                copy.step = Step(GATHER, copy, [value], {"factor": 1})
                copies[key] = copy
                done.append(copy.step)
            return copies[key]

        for step in steps:
            if step.kind == CONVOLUTION:
                step.reads[0] = self._multiplied(step, outputs, copied)
            if step.kind in (POINTWISE, REPLACE_ZERO_ROWS):
                wanted = torch.float32 if step.kind == REPLACE_ZERO_ROWS else step.y.dtype
                if step.y.dtype != wanted:
                    raise Unsupported(f"it replaces rows of zeros in {self.dtype}")
                if step.read[0].dtype != wanted:
                    step.reads[0] = copied(step.read[0], wanted)
            if (
                step.kind in (CONVOLUTION, POINTWISE)
                and (residual := step.reads[1]) is not None
                and residual.dtype != step.y.dtype
            ):
                step.reads[1] = copied(residual, step.y.dtype)
            # what of the others' has to be of the program's dtype
            for n in range({GROUP_NORM_SILU: 2, LAYER_NORM: 1, GATE: 1, ATTENTION: 3}.get(step.kind, 0)):
                if (read := step.reads[n]) is not None and read.dtype != self.dtype:
                    if step.kind == ATTENTION:
                        raise Unsupported(f"it attends to what is given as {read.dtype}")
                    step.reads[n] = copied(read, self.dtype)
            done.append(step)
        for n, value in enumerate(outputs):
            if value.dtype != torch.float32:
                outputs[n] = copied(value, torch.float32)
        return done

    def _multiplied(self, step: Step, outputs: list[Value], copied: Callable[..., Value]) -> Value:
        """What a convolution reads: its input as it is, if it can have the border and the channels that are needed, or a copy."""
        source, wide, lanes = step.read[0], step.attributes["weight"].shape[2] == 3, 4 // BYTES[self.dtype]
        padded = -(-source.channels // lanes) * lanes
        writer = None if source.step is None else source.step.kind
        if wide and writer in (CONVOLUTION, GROUP_NORM_SILU, GATHER) and source not in outputs:
            source.border = int(all(reader.kind in (CONVOLUTION, GATHER) for reader in source.readers))
        if writer == GATHER and len(source.readers) == 1 and source not in outputs:
            source.padded = padded
        if source.dtype in (self.dtype, torch.uint8) and source.padded % lanes == 0 and (source.border or not wide):
            return source
        return copied(source, self.dtype, int(wide), padded)

    def _place(self, steps: list[Step], inputs: list[Value], outputs: list[Value], keep: bool) -> int:
        """Give every value an address, from 0 on, where no other value lies that is still read; returns how many bytes they need."""
        first: dict[Value, int] = dict.fromkeys(inputs, -1)
        last: dict[Value, int] = dict.fromkeys([*inputs, *outputs], len(steps))
        for n, step in enumerate(steps):
            for value in step.all:
                first.setdefault(value, n)
                last[value] = max(last.get(value, n), len(steps) if keep else n)
        total = 0
        live: list[tuple[int, int, int]] = []  # address, end, last
        for value in sorted(first, key=lambda value: first[value]):
            live = sorted(entry for entry in live if entry[2] >= first[value])
            size, at = -(-value.bytes // ALIGNMENT) * ALIGNMENT, 0
            for begin, end, _ in live:
                if at + size <= begin:
                    break
                at = max(at, end)
            value.address = at
            live.append((at, at + size, last[value]))
            total = max(total, at + size)
        return total

    def _tensor(self, value: Value, like: Tensor) -> Tensor:
        """An input's or output's memory, or the part of it that was recorded."""
        at = value.address - self.memory.data_ptr()
        with torch.inference_mode(False):
            flat = self.memory[at : at + value.bytes].view(value.dtype)
            return flat.as_strided(like.shape, like.stride(), flat.storage_offset() + like.storage_offset())

    # The arguments of the steps, as csrc/abi.h has them.

    def _vector(self, v: Tensor | None) -> tuple[int, int]:
        if v is None:
            return 0, 0
        v = v if v.dtype in library.DTYPES else v.float()
        return self._keep(v.contiguous()), library.DTYPES[v.dtype]

    @staticmethod
    def _image(value: Value | None) -> tuple[int, ...]:
        if value is None:
            return (0,) * 5
        return value.address, CODES[value.dtype], value.row, value.n and value.bytes // value.n, value.border

    @staticmethod
    def _tensor4(value: Value | None) -> tuple[int, ...]:
        """A value without its border, as (n, c, y, x)."""
        if value is None:
            return (0,) * 6
        size = BYTES[value.dtype]
        strides = value.bytes // value.n // size, 1, value.row // size, value.padded
        if value.tensor is not None and value.tensor.ndim == 4:
            strides = tuple(value.tensor.stride())  # type: ignore[assignment]
        return value.address + value.border * (value.row + value.pixel), CODES[value.dtype], *strides

    def _convolution(self, step: Step) -> bytes:
        x, residual = step.reads
        assert x is not None
        weight, bias, y = step.attributes["weight"], step.attributes["bias"], step.y
        scale = None
        if x.dtype == torch.uint8:
            packed, scale, added = self.weights.quantise(weight, self.ranges[id(x)])
            bias = added if bias is None else bias.float() + added
        else:
            packed = self.weights.pack(weight)
        addresses = (
            0 if v is None else self._keep(v.contiguous())
            for v in (packed, None if bias is None else bias.float(), scale)
        )
        sizes = (
            y.n,
            y.height,
            y.width,
            x.padded,
            y.channels,
            weight.shape[2] ** 2,
            step.attributes["stride"],
            step.attributes["relu"],
        )
        return ARGUMENTS["convolution"].pack(
            *self._image(x), *self._image(residual), *self._image(y), *addresses, *sizes
        )

    def _group_norm_silu(self, step: Step) -> bytes:
        (x, skip, scale, shift), a, y = step.reads, step.attributes, step.y
        assert x is not None
        c2 = 0 if skip is None else skip.channels
        head = x.address, 0 if skip is None else skip.address, 0, CODES[x.dtype], 1
        sizes = x.n, x.channels, c2, x.height * x.width, a["num_groups"], a["activation"] == "silu"
        vectors = (field for name in ("weight", "bias", "pre_bias") for field in self._vector(a[name]))
        film = (field for v in (scale, shift) for field in ((0, 0, 0) if v is None else (v.address, 0, v.channels)))
        inverse = zero = 0
        if y.dtype == torch.uint8:
            step_size, offset = self.ranges[id(y)].quantised()
            inverse, zero = self._keep(1 / step_size), self._keep(offset.to(torch.uint8))
        return ARGUMENTS["group_norm_image"].pack(
            *head, *sizes, *vectors, *film, self.threads, a["eps"], *self._image(y), y.width, inverse, zero
        )

    def _gather(self, step: Step) -> bytes:
        parts = [*step.reads, None][:2]
        channels = [0 if part is None else part.channels for part in parts]
        y = step.y
        fields = *self._tensor4(parts[0]), *self._tensor4(parts[1]), *channels, *self._image(y)
        return ARGUMENTS["gather"].pack(*fields, y.n, y.height, y.width, y.padded, step.attributes["factor"])

    def _attention(self, step: Step) -> bytes:
        a, size = step.attributes, BYTES[self.dtype]
        if a["width"] * size % 4:
            raise Unsupported(f"its attention has heads of width {a['width']}")
        heads: list[int] = []
        for name, value in zip("qkv", step.read):
            offset, *strides = a[name]
            heads += [value.address + offset * size, *strides]
        mask, sizes = step.reads[3], (step.y.n, a["heads"], a["length"], a["k_length"], a["width"])
        addresses = 0 if mask is None else mask.address, step.y.address
        return ARGUMENTS["attention"].pack(*heads, *addresses, CODES[self.dtype], *sizes, a["width"] ** -0.5)

    def _layer_norm(self, step: Step) -> bytes:
        (x,), a = step.read, step.attributes
        vectors = (self._keep(a[name].float().contiguous()) for name in ("weight", "bias"))
        return ARGUMENTS["layer_norm"].pack(
            x.address, step.y.address, CODES[self.dtype], x.count // x.channels, x.channels, *vectors, a["eps"]
        )

    def _gate(self, step: Step) -> bytes:
        (x,), size = step.read, BYTES[self.dtype]
        value, gate = (x.address + step.attributes[name] * size for name in ("value", "gate"))
        return ARGUMENTS["gate"].pack(
            value, gate, step.y.address, CODES[self.dtype], x.count // x.channels, step.y.channels, x.channels
        )

    def _pointwise(self, step: Step) -> bytes:
        (x, residual), a, y = step.reads, step.attributes, step.y
        assert x is not None
        addresses = x.address, 0 if residual is None else residual.address, y.address
        scales = (a[name] for name in ("x_scale", "x_shift", "y_scale", "y_shift"))
        return ARGUMENTS["pointwise"].pack(*addresses, CODES[y.dtype], y.count, a["function"], *scales)

    def _replace_zero_rows(self, step: Step) -> bytes:
        (x,) = step.read
        row = self._keep(step.attributes["row"].float().contiguous())
        return ARGUMENTS["replace_zero_rows"].pack(x.address, row, step.y.address, x.count // x.channels, x.channels)

    def _dual_head(self, step: Step) -> bytes:
        h, sample, anchor = step.reads
        assert h is not None
        assert step.also is not None
        a = step.attributes
        weight = a["direction_weight"].to(self.dtype).permute(0, 2, 3, 1).contiguous()
        vectors = (
            field
            for v in (weight, a["direction_bias"], a["distance_weight"].flatten(), a["distance_bias"])
            for field in self._vector(v)
        )
        head = h.address, CODES[h.dtype], h.n, h.channels, step.y.channels, h.height, h.width
        tensors = *self._tensor4(sample), *self._tensor4(anchor), *self._tensor4(step.y)
        return ARGUMENTS["dual_head"].pack(*head, *vectors, *tensors, step.also.address, self.threads)
