"""Speed of the products that programs are made of: convolutions by form, linear layers and attention, against torch's.

    python -m benchmarks.kernels.products --csv benchmarks/results/cpu/products.csv
    python -m benchmarks.kernels.products --kind convolution --dtypes fp32 --isa avx512_bf16,avx2

Providers of a call, measured in turn in one run:

- coalescer_fast: the step alone, once for each of its forms (`steps.forms`) and each instruction set. It writes
  float32, as the last step of a program does: its error has no rounding to bf16 in it. In int8 what it reads is a
  normalised image, quantised beforehand, and there is none where a step does not read 8 bits;
- torch: F.conv2d in channels_last, F.linear and F.scaled_dot_product_attention;
- torch_prepacked: oneDNN with weights packed once, of convolutions and linear layers.

torch's are measured in fp32 and bf16 alone, and use whatever oneDNN finds: cap it by ONEDNN_MAX_CPU_ISA to compare
another instruction set. ``error`` is the RMS error against float64, over the largest number of the result; a provider
whose error is above the limit of its dtype has no time. ``percent_of_peak`` is of torch's fastest product of large
matrices in the row's dtype. By default caches are filled with something else before each call, since inside a network
weights come from memory: --cache warm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coalescer_fast
from coalescer_fast.bench import environment as machine
from coalescer_fast.bench import timing
from coalescer_fast.bench.peers import OK, Missing, attempt
from coalescer_fast.ops import native_library
from coalescer_fast.ops.abi import cf_form
from coalescer_fast.runtime.native.module import floats_of
from coalescer_fast.runtime.native.pack import Weights
from coalescer_fast.runtime.native.program import Program, Ranges
from coalescer_fast.runtime.native.record import MetaCopy, Recorder, Recording, record_module
from coalescer_fast.runtime.native.steps import FORMS, forms
from coalescer_fast.runtime.native.steps import Convolution as ConvolutionStep

from ..harness.arguments import Parser, add_timing_options, command, listed, positive
from ..harness.results import Row, append, open_csv
from ..harness.tables import Table
from ..networks.providers import peak
from ..networks.task import Task

OURS = "coalescer_fast"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}
LIMITS = {"fp32": 1e-5, "bf16": 1e-2, "int8": 3e-2}  # of errors
BUDGET = 0.5

COLUMNS = (
    *("kind", "network", "call", "batch", "provider", "form", "dtype", "isa", "cache", "metric_unit"),
    *(*timing.TIMES, "samples", "quiet", "gflop", "gflop_per_s", "peak_gflop_per_s", "percent_of_peak"),
    *("speedup_over_torch", "error", "status", "timestamp", "cpu", "threads", "python", "torch", "coalescer_fast"),
)


class Convolution(nn.Conv2d):
    """A convolution of images of a size, which it may read normalised.

    Args:
        size: height and width of its input.
        inputs, outputs: channels.
        kernel: 1 or 3.
        stride: 1 or 2.
    """

    kind = "convolution"

    def __init__(self, size: int, inputs: int, outputs: int, kernel: int = 3, stride: int = 1):
        super().__init__(inputs, outputs, kernel, stride, kernel // 2)
        self.size = size
        self.label = f"{size}x{size}, {inputs} -> {outputs}, {kernel}x{kernel}" + f", stride {stride}" * (stride > 1)

    def given(self, batch: int) -> list[Tensor]:
        return [drawn(batch, self.in_channels, self.size, self.size).to(memory_format=torch.channels_last)]

    def peers(self, x: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Of x in the dtype that is measured."""
        assert self.bias is not None
        weight, bias = (p.detach().to(x.dtype) for p in (self.weight, self.bias))
        weight = weight.contiguous(memory_format=torch.channels_last)
        padding, stride = list(self.padding), list(self.stride)
        yield "torch", partial(F.conv2d, x, weight, bias, self.stride, self.padding)
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        ready = reorder(weight.to_mkldnn(), padding, stride, [1, 1], 1, list(x.shape))
        yield (
            "torch_prepacked",
            partial(
                torch.ops.mkldnn._convolution_pointwise, x, ready, bias, padding, stride, [1, 1], 1, "none", [], ""
            ),
        )


