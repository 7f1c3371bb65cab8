"""Speeds of the forms of 3x3 convolutions, from which the forms of a program's convolutions are chosen.

    python -m benchmarks.kernels.forms

writes coalescer_fast/runtime/native/forms.csv: for each instruction set of the processor, each dtype of images, sizes
and channels (as many in as out), the GFLOP/s of each form, counted as those of the direct one. Other instruction sets'
rows stay. Forms run in turn, after the caches were flushed, since weights come from memory in a network; a row is the
median. y has the dtype that it has inside a network. Nothing else may run beside it.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from coalescer_fast.dtypes import dtype_name
from coalescer_fast.ops import native_library
from coalescer_fast.ops.abi import cf_form, cf_function, cf_program_args, cf_step
from coalescer_fast.runtime.native import forms
from coalescer_fast.runtime.native.pack import Packer, Weights, image, kernel_order
from coalescer_fast.runtime.native.steps import cf_convolution_args
from coalescer_fast.runtime.native.value import Value

from ..harness.arguments import Parser, command, positive

COLUMNS = ["isa", "dtype", "positions", "channels", "form", "gflops"]
SIDES = (2, 4, 8, 16, 32, 64, 128)
CHANNELS = (32, 64, 128, 320, 640, 1280)
MOST_FLOP = 32e9  # of a row
FLUSHED = 96 << 20  # bytes


def convolution(dtype: torch.dtype, side: int, channels: int, form: cf_form) -> Callable[[], None]:
    """A 3x3 convolution of one image of (channels, side, side) to as many channels."""
    x, y = Value(1, side, side, channels, dtype), Value(1, side, side, channels, torch.float32)
    y.dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    x.border = 1
    packer = Packer(Weights(dtype), torch.get_num_threads())
    data = [torch.zeros(value.bytes, dtype=torch.uint8) for value in (x, y)]
    x.address, y.address = (packer.keep(each) for each in data)
    if dtype != torch.uint8:
        data[0].view(dtype).copy_(torch.randn(data[0].numel() // x.element_bytes, dtype=torch.float32))
    weight = torch.randn(channels, channels, 3, 3, dtype=torch.float32) / channels**0.5
    scale = torch.ones(channels, dtype=torch.float32) if dtype == torch.uint8 else None
    arguments = cf_convolution_args.pack(
        x=image(x),
        residual=None,
        y=image(y),
        weight=packer.keep(kernel_order(weight, dtype, form)),
        bias=packer.floats(torch.zeros(channels, dtype=torch.float32)),
        scale=packer.keep(scale),
        row=None,
        n=1,
        height=side,
        width=side,
        channels=channels,
        outputs=channels,
        taps=9,
        stride=1,
        padding=1,
        relu=False,
        form=form,
        doubling=False,
        gated=False,
        function=cf_function.CF_IDENTITY,
        quantisation=None,
    )
    step = packer.keep(cf_step.pack(kind=0, args=packer.keep(bytes(arguments))))
    call = native_library.function("cf_cpu_run")
    program = cf_program_args.pack(steps=step, count=1, threads=packer.threads)

    def run() -> None:
        call(program)
        packer.kept  # noqa: B018 (what the arguments point to)

    return run


def seconds(calls: dict[cf_form, Callable[[], None]], rounds: int, flushed: Tensor) -> dict[cf_form, float]:
    """The median time of each form."""
    taken: dict[cf_form, list[float]] = {form: [] for form in calls}
    for _ in range(rounds):
        for form, call in calls.items():
            flushed.add_(1)
            begin = time.perf_counter()
            call()
            taken[form].append(time.perf_counter() - begin)
    return {form: statistics.median(each[1:]) for form, each in taken.items()}


def rows(isa: str, rounds: int) -> list[dict[str, object]]:
    """Those of an instruction set, which is in use."""
    found: list[dict[str, object]] = []
    flushed = torch.zeros(FLUSHED // 4, dtype=torch.float32)
    for dtype in native_library.products():
        for side in SIDES:
            for channels in CHANNELS:
                flop = 18.0 * side * side * channels * channels
                if flop > MOST_FLOP:
                    continue
                direct = [cf_form.CF_DIRECT]
                calls = {
                    form: convolution(dtype, side, channels, form)
                    for form in (direct if dtype == torch.uint8 else cf_form)
                }
                for form, taken in seconds(calls, rounds, flushed).items():
                    row = [isa, dtype_name(dtype), side * side, channels, form.name, f"{flop / taken / 1e9:.3g}"]
                    found.append(dict(zip(COLUMNS, row, strict=True)))
                print(isa, dtype_name(dtype), side, channels, [row["gflops"] for row in found[-len(calls) :]])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.kernels.forms", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=positive, default=9, help="calls of a form, the first not counted")
    parser.add_argument(
        "--isa",
        action="append",
        choices=native_library.ISAS,
        help="an instruction set; default: all that the processor has",
    )
    args = parser.parse_args(argv)
    path = Path(forms.__file__).parent / "forms.csv"

    def work() -> int:
        if reason := native_library.unavailable():
            raise ValueError(f"there is nothing to measure: {reason}")
        best = native_library.isa()
        measured: list[dict[str, object]] = []
        try:
            for isa in args.isa or available():
                native_library.set_isa(isa)
                measured += rows(isa, args.rounds)
        finally:
            native_library.set_isa(best)
        with path.open(newline="") as file:
            others = [row for row in csv.DictReader(file) if row["isa"] not in {new["isa"] for new in measured}]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*others, *measured])
        return 0

    return command(parser.prog, work)


def available() -> list[str]:
    """The instruction sets of the processor that programs run on."""
    found = []
    for isa in native_library.ISAS:
        if isa == "portable":  # programs run in torch there
            continue
        try:
            native_library.set_isa(isa)
            found.append(isa)
        except ValueError:
            pass
    return found


if __name__ == "__main__":
    raise SystemExit(main())
