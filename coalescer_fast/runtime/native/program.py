"""Programs: the steps of a module with memory laid out, run by the CPU library in a single call (csrc/cpu).

    program = compile_module(module, [x], torch.bfloat16)
    (y,) = program(x)

A program is made for one batch size, one size of images and one number of threads. Making it takes little time beside
packing the weights, which all programs of a module share (`Weights`). What has to be decided is where the values lie:

**Dtypes** (`Layout`). A program has one dtype, float32 or bfloat16, which values have where nothing else is said.
Inputs are float32, and so are outputs: from each output we go back to the first step that can write float32 whatever it
reads, so that a result is not rounded. In an int8 program convolutions and linear layers multiply integers where
`Convolution.reads_uint8` says so. What they read is uint8: if nobody else reads it, the step that writes it quantises
it, once for all of them; else a copy does.

**Borders** (`Step.lay_out`). At the edge of an image, a 3x3 convolution reads zeros beyond it. A test for the edge
would stand in the innermost loop, so an image that 3x3 convolutions read has a border of zeros in memory, which the
step that writes the image writes, too. Where this cannot be, as with an input, or with an image that is also read by a
step that does not skip borders, a `Gather` makes a copy that has one. Padding does the same for channels: kernels read
groups of 4 bytes, so 3 channels of bfloat16 become 4.

**Memory** (`place`). All values lie in one piece of memory. After the last step that reads a value, its place is free
for others, which keeps the memory small, and much of it in the caches. Inputs and outputs share their places with
nobody: what a caller writes to an input stays there until he writes again.

The arguments of the steps hold addresses: of values, of packed weights, and of other parameters, which stay where the
module has them if their dtype and strides allow. A run allocates nothing and looks nothing up.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from typing import overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...ops import native_library
from ...ops.abi import cf_form, cf_program_args, cf_step
from .forms import choose_forms
from .pack import Key, Packer, Weights
from .record import MetaCopy, Recorder, Recording, record_module
from .steps import Convolution, Description, Gather, Step
from .value import Range, Value

ALIGNMENT = 64  # bytes, a cache line
# What products read, by their weights. Those that read one value share its range.
Ranges = dict[Key, Range]
# Of a `ProgramCache`.
MOST_PROGRAMS = 32
MOST_BYTES = 2 << 30


def compile_module(
    module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype = torch.float32, weights: Weights | None = None
) -> Program:
    """Make a program of what a module computes, for inputs of these shapes.

    The module is left as it is. After a change of its parameters, make the program anew.

    Args:
        module: any module whose forward takes these tensors and does what there are steps for.
        inputs: examples of the tensors that it is given. What they hold does not matter.
        dtype: of weights and activations, one that `native_library.products` has. Inputs and outputs are float32.
        weights: those of the module's other programs of this dtype, to share packed weights with them.

    Raises:
        Unsupported: no step does something that the module does.
        RuntimeError: there is no CPU library.
    """

    def run(copied: nn.Module, recorder: Recorder) -> list[Tensor]:
        return tree_leaves(copied(*map(recorder.given, inputs)))

    recording = record_module(MetaCopy(module), run)
    return Program(recording, weights or Weights(dtype), torch.get_num_threads())


class Program:
    """A recorded module, ready to run.

    Attributes:
        inputs: tensors in the program's memory: write to them, call `run`.
        outputs: likewise, to be read after `run`; the next run writes to them.
        memory: of all values.
        products: how many convolutions and linear layers it has.
        quantised: how many of them multiply in 8 bits.
        prologue: makes the inputs of what the module is given.
        bound: whatever a caller notes of what he last wrote to the inputs.
    """

    def __init__(
        self,
        recording: Recording,
        weights: Weights,
        threads: int,
        ranges: Ranges | None = None,
    ):
        """Choose dtypes, lay out memory, and pack weights and arguments.

        Args:
            recording: what the module does; no other program can be made of it.
            weights: the module's packed weights, of the program's dtype.
            threads: how many may be used.
            ranges: of the products that are to multiply in 8 bits.
        """
        convolutions = [step for step in recording.steps if isinstance(step, Convolution)]
        in_8_bits = [step for steps in _quantisable(recording, convolutions).values() for step in steps]
        in_uint8 = {step for step in convolutions if step.weight.key in (ranges or {})}
        self._forms = choose_forms(recording, weights, in_uint8)
        self._quantisable: dict[Value, list[Key]] = {}
        for step in in_8_bits:
            self._quantisable.setdefault(step.x, []).append(step.weight.key)
        for step in convolutions:
            if step.form == cf_form.CF_DIRECT:
                step.range = (ranges or {}).get(step.weight.key)
        self.products, self.quantised = len(convolutions), sum(step.range is not None for step in convolutions)
        layout = Layout(recording, weights.dtype)
        with torch.inference_mode(False):  # written to by calls in any mode
            size = place(layout.steps, recording.inputs, layout.outputs)
            self.memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        values = {value for step in layout.steps for value in step.values} | {*recording.inputs}
        base = -(-self.memory.data_ptr() // ALIGNMENT) * ALIGNMENT
        for value in values:
            value.address += base
        self.inputs = [self._tensor(value, value.tensor) for value in recording.inputs]
        self.outputs = [self._tensor(value, like) for value, (_, like) in zip(layout.outputs, recording.outputs)]
        self._descriptions = [step.describe() for step in layout.steps]
        packer = Packer(weights, threads)
        addresses = [(step.number, packer.keep(bytes(step.arguments(packer)))) for step in layout.steps]
        table = b"".join(cf_step.pack(kind=number, args=address) for number, address in addresses)
        self._table, self._count, self._threads = packer.keep(table), len(layout.steps), threads
        self._arguments = self._part(0, self._count)
        # of what `observe` looks at alone: there may be many programs
        written = {value: n for n, step in enumerate(layout.steps, 1) for value in step.outputs}
        self._written = {value: written[value] for value in self._quantisable if value in written}
        inputs = zip(recording.inputs, self.inputs)
        self._inputs = {value: tensor for value, tensor in inputs if value in self._quantisable}
        self._kept = packer.kept
        self._call = native_library.function("cf_cpu_run")
        self.prologue = recording.prologue
        self.bound: object = None
        # steps hold weights, and know each other by values: without these cycles all is freed with the program
        for value in {value for step in (*recording.steps, *layout.steps) for value in step.values}:
            value.step, value.readers = None, []

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs for what the module is given, float32, in memory of their own."""
        for mine, x in zip(self.inputs, self.prologue(inputs), strict=True):
            mine.copy_(x)
        self.run()
        return tuple(y.clone() for y in self.outputs)

    @property
    def memory_bytes(self) -> int:
        """Of its values."""
        return self.memory.numel()

    @property
    def described(self) -> str:
        """For `explain`: how many products multiply in 8 bits, the forms of 3x3 convolutions, and what torch does."""
        in_8_bits = f"{self.quantised} of {self.products} products in int8" if self.quantised else ""
        return "".join(f", {words}" for words in (in_8_bits, self._forms) if words) + self.prologue.described

    def run(self) -> None:
        """Compute ``outputs`` from ``inputs``."""
        self._call(self._arguments)

    def steps(self) -> list[tuple[Description, Callable[[], None]]]:
        """What each step does, and a function that runs it alone, on what the last run has left."""
        alone = [self._part(i, i + 1) for i in range(self._count)]
        # methods, so that whoever holds one holds the program and its memory
        return [(step, partial(self._run_alone, arguments)) for step, arguments in zip(self._descriptions, alone)]

    def _run_alone(self, arguments: bytes) -> None:
        self._call(arguments)

    def profile(self, rounds: int = 5) -> list[tuple[Description, float]]:
        """Measure every step alone, in the order in which they run.

        Each run of a step starts the threads anew, which `run` does once for all steps: short steps seem longer than
        they are.

        Args:
            rounds: through all steps.

        Returns:
            What each step does, and the median of the seconds that it took.
        """
        steps = self.steps()
        taken: list[list[float]] = [[] for _ in steps]
        for _ in range(rounds):
            for (_, run), seconds in zip(steps, taken):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
        return [(step, statistics.median(seconds)) for (step, _), seconds in zip(steps, taken)]

    def observe(self, ranges: Ranges) -> None:
        """`run`, and extend the ranges by every value that could be uint8, as soon as it is written.

        Args:
            ranges: those that are missing are added.
        """
        done = 0
        for value, keys in sorted(self._quantisable.items(), key=lambda entry: self._written.get(entry[0], 0)):
            until = self._written.get(value, 0)
            self._call(self._part(done, until))
            done = until
            shared = next((ranges[key] for key in keys if key in ranges), None) or Range.empty(value.channels)
            for key in keys:
                shared.include(ranges.setdefault(key, shared))
                ranges[key] = shared
            shared.extend(self._rows(value))
        self._call(self._part(done, self._count))

    def _part(self, begin: int, end: int) -> bytes:
        """The arguments that run these steps."""
        first = self._table + begin * ctypes.sizeof(cf_step)
        return cf_program_args.pack(steps=first, count=end - begin, threads=self._threads)

    def _rows(self, value: Value) -> Tensor:
        """What a value holds, channels last."""
        if value in self._inputs:
            given = self._inputs[value]
            return given.permute(0, 2, 3, 1) if given.ndim == 4 else given
        b = value.border
        image = self._flat(value).view(value.n, value.height + 2 * b, value.width + 2 * b, value.padded)
        return image[:, b : b + value.height, b : b + value.width, : value.channels]

    def _flat(self, value: Value) -> Tensor:
        """All that a value has in memory, in one dimension."""
        assert value.dtype is not None
        begin = value.address - self.memory.data_ptr()
        return self.memory[begin : begin + value.bytes].view(value.dtype)

    def _tensor(self, value: Value, like: Tensor | None) -> Tensor:
        """An input's or output's memory, or the part of it that was recorded."""
        assert like is not None
        with torch.inference_mode(False):
            flat = self._flat(value)
            return flat.as_strided(like.shape, like.stride(), flat.storage_offset() + like.storage_offset())


