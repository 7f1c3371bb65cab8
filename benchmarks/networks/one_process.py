"""`benchmarks.networks --device cuda`: a network on a GPU, all providers in one process, one after the other.

    python -m benchmarks.networks --device cuda --model sd-turbo --peers eager,compile --seconds 120 --csv F.csv

- coalescer_fast: `coalescer_fast.accelerate` of the module, which captures a CUDA graph;
- eager_channels_last: torch as it is, channels innermost (`--peers eager`);
- eager_graph: the same, captured in a CUDA graph by hand (likewise);
- compile: torch.compile in channels_last (`--compile-mode`: reduce-overhead and max-autotune have CUDA graphs).

All run the same module, whose random weights are rounded to the dtype, and take their turn in this order, so that ours
is measured even if the time is over before a compiler is done. The truth is a copy of it in float32, without TF32; a
provider whose relative RMS error is above the limit of its dtype has no time.

y_value_50 is by CUDA events around calls in a row, whose launches the host may hide behind the work of the call before;
latency_ms is of one call alone, from the host, until its result is there. prepare_s is from the module to the first
result. peak_gpu_mb is the most memory of tensors while the provider was prepared and measured, weights included, and
reserved_gpu_mb what torch's allocator held for it, CUDA graphs included. percent_of_peak is of the rate of a product of
large matrices in this dtype.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import coalescer_fast
from coalescer_fast.bench import environment as machine
from coalescer_fast.bench import timing
from coalescer_fast.bench.errors import relative_errors
from coalescer_fast.bench.peers import OK, Missing, TimeIsOver, alarm, attempt
from coalescer_fast.runtime.native.module import runtime_of

from ..harness.results import Row, Text, append, open_csv
from . import models

OURS = "coalescer_fast"
PEERS = {"eager": ("eager_channels_last", "eager_graph"), "compile": ("compile",)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {"fp32": 0.01, "bf16": 0.2}  # largest relative error of a provider that has a time
COLUMNS = (
    *("model", "scale", "size", "batch", "provider", "dtype", "metric_unit", *timing.TIMES, "samples", "latency_ms"),
    *("parameters", "gflop", "gflop_per_s", "peak_gflop_per_s", "percent_of_peak", "prepare_s", "peak_gpu_mb"),
    *("reserved_gpu_mb", "error", "mode", "status", "timestamp", "gpu", "cpu", "threads", "python", "torch", "triton"),
    *("diffusers", "coalescer_fast"),
)
PEAK_SIDE = {"cuda": 8192, "cpu": 512}  # of the matrices
SAMPLE_SECONDS, MOST_CALLS = 0.1, 100  # of a measurement

Call = Callable[[], Tensor]


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Measure, print and write rows; the exit status.

    Args:
        args: of the command line.
        device: a GPU. On a CPU all but CUDA graphs can be tried out.
    """
    if args.csv is not None:
        open_csv(args.csv, COLUMNS)
    end = time.monotonic() + args.seconds if args.seconds else float("inf")
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    labels = {**environment(), "mode": "", "timestamp": machine.timestamp(), "metric_unit": "ms"}
    statuses = []
    for model in args.model:
        for dtype in args.dtypes:
            for row in benchmark(args, model, dtype, device, end):
                statuses.append((str(row["provider"]), str(row["status"])))
                if args.csv is not None:
                    append(args.csv, [{**dict.fromkeys(COLUMNS, ""), **labels, **row}], COLUMNS)
                print(line(row), flush=True)
    ours = [status for provider, status in statuses if provider == OURS]
    return 0 if OK in ours and not any(status.startswith("FAIL") for _, status in statuses) else 1


