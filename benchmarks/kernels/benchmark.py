"""Speed of the four ops, backend beside backend and against plain torch, on the calls that the package's networks make.

    python -m benchmarks.kernels --csv benchmarks/results/kernels.csv
    python -m benchmarks.kernels --summary benchmarks/results/kernels.csv
    python -m benchmarks.kernels --plot docs/kernels.png --from benchmarks/results/kernels.csv

The providers of a call are measured in turn, in one run: the backends that can run it, and

- eager: plain torch as an expert writes it (`benchmarks.kernels.peers`), channels_last, as the backends get it;
- eager_contiguous: the same on contiguous tensors;
- compile: eager under torch.compile, for the very shapes (on a GPU: max-autotune); seconds to compile have a column;
- chunked: group_norm_silu on contiguous tensors by two Triton kernels, as SGLang has it (`benchmarks.kernels.chunked`);
  on a GPU, if --peers names it;
- copy: y.copy_(x) of the main tensor (`shapes.Call.elements`), the rate that memory gives. ``percent_of_copy`` is the
  bytes that a call must read and write, each once, over its time, as a share of the copy's;
- empty: on a GPU, a kernel that has nothing to do (fill_ of one element): the least time that a call can take.

Every result is checked against the reference in float64; a provider that fails has no time. With --csv, rows are added
to the file, which must have the same columns; of a call measured twice, the summary and the plot take the later run.
The column quiet is 0 for a time taken while other processes had the CPUs; the summary and the plot leave it out, and
--again measures it again. On Linux the process keeps freed memory unless --allocator is system: see
`coalescer_fast.bench.timing.keep_freed_memory`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import coalescer_fast
from coalescer_fast import ops
from coalescer_fast.bench import timing
from coalescer_fast.bench.environment import driver, timestamp, versions
from coalescer_fast.bench.peers import OK, attempt, fresh_compiler_cache
from coalescer_fast.collect_env import cpu_name
from coalescer_fast.console import sentence
from coalescer_fast.ops import triton_launch
from coalescer_fast.ops.dispatch import BACKENDS

from ..harness.arguments import (
    Parser,
    add_report_options,
    add_timing_options,
    command,
    listed,
    positive_list,
    reported,
)
from ..harness.results import Row, append, as_text, open_csv, read
from ..harness.tables import Table
from . import peers, report, shapes
from .grid import DTYPES, Cell, cells, in_turn
from .plot import draw
from .providers import OPS_OF, PEERS, YARDSTICKS, Provider, compiled, providers_of

try:
    from tqdm.auto import tqdm
except ImportError:  # this benchmark needs torch alone
    tqdm = None

Timer = timing.CpuTimer | timing.CudaTimer

CACHES = ("warm", "cold")
DEFAULT = ("eager", "eager_contiguous", "compile")
BUDGET, QUICK_BUDGET = 0.5, 0.05

COLUMNS = (
    *("kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit"),
    *("x_name", "x_label", "x_value"),
    *(*timing.TIMES, "extra_benchmark_config_str", "gpu_name", "timestamp"),
    *("backend", "resolved_backend", "status", "max_abs_err", "compile_s"),
    *("gb_per_s", "percent_of_copy", "speedup_over_eager", "samples", "quiet"),
    *("cache", "dtype", "batch", "shapes", "calls_per_evaluation", "llc_bytes"),
    *("torch", "triton", "driver", "device", "threads", "coalescer_fast"),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return command("python -m benchmarks.kernels", lambda: run(args))


def parser() -> Parser:
    top = Parser(prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0])
    ops_, names = list(peers.EAGER), list(BACKENDS)
    top.add_argument("--op", nargs="+", choices=ops_, default=ops_, metavar="OP", help="default: all four")
    top.add_argument(
        "--backends", nargs="+", choices=names, metavar="B", help=f"of {', '.join(names)} (default: all that can run)"
    )
    top.add_argument(
        "--peers",
        type=listed(*PEERS, "none"),
        default=list(DEFAULT),
        metavar="P,P",
        help=f"of {', '.join(PEERS)}, none (default: {','.join(DEFAULT)})",
    )
    top.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    top.add_argument(
        "--shapes",
        type=listed(*shapes.CALLS, "all"),
        metavar="M,M",
        help="networks whose calls are made (default: all)",
    )
    top.add_argument(
        "--calls", nargs="+", metavar="CALL", help="only the calls of these names, as '320x64x64 g32' (default: all)"
    )
    top.add_argument("--batch", type=positive_list, metavar="N,N", help="default: 1,4,16,64")
    top.add_argument(
        "--dtypes", type=listed(*DTYPES), metavar="D,D", help=f"of {', '.join(DTYPES)} (default: fp32,bf16)"
    )
    top.add_argument(
        "--cache", type=listed(*CACHES), metavar="C,C", help="state of the caches before a call (default: warm,cold)"
    )
    add_timing_options(top, BUDGET, "one line of the table")
    top.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="start no call after so long, and take the ops in turn (default: no limit)",
    )
    top.add_argument(
        "--refcheck",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="check results against float64 (default)",
    )
    top.add_argument("--quick", action="store_true", help="few calls, briefly: to see it run, not to compare")
    top.add_argument("--overhead", action="store_true", help="measure instead what a call costs on 1x8x2x2")
    top.add_argument(
        "--again", action="store_true", help="measure only what the file of --csv lacks, or has wrong or disturbed"
    )
    add_report_options(top)
    return top


def run(args: argparse.Namespace) -> int:
    if reported(args, report.summary, draw):
        return 0
    check(args)
    if args.csv is not None:
        open_csv(args.csv, COLUMNS)
    with (
        timing.settings(args.threads, args.allocator == "keep"),
        torch.inference_mode(),
        fresh_compiler_cache("compile" in args.peers),
    ):
        rows = benchmark(args)
    if not rows:
        print("Nothing is left to measure.")
        return 0
    print()
    print("\n".join(report.summary(as_text(rows), has_targets=not args.quick)))
    return 1 if any(row["status"] != OK for row in rows) else 0


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for what cannot be measured here."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and there is none: use --device cpu")
    for op in args.op:
        for name in args.backends or ():
            able, reason = ops.backends(op)[name]
            if not able or BACKENDS[name].device not in (None, args.device):
                reason = reason or f"it is made for a {BACKENDS[name].device} device"
                raise ValueError(f"--backends {name} cannot run {op} here: {reason}")
    if "chunked" in args.peers and (reason := triton_launch.unavailable()):
        raise ValueError(f"--peers chunked cannot run here: {reason}")
    if args.again and args.csv is None:
        raise ValueError("--again needs --csv: name the file whose gaps are to be filled")


def benchmark(args: argparse.Namespace) -> list[Row]:
    """Measure every cell, print it, and write it to the CSV file as soon as it is measured."""
    start = time.perf_counter()
    device = torch.device(args.device)
    timer = timer_for(args)
    caches = ["warm"] if args.overhead or (args.quick and not args.cache) else args.cache or list(CACHES)
    common = {**environment(args.device), "llc_bytes": timer.cache_bytes}
    columns = columns_for(args)
    table = Table({**HEADS, **dict.fromkeys(columns, ">17")})
    print("Microseconds per call, the median; in brackets, how many times as fast as eager;", end=" ")
    print("~ marks a time that other processes disturbed.")
    print(table.head)
    rows: list[Row] = []
    grid = list(cells(args))
    if args.again and args.csv.exists():
        done = finished(args.csv, caches, common, columns)
        grid = [cell for cell in grid if cell.key not in done]
    if "compile" in args.peers:
        compiled(torch.neg, device)(torch.ones(1, device=device))  # starting the compiler is part of no call's time
    if args.seconds is not None:
        grid = in_turn(grid)
    write = tqdm.write if tqdm else print
    for n, cell in enumerate(tqdm(grid, desc="kernels", mininterval=1.0, disable=None) if tqdm else grid):
        if args.seconds is not None and time.perf_counter() - start > args.seconds:
            left = f"{len(grid) - n} of {len(grid)} calls are left out, the first of them {cell}"
            write(f"{left}: {args.seconds:g} seconds are over")
            break
        providers: dict[str, Provider] = {}
        try:
            providers = providers_of(cell, device, args)
            for cache in caches:
                new = [{**row, **common} for row in measure(cell, providers, cache, timer, args)]
                write(table.line(*labels(cell, cache), *times(new, columns)), file=sys.stdout)
                rows += new
                if args.csv is not None:
                    append(args.csv, [{key: row[key] for key in COLUMNS} for row in new], COLUMNS)
        except torch.OutOfMemoryError as error:
            write(f"LEFT OUT {cell}: {sentence(error)}", file=sys.stderr)
        for name, provider in providers.items():
            if provider.status != OK:
                write(f"FAIL {cell} {name}: {provider.status.removeprefix('FAIL: ')}", file=sys.stderr)
        del providers
        if "compile" in args.peers:
            gc.collect()  # compiled functions are in cycles, and hold on to tensors
    return rows


def timer_for(args: argparse.Namespace) -> Timer:
    if args.device == "cpu":
        return timing.CpuTimer()
    torch.backends.cudnn.allow_tf32 = False  # float32 is checked to float32's precision
    return timing.CpuTimer(torch.cuda.synchronize) if args.overhead else timing.CudaTimer()


def columns_for(args: argparse.Namespace) -> list[str]:
    """The providers that have a column in the table."""
    columns = ["copy", *["empty"] * (args.device == "cuda"), *[peer for peer in PEERS if peer in args.peers]]
    wanted = [name for name in BACKENDS if name in (args.backends or BACKENDS)]
    return columns + [name for name in wanted if BACKENDS[name].device in (None, args.device)]


def finished(path: Path, caches: Sequence[str], common: Row, columns: Sequence[str]) -> set[tuple[str, ...]]:
    """Keys of the cells that the file already has.

    These were measured on this machine with as many threads, in all states of the caches, with a right result and an
    undisturbed time of every provider that can run here.
    """
    here = [str(common[name]) for name in report.MACHINE]
    wanted = {
        op: {
            name
            for name in columns
            if op in OPS_OF.get(name, (op,)) and (name not in BACKENDS or ops.backends(op)[name][0])
        }
        for op in peers.EAGER
    }
    count: Counter[tuple[str, ...]] = Counter()
    for group in report.groups(read(path)) if path.stat().st_size else []:
        labels = group.labels
        known = {name for name, row in group.rows.items() if row["quiet"] == "1"}
        if (
            [labels[name] for name in report.MACHINE] == here
            and labels["cache"] in caches
            and known >= wanted[labels["kernel_name"]]
        ):
            call = json.loads(labels["extra_benchmark_config_str"])["call"]
            count[labels["kernel_name"], labels["shapes"], call, labels["batch"], labels["dtype"]] += 1
    return {key for key, states in count.items() if states == len(caches)}


def measure(
    cell: Cell, providers: dict[str, Provider], cache: str, timer: Timer, args: argparse.Namespace
) -> Iterator[Row]:
    """A row for each provider."""
    samples: dict[str, timing.Sample] = {}
    for name, provider in providers.items():
        if provider.status != OK:
            continue
        # a yardstick must run; another provider may fail, for example where it cannot be captured in a graph
        passed_on = (Exception,) if name in YARDSTICKS else (torch.OutOfMemoryError,)
        sample, provider.status = attempt(partial(getattr(timer, cache), provider.run), *passed_on)
        if sample is not None:
            samples[name] = sample
    taken = timing.interleave(samples, args.budget or (QUICK_BUDGET if args.quick else BUDGET))
    itemsize = DTYPES[cell.dtype].itemsize * cell.batch
    medians = {name: timing.quantiles(mine)[0] for name, mine in taken.items()}
    copy_rate = 2 * cell.call.elements * itemsize / medians["copy"]
    for name, provider in providers.items():
        row: Row = {
            **dict.fromkeys(COLUMNS, ""),
            "kernel_name": cell.call.op,
            "kernel_provider": name,
            "kernel_operation_mode": "forward",
            "metric_name": "overhead" if args.overhead else "time",
            "metric_unit": "us",
            "x_name": "bytes",
            "x_label": "size of the main tensor in bytes",
            "x_value": cell.call.elements * itemsize,
            "extra_benchmark_config_str": json.dumps({"call": str(cell.call), **asdict(cell.call)}),
            "backend": name if name in BACKENDS else "",
            "resolved_backend": {"compile": "inductor"}.get(name, name if name in BACKENDS else "torch"),
            "status": provider.status,
            "max_abs_err": provider.error,
            "compile_s": provider.compile_s,
            "cache": cache,
            "dtype": cell.dtype,
            "batch": cell.batch,
            "shapes": cell.network,
            "calls_per_evaluation": cell.count,
        }
        if name in taken:
            row |= timing.columns(taken[name], 1e6)
            if name != "empty":
                rate = (2 * cell.call.elements if name == "copy" else cell.call.moved) * itemsize / medians[name]
                row |= {"gb_per_s": rate / 1e9, "percent_of_copy": 100 * rate / copy_rate}
                if "eager" in medians:
                    row["speedup_over_eager"] = medians["eager"] / medians[name]
        yield row


HEADS = {"op": "<15", "shapes": "<8", "call": "<30", "batch": ">5", "dtype": "<5", "cache": "<5"}


def labels(cell: Cell, cache: str) -> tuple[object, ...]:
    return cell.call.op, cell.network, cell.call, cell.batch, cell.dtype, cache


def times(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """A cell of the table for each provider."""
    found = {row["kernel_provider"]: row for row in rows}
    cells = []
    for name in columns:
        row = found.get(name)
        if row is None:
            cells.append("-")
        elif row["status"] != OK:
            cells.append("FAIL")
        else:
            speedup = row["speedup_over_eager"]
            bracket = f" ({speedup:.2f}x)" if isinstance(speedup, float) and name not in ("copy", "eager") else ""
            cells.append(f"{row['y_value_50']:.1f}{'' if row['quiet'] else '~'}{bracket}")
    return cells


def environment(device: str) -> Row:
    """The columns that are the same in all rows of a run."""
    return {
        "gpu_name": torch.cuda.get_device_name() if device == "cuda" else "",
        "timestamp": timestamp(),
        "torch": str(torch.__version__),
        **versions("triton"),
        "driver": driver() if device == "cuda" else "",
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "coalescer_fast": coalescer_fast.__version__,
    }