def _quantisable(recording: Recording, convolutions: Sequence[Convolution]) -> dict[Value, list[Convolution]]:
    """The values that products are to read in 8 bits, and these products."""
    found: dict[Value, list[Convolution]] = {}
    for step in convolutions:
        if step.reads_uint8:
            found.setdefault(step.x, []).append(step)
    outputs = {value for value, _ in recording.outputs}
    for value, steps in found.items():
        if value in outputs or not _is_written_in_8_bits(value, steps):
            found[value] = [step for step in steps if step.pays_for_a_copy]
    return {value: steps for value, steps in found.items() if steps}


def _is_written_in_8_bits(value: Value, products: Collection[Step]) -> bool:
    """Whether the step that writes a value can write it in 8 bits, which these products alone can read."""
    alone = all(
        isinstance(each, Convolution) and each in products and value not in (each.residual, each.row)
        for each in value.readers
    )
    bordered = any(isinstance(each, Convolution) and each.wide for each in value.readers)
    writer = value.step
    return alone and writer is not None and writer.writes_uint8 and (writer.writes_border or not bordered)


class ProgramCache:
    """The programs that were used last, by any key, up to `MOST_PROGRAMS` and `MOST_BYTES` of their memory."""

    def __init__(self) -> None:
        self.programs: OrderedDict[Hashable, Program] = OrderedDict()

    def get(self, key: Hashable) -> Program | None:
        found = self.programs.get(key)
        if found is not None:
            self.programs.move_to_end(key)
        return found

    def add(self, key: Hashable, program: Program) -> None:
        """Add a program, and drop those that were not used for longest; this one stays whatever memory it has."""
        self.programs[key] = program
        while len(self.programs) > 1 and (len(self.programs) > MOST_PROGRAMS or self._bytes() > MOST_BYTES):
            self.programs.popitem(last=False)

    @property
    def last(self) -> Program | None:
        """The program that was used last, or None."""
        return next(reversed(self.programs.values()), None)

    def _bytes(self) -> int:
        return sum(program.memory_bytes for program in self.programs.values())