def benchmark(args: argparse.Namespace, model: str, dtype: str, device: torch.device, end: float) -> Iterator[Row]:
    """The rows of a model, each as soon as it is known."""
    size = args.size or models.NETWORKS[model].size
    count = models.parameters(models.on_meta(model, args.scale))
    gflop = models.gflop(model, args.batch, size, args.scale)
    print(f"{model}, scale {args.scale:g}, {count / 1e6:.1f} M parameters, {gflop:.4g} GFLOP", flush=True)
    what: Row = {"model": model, "scale": args.scale, "size": size, "batch": args.batch, "dtype": dtype}
    what |= {"parameters": count, "gflop": gflop}
    names = [OURS, *(name for peer in args.peers for name in PEERS[peer])]
    kind = DTYPES[dtype]
    module = models.make(model, args.scale, kind, device=device)
    nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload]
    given = tree_map_only(
        Tensor, lambda x: x.to(device), models.inputs(model, args.batch, size, args.scale, dtype=kind)
    )
    expected = truth(module, given)
    top = peak(kind, device)
    for name in names:
        row: Row = what | {"provider": name, "peak_gflop_per_s": top}
        left = end - time.monotonic()
        if left <= 0:
            yield row | {"status": "skipped: the time is over"}
            continue
        modes = [args.compile_mode] * (name == "compile") + ["cudnn.benchmark"] * args.cudnn_benchmark
        row["mode"] = ", ".join(modes)
        provide = PROVIDERS[name]
        forget(device)
        try:
            with alarm(left):
                found, status = attempt(lambda: measured(provide, args, module, given, expected, device))  # noqa: B023
        except TimeIsOver:
            found, status = None, "skipped: the time was over before it was measured"
        finally:
            if runtime_of(module) is not None:
                coalescer_fast.restore(module)
        row |= found or {}
        row["status"] = status
        if found and not float(row["error"]) <= LIMITS[dtype]:
            for column in (*timing.TIMES, "latency_ms"):
                row.pop(column, None)
            row["status"] = f"FAIL: error {row['error']:.3g} is above {LIMITS[dtype]:g}"
        elif found:
            rate = gflop / float(row["y_value_50"]) * 1e3
            row |= {"gflop_per_s": rate, "percent_of_peak": 100 * rate / top}
        yield row


