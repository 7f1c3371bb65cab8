"""Speed of the four ops, backend beside backend and against plain torch, on the calls that the package's own networks make.

    python -m benchmarks.kernels --csv benchmarks/results/kernels.csv
    python -m benchmarks.kernels --summary benchmarks/results/kernels.csv
    python -m benchmarks.kernels --plot docs/kernels.png --from benchmarks/results/kernels.csv

Providers of a call are measured in turn, in one run: the backends that can run it, and the peers

- eager: plain torch as an expert writes it (`benchmarks.kernels.peers`), channels innermost in memory, as the backends get them;
- eager_contiguous: the same on contiguous tensors;
- compile: eager under torch.compile, for the very shapes (on a GPU: max-autotune); seconds to compile have a column of their own;
- copy: y.copy_(x) of the main tensor (`shapes.Call.elements`), the rate that memory gives: ``percent_of_copy`` is the bytes that a call
  must read and write, each once, over its time, as a share of the copy's;
- empty: on a GPU, a kernel that has nothing to do (fill_ of one element): the least that a call can take.

Every result is held against the reference in float64; a provider that fails has no time. With --csv, rows are added to the file, which
must have the same columns; of a call measured twice, the summary and the plot take the later run. The column quiet is 0 for a time taken
while other processes had the CPUs; the summary and the plot leave it out, and --again measures it again. On Linux, memory that is freed
stays with the process unless --allocator is system: see `benchmarks.harness.timing.keep_freed_memory`.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import coalescer_fast
from coalescer_fast import ops
from coalescer_fast.cli import cpu_name, sentence
from coalescer_fast.ops.dispatch import BACKENDS

from ..harness import timing
from ..harness.results import Parser, Row, add_report_options, append, command, open_csv, read, reported, tqdm
from . import peers, report, shapes

PEERS = ("eager", "eager_contiguous", "compile")
YARDSTICKS = ("copy", "empty")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CACHES = ("warm", "cold")
BUDGET, QUICK_BUDGET = 0.5, 0.05

# An op rounds a handful of times, each time by half an ulp of an intermediate result that is not much larger than the final one. In
# float32 the sums behind the statistics round as well; torch's own, of squares, by ten ulps of the result.
CAP_ULPS = {torch.float32: 64, torch.float16: 8, torch.bfloat16: 8}
CHECKED_ELEMENTS = 2**23  # the first sample, the last one, and as many between them as this allows

COLUMNS = (
    *(
        "kernel_name",
        "kernel_provider",
        "kernel_operation_mode",
        "metric_name",
        "metric_unit",
        "x_name",
        "x_label",
        "x_value",
    ),
    *("y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp"),
    *(
        "backend",
        "resolved_backend",
        "status",
        "max_abs_err",
        "compile_s",
        "gb_per_s",
        "percent_of_copy",
        "speedup_over_eager",
    ),
    *("samples", "quiet"),
    *("cache", "dtype", "batch", "shapes", "calls_per_evaluation", "llc_bytes"),
    *("torch", "triton", "driver", "device", "threads", "coalescer_fast"),
)


@dataclass
class Cell:
    """What the providers are compared on: a call of a network, its batch and dtype."""

    network: str
    call: shapes.Call
    count: int
    batch: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.call.op:15} {self.network:8} {self.call!s:30} {self.batch:5} {self.dtype}"


@dataclass
class Provider:
    """run: the call on it; error: largest absolute error; failure: what is wrong, or ""; compile_s: seconds that its first call took."""

    run: Callable[[], Any]
    error: float | str = ""
    failure: str = ""
    compile_s: float | str = ""


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return command("python -m benchmarks.kernels", lambda: run(args))


def parser() -> Parser:
    top = Parser(prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0])
    names = list(BACKENDS)
    top.add_argument(
        "--op", nargs="+", choices=list(peers.EAGER), default=list(peers.EAGER), metavar="OP", help="default: all four"
    )
    top.add_argument(
        "--backends", nargs="+", choices=names, metavar="B", help=f"of {', '.join(names)} (default: all that can run)"
    )
    top.add_argument(
        "--peers",
        type=listed(*PEERS, "none"),
        default=list(PEERS),
        metavar="P,P",
        help="default: eager,eager_contiguous,compile",
    )
    top.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    top.add_argument(
        "--shapes",
        type=listed(*shapes.CALLS, "all"),
        metavar="M,M",
        help="networks whose calls are made (default: all)",
    )
    top.add_argument(
        "--calls", nargs="+", metavar="CALL", help="of those the ones called so, such as '320x64x64 g32' (default: all)"
    )
    top.add_argument("--batch", type=positive_list, metavar="N,N", help="default: 1,4,16,64")
    top.add_argument(
        "--dtypes", type=listed(*DTYPES), metavar="D,D", help=f"of {', '.join(DTYPES)} (default: fp32,bf16)"
    )
    top.add_argument(
        "--cache", type=listed(*CACHES), metavar="C,C", help="state of the caches before a call (default: warm,cold)"
    )
    top.add_argument("--threads", type=positive, metavar="N", help="threads of the CPU (default: torch's own choice)")
    top.add_argument("--budget", type=float, metavar="S", help=f"seconds for one line of the table (default: {BUDGET})")
    top.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="begin no call after so long, and take the ops in turn (default: no limit)",
    )
    top.add_argument("--allocator", choices=["keep", "system"], default="keep", help="default: %(default)s")
    top.add_argument(
        "--refcheck", action=argparse.BooleanOptionalAction, default=True, help="hold results against float64 (default)"
    )
    top.add_argument("--quick", action="store_true", help="few calls, briefly: to see it run, not to compare")
    top.add_argument("--overhead", action="store_true", help="measure instead what a call costs on 1x8x2x2")
    top.add_argument("--csv", type=Path, metavar="F.csv", help="add the results to a file")
    top.add_argument(
        "--again", action="store_true", help="measure only what the file of --csv lacks, or has wrong or disturbed"
    )
    add_report_options(top)
    return top


def run(args: argparse.Namespace) -> int:
    if reported(args, report):
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and there is none: use --device cpu")
    for op in args.op:
        for name in args.backends or ():
            able, reason = ops.backends(op)[name]
            if not able or BACKENDS[name].device not in (None, args.device):
                reason = reason or f"it is made for a {BACKENDS[name].device} device"
                raise ValueError(f"--backends {name} cannot run {op} here: {reason}")
    if args.again and args.csv is None:
        raise ValueError("--again needs --csv: name the file whose gaps are to be filled")
    if args.csv is not None:
        open_csv(args.csv, COLUMNS)
    with timing.settings(args.threads, args.allocator == "keep"), torch.inference_mode(), compiler(args):
        rows = benchmark(args)
    if not rows:
        print("Nothing is left to measure.")
        return 0
    print()
    print("\n".join(report.summary([{key: str(value) for key, value in row.items()} for row in rows])))
    failures = [row for row in rows if row["status"] != "ok"]
    return 1 if failures else 0


def benchmark(args: argparse.Namespace) -> list[Row]:
    """Measure every cell, print it, and write it to the CSV file as soon as it is there."""
    start = time.perf_counter()
    device = torch.device(args.device)
    timer: timing.CpuTimer | timing.CudaTimer
    if args.device == "cpu":
        timer = timing.CpuTimer()
    else:
        torch.backends.cudnn.allow_tf32 = False  # fp32 is to be held to float32's precision
        timer = timing.CpuTimer(torch.cuda.synchronize) if args.overhead else timing.CudaTimer()
    caches = ["warm"] if args.overhead or (args.quick and not args.cache) else args.cache or list(CACHES)
    budget = args.budget or (QUICK_BUDGET if args.quick else BUDGET)
    common = {**environment(args.device), "llc_bytes": timer.cache_bytes}
    columns = ["copy", *["empty"] * (args.device == "cuda"), *[peer for peer in PEERS if peer in args.peers]]
    columns += [b for b in BACKENDS if b in (args.backends or BACKENDS) and BACKENDS[b].device in (None, args.device)]
    print(
        "Microseconds a call, the median; in brackets, how many times as fast as eager; ~ marks a time that other processes disturbed."
    )
    print(f"{'op':15} {'shapes':8} {'call':30} {'batch':>5} dtype cache" + "".join(f"{name:>18}" for name in columns))
    rows: list[Row] = []
    grid = list(cells(args))
    if args.again and args.csv.exists():
        done = finished(args.csv, caches, common, columns)
        grid = [cell for cell in grid if key_of(cell) not in done]
    if "compile" in args.peers:
        compiled(torch.neg, device)(torch.ones(1, device=device))  # the compiler's own start is no call's time
    if args.seconds is not None:
        grid = in_turn(grid)
    write = tqdm.write if tqdm else print
    for n, cell in enumerate(tqdm(grid, desc="kernels", mininterval=1.0) if tqdm else grid):
        if args.seconds is not None and time.perf_counter() - start > args.seconds:
            write(
                f"{len(grid) - n} of {len(grid)} calls are left out, the first of them {cell}: {args.seconds:g} seconds are over"
            )
            break
        providers: dict[str, Provider] = {}
        try:
            providers = prepare(cell, device, args)
            for cache in caches:
                new = [
                    {**row, **common}
                    for row in measure(cell, providers, cache, timer, budget, "overhead" if args.overhead else "time")
                ]
                write(f"{cell} {cache:5}" + line(new, columns), file=sys.stdout)
                rows += new
                if args.csv is not None:
                    append(args.csv, [{key: row[key] for key in COLUMNS} for row in new], COLUMNS)
        except torch.OutOfMemoryError as error:
            write(f"LEFT OUT {cell}: {sentence(error)}", file=sys.stderr)
        for failure in [
            f"FAIL {cell} {name}: {provider.failure}" for name, provider in providers.items() if provider.failure
        ]:
            write(failure, file=sys.stderr)
        del providers
        if "compile" in args.peers:
            gc.collect()  # compiled functions are in cycles, and hold on to tensors
    return rows


def in_turn(grid: Sequence[Cell]) -> list[Cell]:
    """The first cell of every op, then the second of every op, and so on: cut anywhere, it has something of all."""
    count: Counter[str] = Counter()
    ranks = []
    for cell in grid:
        ranks.append(count[cell.call.op])
        count[cell.call.op] += 1
    return [cell for _, cell in sorted(zip(ranks, grid), key=lambda pair: pair[0])]


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    quick = args.quick
    if args.overhead:
        tables, batches = {"tiny": shapes.TINY}, [1]
    else:
        names = args.shapes or (["emoji-64"] if quick else ["all"])
        tables = {name: shapes.CALLS[name] for name in (shapes.CALLS if "all" in names else names)}
        batches = args.batch or ([1] if quick else [1, 4, 16, 64])
    if args.calls:
        known = {str(call) for calls in tables.values() for call in calls if call.op in args.op}
        for name in args.calls:
            if name not in known:
                raise ValueError(f"--calls {name!r} is no call of {', '.join(args.op)} in {', '.join(tables)}")
    for op in args.op:
        for name, calls in tables.items():
            for call, count in calls.items():
                if call.op == op and (not args.calls or str(call) in args.calls):
                    for batch in batches:
                        for dtype in args.dtypes or (["fp32"] if quick else ["fp32", "bf16"]):
                            yield Cell(name, call, count, batch, dtype)


def key_of(cell: Cell) -> tuple[str, ...]:
    return cell.call.op, cell.network, str(cell.call), str(cell.batch), cell.dtype


def finished(path: Path, caches: Sequence[str], common: Row, columns: Sequence[str]) -> set[tuple[str, ...]]:
    """Cells that the file has, on this machine with as many threads, in all these states of the caches, with a right result and an
    undisturbed time of all these providers that can run here."""
    here = [str(common[name]) for name in report.MACHINE]
    wanted = {op: {name for name in columns if name not in BACKENDS or ops.backends(op)[name][0]} for op in peers.EAGER}
    count: Counter[tuple[str, ...]] = Counter()
    for group in report.groups(read(path)) if path.stat().st_size else []:
        labels = group.labels
        times = {name for name, row in group.rows.items() if row["quiet"] == "1"}
        if (
            [labels[name] for name in report.MACHINE] == here
            and labels["cache"] in caches
            and times >= wanted[labels["kernel_name"]]
        ):
            call = json.loads(labels["extra_benchmark_config_str"])["call"]
            count[labels["kernel_name"], labels["shapes"], call, labels["batch"], labels["dtype"]] += 1
    return {cell for cell, times in count.items() if times == len(caches)}


def prepare(cell: Cell, device: torch.device, args: argparse.Namespace) -> dict[str, Provider]:
    """The providers of a cell, each run once and checked."""
    op, dtype = cell.call.op, DTYPES[cell.dtype]
    inputs = cell.call.inputs(cell.batch, dtype, device)
    torch.backends.cudnn.benchmark = False  # the reference's errors set the rule: as users have it
    check = Check(cell, inputs)
    torch.backends.cudnn.benchmark = (
        device.type == "cuda"
    )  # the peers at their best, sought before anything is captured
    x = torch.empty(cell.batch, cell.call.elements, dtype=dtype, device=device).fill_(1)
    providers = {"copy": Provider(partial(torch.empty_like(x).copy_, x))}
    if device.type == "cuda":
        providers["empty"] = Provider(partial(torch.zeros(1, device=device).fill_, 0))
    for peer in args.peers:
        if peer == "eager":
            providers[peer] = Provider(partial(peers.EAGER[op], **inputs))
        elif peer == "eager_contiguous":
            providers[peer] = Provider(
                partial(peers.EAGER[op], **{key: contiguous(value) for key, value in inputs.items()})
            )
        elif peer == "compile":
            providers[peer] = Provider(partial(compiled(peers.EAGER[op], device), **inputs))
    for name, (able, _) in ops.backends(op, **inputs).items():
        # Triton's interpreter runs on the CPU, but its time says nothing
        if able and BACKENDS[name].device in (None, device.type) and name in (args.backends or BACKENDS):
            providers[name] = Provider(partial(getattr(ops, op), **inputs, backend=name))
    for name, provider in providers.items():
        if name in YARDSTICKS:
            continue
        try:
            start = time.perf_counter()
            result = provider.run()
            if name == "compile":
                provider.compile_s = time.perf_counter() - start
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a backend or a compiler raises is its result
            provider.failure = sentence(error)
            continue
        provider.error, wrong = check(result, peer=name in PEERS)
        if args.refcheck:
            provider.failure = wrong
    return providers


def contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) and value.ndim == 4 else value


def compiler(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """No compiled results of earlier runs, so that seconds to compile are those of a first time. Nothing is done without that peer."""
    if "compile" not in args.peers:
        return nullcontext()
    from torch._inductor.utils import fresh_cache

    return fresh_cache()


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """torch.compile of a function that dynamo takes for a new one, so that it makes no shape dynamic and reaches no limit."""
    torch._dynamo.reset()
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


class Check:
    """The rule of the tests: an error of at most twice that of the reference in the same dtype and one ulp more, and below an absolute
    cap. Truth is the reference in float64; ulps are those of the largest value, or of 1; the reference's error is the larger one of its
    errors on both layouts, for which torch has other algorithms."""

    def __init__(self, cell: Cell, inputs: shapes.Inputs):
        n = max(2, min(cell.batch, CHECKED_ELEMENTS // cell.call.elements))
        samples = torch.linspace(0, cell.batch - 1, n).round().long().unique()
        self.samples = samples.to(next(x for x in inputs.values() if isinstance(x, torch.Tensor)).device)
        inputs = {key: self.select(x) if key in shapes.BATCHED else x for key, x in inputs.items()}
        exact = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
        op = partial(getattr(ops, cell.call.op), backend="reference")
        self.truth = several(op(**exact))
        plain = [several(op(**inputs)), several(op(**{key: contiguous(x) for key, x in inputs.items()}))]
        self.dtypes = [output.dtype for output in plain[0]]
        self.plain = [max(largest(output - truth) for output in both) for *both, truth in zip(*plain, self.truth)]

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """The samples that are checked."""
        rows = x.index_select(0, self.samples)
        return rows.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else rows

    def __call__(self, result: torch.Tensor | tuple[torch.Tensor, ...], peer: bool = False) -> tuple[float, str]:
        """The largest error, and what is wrong or "". A peer need only be below the cap: it is torch as well, whose errors set the rule."""
        errors, wrong = [], []
        for output, truth, plain, dtype in zip(several(result), self.truth, self.plain, self.dtypes):
            if output.shape[1:] != truth.shape[1:] or output.dtype != dtype:
                return float(
                    "nan"
                ), f"result is {output.dtype} {tuple(output.shape)}; expected {dtype} (N, {tuple(truth.shape[1:])})"
            error = largest(self.select(output) - truth)
            ulp = torch.finfo(output.dtype).eps * max(1.0, largest(truth))
            limit = CAP_ULPS[output.dtype] * ulp if peer else min(2 * plain + ulp, CAP_ULPS[output.dtype] * ulp)
            if not error <= limit:  # so that NaN is wrong
                wrong.append(f"error {error:.3g} is above {limit:.3g}")
            errors.append(error)
        return max(errors, key=lambda e: (e != e, e)), "; ".join(wrong)


def several(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def largest(x: torch.Tensor) -> float:
    return float(x.abs().max())


def measure(
    cell: Cell,
    providers: dict[str, Provider],
    cache: str,
    timer: timing.CpuTimer | timing.CudaTimer,
    budget: float,
    metric: str,
) -> Iterator[Row]:
    """A row a provider."""
    samples: dict[str, timing.Sample] = {}
    for name, provider in providers.items():
        if provider.failure:
            continue
        try:
            samples[name] = getattr(timer, cache)(provider.run)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it cannot be captured in a graph
            if name in YARDSTICKS:
                raise
            provider.failure = sentence(error)
    taken = timing.interleave(samples, budget)
    quantiles = {name: timing.quantiles(mine) for name, mine in taken.items()}
    itemsize = DTYPES[cell.dtype].itemsize * cell.batch
    copy_rate = 2 * cell.call.elements * itemsize / quantiles["copy"][0]
    for name, provider in providers.items():
        row: Row = {
            "kernel_name": cell.call.op,
            "kernel_provider": name,
            "kernel_operation_mode": "forward",
            "metric_name": metric,
            "metric_unit": "us",
            "x_name": "bytes",
            "x_label": "size of the main tensor in bytes",
            "x_value": cell.call.elements * itemsize,
            "extra_benchmark_config_str": json.dumps({"call": str(cell.call), **asdict(cell.call)}),
            "backend": name if name in BACKENDS else "",
            "resolved_backend": {"compile": "inductor"}.get(name, name if name in BACKENDS else "torch"),
            "status": f"FAIL: {provider.failure}" if provider.failure else "ok",
            "max_abs_err": provider.error,
            "compile_s": provider.compile_s,
            "cache": cache,
            "dtype": cell.dtype,
            "batch": cell.batch,
            "shapes": cell.network,
            "calls_per_evaluation": cell.count,
        }
        empty = (
            "y_value_50",
            "y_value_20",
            "y_value_80",
            "samples",
            "quiet",
            "gb_per_s",
            "percent_of_copy",
            "speedup_over_eager",
        )
        row |= dict.fromkeys(empty, "")
        if name in quantiles:
            median, low, high = quantiles[name]
            rate = (2 * cell.call.elements if name == "copy" else cell.call.moved) * itemsize / median
            row |= {"y_value_50": median * 1e6, "y_value_20": low * 1e6, "y_value_80": high * 1e6}
            row |= {"samples": len(taken[name]), "quiet": int(all(m.quiet for m in taken[name]))}
            if name != "empty":
                row |= {"gb_per_s": rate / 1e9, "percent_of_copy": 100 * rate / copy_rate}
                if "eager" in quantiles:
                    row["speedup_over_eager"] = quantiles["eager"][0] / median
        yield row


def line(rows: Sequence[Row], columns: Sequence[str]) -> str:
    found = {row["kernel_provider"]: row for row in rows}
    cells = []
    for name in columns:
        row = found.get(name)
        if row is None:
            cells.append("-")
        elif row["status"] != "ok":
            cells.append("FAIL")
        else:
            speedup = row["speedup_over_eager"]
            bracket = f" ({speedup:.2f}x)" if isinstance(speedup, float) and name not in ("copy", "eager") else ""
            cells.append(f"{row['y_value_50']:.1f}{'' if row['quiet'] else '~'}{bracket}")
    return "".join(f"{cell:>18}" for cell in cells)


def environment(device: str) -> Row:
    """The columns that are the same for all rows of a run; its timestamp tells it from other runs."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    return {
        "gpu_name": torch.cuda.get_device_name() if device == "cuda" else "",
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": str(torch.__version__),
        "triton": triton,
        "driver": driver() if device == "cuda" else "",
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "coalescer_fast": coalescer_fast.__version__,
    }


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def listed(*allowed: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is unknown: use some of {', '.join(allowed)}")
        return names

    return parse


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def positive_list(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]