class Layout:
    """The steps of a recording, with dtypes and borders chosen, and copies where a step cannot read a value as it is.

    Attributes:
        dtype: the program's.
        steps: the recorded steps, and the copies.
        outputs: the program's, in float32.
    """

    def __init__(self, recording: Recording, dtype: torch.dtype):
        self.dtype = dtype
        self.steps: list[Step] = []
        self.outputs = [value for value, _ in recording.outputs]
        self._copies: dict[Hashable, Value] = {}
        self._choose_uint8(recording)
        self._choose_dtypes(recording)
        for step in recording.steps:
            step.lay_out(self)
            self.steps.append(step)
        self.outputs = [self.in_dtype(value, torch.float32) for value in self.outputs]

    def _choose_uint8(self, recording: Recording) -> None:
        for value in {value for step in recording.steps for value in step.outputs} - set(self.outputs):
            products = [each for each in value.readers if isinstance(each, Convolution) and each.range is not None]
            if products and _is_written_in_8_bits(value, products):
                (one, *others) = {id(each.range): each.range for each in products}.values()
                value.range = None if others else one

    def _choose_dtypes(self, recording: Recording) -> None:
        for value in self.outputs:
            if value.readers:
                continue
            # A chain of element-wise steps is float32 from the step on that can write it.
            writer = value.step
            while writer is not None and (writer.widens or writer.elementwise):
                value.dtype = torch.float32
                if writer.widens:
                    break
                value = writer.inputs[0]
                writer = value.step
        for step in recording.steps:
            for value in step.inputs:
                value.dtype = value.dtype or self.dtype
            wide = step.elementwise and step.inputs[0].dtype == torch.float32
            for value in step.outputs:
                asked = step.widens and value.readers and all(each.wants_float32(value) for each in value.readers)
                chosen = torch.float32 if wide or asked else self.dtype
                value.dtype = value.dtype or (chosen if value.range is None else torch.uint8)
        for value in recording.inputs:  # that no step reads
            value.dtype = value.dtype or self.dtype

    @overload
    def in_dtype(self, value: Value, dtype: torch.dtype | None) -> Value: ...

    @overload
    def in_dtype(self, value: Value | None, dtype: torch.dtype | None) -> Value | None: ...

    def in_dtype(self, value: Value | None, dtype: torch.dtype | None) -> Value | None:
        """The value if it has this dtype, else a copy that has it."""
        return value if value is None or value.dtype == dtype else self.copy(value, dtype)

    def copy(
        self,
        value: Value,
        dtype: torch.dtype | None,
        border: int = 0,
        padded: int = 0,
        range: Range | None = None,
    ) -> Value:
        """A copy in this dtype, with a border, and with channels of zeros up to ``padded``. It is made once.

        Args:
            value: what is copied.
            dtype: of the copy.
            border: of the copy.
            padded: likewise.
            range: likewise, for uint8.
        """
        key = id(value), dtype, border, padded, id(range)
        if key not in self._copies:
            copied = value.like()
            copied.dtype, copied.border, copied.padded, copied.range = dtype, border, padded or value.channels, range
            self.steps.append(Gather(value, copied))
            self._copies[key] = copied
        return self._copies[key]


def place(steps: Sequence[Step], inputs: Sequence[Value], kept: Sequence[Value]) -> int:
    """Give every value an address, from 0 on, where no other value lies that is still to be read.

    Args:
        steps: in the order in which they run.
        inputs: whose memory no other value has.
        kept: outputs and others that nothing overwrites.

    Returns:
        How many bytes they need.
    """
    first: dict[Value, int] = dict.fromkeys(inputs, -1)
    last: dict[Value, int] = dict.fromkeys([*inputs, *kept], len(steps))
    for n, step in enumerate(steps):
        for value in step.values:
            first.setdefault(value, n)
            last[value] = max(last.get(value, n), n)
    total = 0
    live: list[tuple[int, int, int]] = []  # address, end, last step that reads it
    # First fit, in the order in which values are written. This is not optimal, but it is fast, and networks with
    # skips are so regular that a value's place mostly fits one of the next.
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