def measured(
    provide: Callable[..., Call],
    args: argparse.Namespace,
    module: nn.Module,
    given: dict[str, Any],
    expected: Tensor,
    device: torch.device,
) -> Row:
    """What is known of a provider: its error, times and memory."""
    start = time.perf_counter()
    call = provide(args, module, given)
    result = call()
    synchronize(device)
    row: Row = {"prepare_s": time.perf_counter() - start}
    for _ in range(3):
        result = call()
    [row["error"]] = relative_errors((result.float(),), (expected,))
    taken = [timing.Measurement(seconds) for seconds in in_a_row(call, args.rounds, device)]
    row |= {name: value for name, value in timing.columns(taken, 1e3).items() if name != "quiet"}
    row["latency_ms"] = 1e3 * statistics.median(latency(call, device) for _ in range(4 * args.rounds))
    if device.type == "cuda":
        row["peak_gpu_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
        row["reserved_gpu_mb"] = torch.cuda.max_memory_reserved(device) / 1e6
    if args.profile:
        shown, status = attempt(lambda: "\n".join(profile(call, device)))
        print(shown or f"    no profile: {status}", flush=True)
    return row


# Providers: what makes the call that is timed.


def ours(args: argparse.Namespace, module: nn.Module, given: dict[str, Any]) -> Call:
    """`coalescer_fast.accelerate` in the module's own dtype."""
    coalescer_fast.accelerate(module, dtype=next(module.parameters()).dtype)
    runtime = runtime_of(module)
    assert runtime is not None

    def call() -> Tensor:
        with torch.inference_mode():
            result = models.evaluate(module, given)
        if runtime.refused:
            raise RuntimeError(f"the module runs in torch: {runtime.refused}")
        return result

    return call


def eager(args: argparse.Namespace, module: nn.Module, given: dict[str, Any]) -> Call:
    def call() -> Tensor:
        with torch.inference_mode():
            return models.evaluate(module, given)

    return call


def eager_graph(args: argparse.Namespace, module: nn.Module, given: dict[str, Any]) -> Call:
    """A CUDA graph of the module, captured by hand. Raises Missing without a GPU."""
    if not next(iter(models.flat(given).values())).is_cuda:
        raise Missing("it needs a CUDA device")
    run = eager(args, module, given)
    output: list[Tensor] = []

    def fill() -> None:
        output[:] = [run()]

    graph = timing.CudaTimer().capture(fill, 1)

    def call() -> Tensor:
        graph.replay()
        return output[0]

    return call


def compiled(args: argparse.Namespace, module: nn.Module, given: dict[str, Any]) -> Call:
    """torch.compile, static shapes; a graph of its own is captured in the calls after the first."""
    tensors = tuple(models.flat(given).values())
    function = torch.compile(models.Flat(module, given), dynamic=False, fullgraph=True, mode=args.compile_mode)

    def call() -> Tensor:
        with torch.no_grad():
            result: Tensor = function(*tensors)
            return result.clone()  # the next run overwrites it

    return call


PROVIDERS: dict[str, Callable[..., Call]] = {
    OURS: ours,
    "eager_channels_last": eager,
    "eager_graph": eager_graph,
    "compile": compiled,
}


# The device.


def truth(module: nn.Module, given: dict[str, Any]) -> Tensor:
    """The result of a copy of the module in float32, without TF32."""
    twin = nn.Module.float(copy.deepcopy(module))
    exact = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, given)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return models.evaluate(twin, exact)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget(device: torch.device) -> None:
    """Give back what nobody holds, so that memory is that of the next provider."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def in_a_row(call: Call, rounds: int, device: torch.device) -> Iterator[float]:
    """Seconds of a call, of so many measurements, each of several calls."""
    calls = max(1, min(MOST_CALLS, round(SAMPLE_SECONDS / latency(call, device))))
    for _ in range(rounds):
        if device.type != "cuda":
            yield statistics.mean(latency(call, device) for _ in range(calls))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # the device is at work while the host goes ahead
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        yield start.elapsed_time(end) / 1e3 / calls


def latency(call: Call, device: torch.device) -> float:
    """Seconds of one call alone."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def peak(dtype: torch.dtype, device: torch.device) -> float:
    """Billions of operations a second of a product of large matrices; the best of several."""
    n = PEAK_SIDE[device.type]
    a, b = (torch.randn(n, n, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    best = min(in_a_row(lambda: a @ b, 5, device))
    return 2 * n**3 / best / 1e9


def profile(call: Call, device: torch.device, most: int = 25) -> Iterator[str]:
    """The kernels of a call: milliseconds, how many, name; those that take longest first."""
    kind = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as found:
        call()
        synchronize(device)
    column = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [(getattr(each, column) / 1e3, each.count, each.key) for each in found.key_averages()]
    rows = sorted((each for each in events if each[0]), reverse=True)
    yield f"    {sum(ms for ms, *_ in rows):.3f} ms in {sum(count for _, count, _ in rows)} kernels"
    for ms, count, name in rows[:most]:
        yield f"    {ms:8.3f} ms {count:5}  {name[:100]}"


# Reports.


def line(row: Row) -> str:
    head = f"  {row['provider']:20} {row['dtype']:5}"
    if "y_value_50" not in row:
        return f"{head} {row['status']}"
    words = f"{head} {row['y_value_50']:9.3f} ms in a row, {row['latency_ms']:9.3f} ms alone,"
    words += f" {row['percent_of_peak']:4.0f} % of peak  error {row['error']:.1e}"
    words += f"  {row['peak_gpu_mb']:.0f} MB" if "peak_gpu_mb" in row else ""
    return f"{words}  prepared in {row['prepare_s']:.1f} s"


def tables(rows: Sequence[Text]) -> Iterator[str]:
    """For each network the times of its latest rows, in Markdown."""
    groups: dict[tuple[str, ...], dict[str, Text]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("gpu", "model", "scale", "size", "batch", "dtype"))
        groups.setdefault(key, {})[row["provider"]] = row
    for (gpu, model, scale, size, batch, dtype), mine in groups.items():
        yield f"**{model}**, widths times {scale}, latents {size}×{size}, batch {batch}, {dtype}: {gpu}"
        yield from (
            "",
            "| provider | ms in a row | ms alone | % of peak | error, % | MB |",
            "|---|---|---|---|---|---|",
        )
        for name, row in mine.items():
            if row["y_value_50"]:
                shares = f"{float(row['percent_of_peak']):.0f} | {100 * float(row['error']):.2g} | {row['peak_gpu_mb']}"
                yield f"| {name} | {row['y_value_50']} | {row['latency_ms']} | {shares} |"
            else:
                yield f"| {name} | {row['status']} | | | | |"
        yield ""


def environment() -> Row:
    found = machine.environment() | machine.versions("triton", "diffusers")
    return {**found, "coalescer_fast": coalescer_fast.__version__}