class Linear(nn.Linear):
    """A linear layer of so many rows."""

    kind = "linear"

    def __init__(self, rows: int, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.rows, self.label = rows, f"{rows} rows, {inputs} -> {outputs}"

    def given(self, batch: int) -> list[Tensor]:
        return [drawn(batch, self.rows, self.in_features)]

    def peers(self, x: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        weight, bias = (p.detach().to(x.dtype) for p in (self.weight, self.bias))
        yield "torch", partial(F.linear, x, weight, bias)
        ready = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[:-1].numel())
        yield "torch_prepacked", partial(torch.ops.mkldnn._linear_pointwise, x, ready, bias, "none", [], "")


class Attention(nn.Module):
    """Attention of heads of a width, from ``length`` positions to ``k_length``."""

    kind = "attention"

    def __init__(self, heads: int, width: int, length: int, k_length: int):
        super().__init__()
        self.heads, self.width, self.length, self.k_length = heads, width, length, k_length
        self.label = f"{heads} heads of {width}, {length} to {k_length}"

    def given(self, batch: int) -> list[Tensor]:
        return [drawn(batch, n, self.heads * self.width) for n in (self.length, self.k_length, self.k_length)]

    def forward(self, *given: Tensor) -> Tensor:
        q, k, v = (x.view(x.shape[0], -1, self.heads, self.width).transpose(1, 2) for x in given)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def peers(self, *given: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        yield "torch", partial(self.forward, *given)


Call = Convolution | Linear | Attention
# Of emoji-64, of m, and of SD 1.5 and SD-Turbo at 64x64 latents; made anew for each run, for they hold weights.
CALLS: dict[str, list[Callable[[], Call]]] = {
    "emoji-64": [partial(Convolution, 8, *channels) for channels in ((64, 64), (128, 128))],
    "m": [
        partial(Convolution, 32, 128, 128),
        partial(Convolution, 16, 256, 256),
        partial(Convolution, 8, 256, 256),
        partial(Convolution, 8, 512, 256),
    ],
    "sd": [
        partial(Convolution, 64, 320, 320),
        partial(Convolution, 32, 640, 640),
        partial(Convolution, 16, 1280, 1280),
        partial(Convolution, 8, 1280, 1280),
        partial(Convolution, 64, 320, 320, 3, 2),
        partial(Convolution, 64, 640, 320, 1),
        partial(Linear, 4096, 320, 2560),
        partial(Linear, 1024, 640, 640),
        partial(Linear, 256, 1280, 1280),
        partial(Linear, 77, 1024, 1280),
        partial(Attention, 5, 64, 4096, 4096),
        partial(Attention, 10, 64, 1024, 1024),
        partial(Attention, 5, 64, 4096, 77),
    ],
}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return command("python -m benchmarks.kernels.products", lambda: run(args))


def parser() -> Parser:
    top = Parser(prog="python -m benchmarks.kernels.products", description=__doc__.partition("\n")[0])
    kinds = ("convolution", "linear", "attention")
    top.add_argument("--kind", type=listed(*kinds), default=list(kinds), metavar="K,K", help="default: all")
    top.add_argument("--shapes", type=listed(*CALLS), default=list(CALLS), metavar="M,M", help="default: all networks")
    top.add_argument("--batch", type=positive, default=1, metavar="N", help="default: 1")
    top.add_argument("--dtypes", type=listed(*DTYPES), default=list(DTYPES), metavar="D,D", help="default: all")
    top.add_argument(
        "--isa",
        type=listed(*native_library.ISAS),
        metavar="I,I",
        help=f"of {', '.join(native_library.ISAS)} (default: the best)",
    )
    top.add_argument("--cache", choices=["cold", "warm"], default="cold", help="default: %(default)s")
    add_timing_options(top, BUDGET, "one call in one dtype")
    return top


def run(args: argparse.Namespace) -> int:
    if reason := native_library.unavailable():
        raise ValueError(f"there is nothing to measure: {reason}")
    if args.csv is not None:
        open_csv(args.csv, COLUMNS)
    best = native_library.isa()
    status = 0
    with timing.settings(args.threads, args.allocator == "keep"), torch.inference_mode(False), torch.no_grad():
        common = environment()
        table = Table({"call": "<44", "dtype": "<5", "provider": "<36", "ms": ">9", "% of peak": ">9", "error": ">8"})
        print(
            "error: RMS against float64, over the largest number; torch rounds its result to the dtype, ours is float32"
        )
        print(table.head)
        try:
            for row in benchmark(args, best):
                row = {**dict.fromkeys(COLUMNS, ""), **common, **row}
                failed = row["status"] != OK
                status |= str(row["status"]).startswith("FAIL")
                who = " ".join(filter(None, (str(row[name]) for name in ("provider", "form", "isa"))))
                cells = (
                    (row["status"], "", "")
                    if failed
                    else (f"{row['y_value_50']:.3f}", f"{row['percent_of_peak']:.0f}", f"{row['error']:.1e}")
                )
                print(table.line(f"{row['kind']} {row['call']}", row["dtype"], who, *cells), flush=True)
                if args.csv is not None:
                    append(args.csv, [row], COLUMNS)
        finally:
            native_library.set_isa(best)
    return int(status)


def environment() -> Row:
    found = machine.environment()
    del found["gpu"]
    return {
        **found,
        "timestamp": machine.timestamp(),
        "metric_unit": "ms",
        "threads": torch.get_num_threads(),
        "coalescer_fast": coalescer_fast.__version__,
    }


@dataclass
class Provider:
    """A way to compute a call.

    Attributes:
        row: its labels, then its results.
        run: computes it.
        result: what the last `run` has computed.
    """

    row: Row
    run: Callable[[], Any]
    result: Callable[[], Tensor]


def benchmark(args: argparse.Namespace, best: str) -> Iterator[Row]:
    timer = timing.CpuTimer()
    peaks = {}
    for network in args.shapes:
        for make in CALLS[network]:
            call = make().eval().requires_grad_(False)
            if call.kind not in args.kind:
                continue
            for dtype in args.dtypes:
                if dtype not in peaks:
                    task = Task("peak", "", dtype, "", 1.0, 0, 0, torch.get_num_threads(), "", "")
                    peaks[dtype], _ = attempt(partial(peak, task), RuntimeError)
                labels: Row = {"kind": call.kind, "network": network, "call": call.label, "batch": args.batch}
                labels |= {"dtype": dtype, "cache": args.cache}
                for row in measure(call, dtype, timer, args, best, peaks[dtype] or float("nan")):
                    yield labels | row


def measure(
    call: Call, dtype: str, timer: timing.CpuTimer, args: argparse.Namespace, best: str, top: float
) -> Iterator[Row]:
    """A row for each provider of a call in a dtype."""
    if DTYPES[dtype] is not torch.float32:  # what all are given; the truth has the same weights
        for parameter in call.parameters():
            parameter.copy_(parameter.bfloat16().float())
    given = call.given(args.batch)
    if dtype != "fp32":
        given = [x.bfloat16().float() for x in given]
    network: nn.Module = call
    if dtype == "int8" and isinstance(call, Convolution):
        network = nn.Sequential(nn.GroupNorm(1, call.in_channels), call).eval()
    truth = network.double()(*(x.double() for x in given))
    network.float()
    found: list[Provider] = []
    try:
        for isa in args.isa or [best]:
            native_library.set_isa(isa)
            found += list(ours(network, given, dtype, isa))
    finally:
        native_library.set_isa(best)
    if dtype != "int8":
        for name, run in call.peers(*(x.to(DTYPES[dtype]) for x in given)):
            found.append(Provider({"provider": name, "form": "", "isa": ""}, run, run))
    samples: dict[str, timing.Sample] = {}
    for number, each in enumerate(found):
        y = each.result().double()
        error = float((y - truth).square().mean().sqrt() / truth.abs().max())
        each.row |= {"error": error, "status": OK}
        if not error <= LIMITS[dtype]:
            each.row["status"] = f"FAIL: error {error:.2g} is above {LIMITS[dtype]:g}"
            continue
        samples[str(number)] = getattr(timer, args.cache)(each.run)
    taken = timing.interleave(samples, args.budget or BUDGET) if samples else {}
    medians = {number: timing.quantiles(mine)[0] for number, mine in taken.items()}
    theirs = [seconds for number, seconds in medians.items() if found[int(number)].row["provider"] != OURS]
    gflop = operations(call, args.batch) / 1e9
    for number, each in enumerate(found):
        if (mine := taken.get(str(number))) is not None:
            seconds = medians[str(number)]
            each.row |= timing.columns(mine, 1e3)
            each.row |= {"gflop": gflop, "gflop_per_s": gflop / seconds, "peak_gflop_per_s": top}
            each.row["percent_of_peak"] = 100 * gflop / seconds / top
            each.row["speedup_over_torch"] = min(theirs) / seconds if theirs else ""
        yield each.row


def operations(call: Call, batch: int) -> int:
    """Floating point operations of a direct computation, whatever the form does."""
    if isinstance(call, Attention):
        return 4 * batch * call.heads * call.width * call.length * call.k_length
    positions = (call.size // call.stride[0]) ** 2 if isinstance(call, Convolution) else call.rows
    return 2 * batch * positions * call.weight.numel()


def ours(network: nn.Module, given: list[Tensor], dtype: str, isa: str) -> Iterator[Provider]:
    """The step that computes the call, in each of its forms; nothing where the instruction set lacks the dtype."""
    kind = DTYPES[dtype]
    call = network[-1] if isinstance(network, nn.Sequential) else network
    able = forms(kind)
    wide = isinstance(call, Convolution) and call.weight.shape[2] == 3 and call.stride[0] == 1
    for form in able if wide else able[:1]:
        try:
            program = made(network, given, kind, form)
        except Missing:
            continue
        program(*given)
        (run,) = [run for step, run in program.steps() if step.flop]
        name = "" if isinstance(call, Attention) else FORMS[form]
        labels: Row = {"provider": OURS, "form": name, "isa": isa}
        yield Provider(labels, partial(under, isa, run), program.outputs[0].clone)


def under(isa: str, run: Callable[[], None]) -> None:
    """Run on an instruction set; setting it takes a microsecond."""
    native_library.set_isa(isa)
    run()


def made(network: nn.Module, given: list[Tensor], kind: torch.dtype, form: cf_form) -> Program:
    """A program of the network, whose convolution has a form. Raises Missing if it does not read 8 bits."""

    def record() -> Recording:
        def run(copied: nn.Module, recorder: Recorder) -> list[Tensor]:
            return [copied(*map(recorder.given, given))]

        recording = record_module(MetaCopy(network), run)
        for step in recording.steps:
            if isinstance(step, ConvolutionStep):
                step.form = form
        return recording

    threads = torch.get_num_threads()
    if kind != torch.uint8:
        return Program(record(), Weights(kind, winograd_memory=0), threads)  # so that none is chosen anew
    weights = Weights(floats_of(torch.int8), winograd_memory=0)
    observer = Program(record(), weights, threads)
    observer(*given)
    ranges: Ranges = {}
    observer.observe(ranges)
    if not ranges:
        raise Missing("no step of it reads 8 bits")
    return Program(record(), weights, threads, ranges)


if __name__ == "__main__":
    sys.exit(main())
