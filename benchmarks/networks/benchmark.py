"""Other people's networks, diffusers' own UNets and decoders, beside every strong way to run them.

    python -m benchmarks.networks --model sd-turbo,tiny-vae --csv benchmarks/results/cpu/networks.csv
    python -m benchmarks.networks --model sd-turbo --isa avx2 --csv benchmarks/results/cpu/networks.csv
    python -m benchmarks.networks --summary benchmarks/results/cpu/networks.csv
    python -m benchmarks.networks --model sd-turbo --dtypes bf16,int8 --profile
    python -m benchmarks.networks --device cuda --model sd-turbo --peers eager,compile --seconds 120 --csv F.csv

On a GPU `one_process` measures, which says how; the rest of this is about a CPU.

Weights are random and the same for all; nothing is downloaded. Each provider runs in a process of its own:

- coalescer_fast: `coalescer_fast.accelerate` of the module, in float32, bfloat16 and int8;
- eager: contiguous, as users have it; eager_channels_last; compile: torch.compile in channels_last, weights frozen;
- openvino: for latency, float32 from an IR in float32 and bfloat16 from an IR in half precision, OpenVINO's default;
  its bfloat16 rounds the timestep, too (999 is 1000), which is most of its error; openvino_int8: NNCF's post-training
  quantization (preset mixed, model type transformer), the rest in bfloat16; needs `pip install nncf`;
- onnxruntime: float32, all optimisations.

Checkpoints of bf16 and int8 are in bfloat16 for torch and coalescer_fast. int8 is calibrated on the same three calls,
at three timesteps, for all. Every result is compared with eager float32 by the relative RMS error; a provider whose
error is above the limit of its dtype has no time.

Columns: convert_s is what is done once and kept on disk (export, quantization), in a process of its own; prepare_s is
from weights to the first result; cold_s from the start of a process to the first result, imports included, reading
weights not; cached_cold_s the same in a second process that finds a cache (--cached); peak_rss_mb the most memory that
the process that runs the network has held. percent_of_peak is of the fastest product of large matrices that torch
makes in the row's dtype or in float32, under the same cap. order is "in turn" where the processes take rounds one after
the other, "alone" where memory does not allow that. avx512_percent says how often AVX-512 was found in use: see `isa`,
which also says how far each library obeys --isa; without a cap the C library itself uses AVX-512.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import coalescer_fast
from coalescer_fast.bench import environment as machine
from coalescer_fast.bench import timing
from coalescer_fast.bench.errors import relative_errors
from coalescer_fast.bench.peers import OK, Missing, attempt
from coalescer_fast.ops import native_library
from coalescer_fast.runtime.native.module import runtime_of

from ..harness import profile as profiles
from ..harness.arguments import Parser, command, listed, positive
from ..harness.results import Row, append, as_text, open_csv, read
from . import isa as instruction_sets
from . import models, one_process, report
from .providers import OURS, PROVIDERS, network
from .providers import coalescer_fast as coalescer_fast_call
from .task import DTYPES, INPUTS, Task

DEFAULT = ("eager", "compile", "openvino", "openvino_int8", "onnxruntime")
ROUNDS = 5
LIMITS = {"fp32": 0.01, "bf16": 0.2, "int8": 0.3}  # largest relative error of a provider that has a time
REST = 5e-3  # seconds until the idle threads of the process before have stopped spinning
COPIES = 3  # of the weights in float32 that a process may hold
BASE = 1.5e9  # bytes that a process may hold beside weights
RESULTS = (
    "convert_s",
    "prepare_s",
    "cold_s",
    "cached_cold_s",
    "peak_rss_mb",
    "convert_rss_mb",
    "error",
    "avx512_percent",
)

COLUMNS = (
    *("model", "scale", "size", "batch", "provider", "dtype", "isa", "metric_unit", *timing.TIMES, "samples", "quiet"),
    *("order", "speedup_over_eager", "parameters", "gflop", "gflop_per_s", "peak_gflop_per_s", "percent_of_peak"),
    *(*RESULTS, "keep_weights", "status", "timestamp", "cpu", "threads", "python", "torch", "diffusers"),
    *("openvino", "nncf", "onnxruntime", "onnx", "coalescer_fast"),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return command("python -m benchmarks.networks", lambda: run(args))


def parser() -> Parser:
    top = Parser(prog="python -m benchmarks.networks", description=__doc__.partition("\n")[0])
    names = tuple(models.NETWORKS)
    top.add_argument("--model", type=listed(*names), default=["sd-turbo"], metavar="M,M", help=f"of {', '.join(names)}")
    top.add_argument(
        "--scale", type=fraction, default=1.0, metavar="F", help="multiplies the networks' widths (default: 1)"
    )
    top.add_argument("--size", type=positive, metavar="N", help="height and width of the latents (default: its own)")
    top.add_argument("--batch", type=positive, default=1, metavar="N", help="default: 1")
    top.add_argument(
        "--dtypes",
        type=listed(*DTYPES),
        metavar="D,D",
        help=f"default: {','.join(DTYPES)}, with --isa fp32,int8",
    )
    peers = [name for name in PROVIDERS if name != OURS]
    top.add_argument(
        "--peers",
        type=listed(*peers, "none"),
        metavar="P,P",
        help=f"of {', '.join(peers)}, none (default: {','.join(DEFAULT)}; of these on a GPU eager, compile)",
    )
    top.add_argument("--isa", choices=sorted(instruction_sets.CAPS), default="", help="cap all to this instruction set")
    top.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's own choice)")
    top.add_argument("--rounds", type=positive, default=ROUNDS, metavar="N", help="default: %(default)s")
    top.add_argument(
        "--order",
        choices=["auto", "turn", "alone"],
        default="auto",
        help="whether all processes are there at once and take rounds in turn (default: if they fit in memory)",
    )
    top.add_argument("--cached", action="store_true", help="measure also the start of a process that finds a cache")
    top.add_argument(
        "--keep-weights",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="argument of coalescer_fast.accelerate (default: yes)",
    )
    top.add_argument(
        "--profile",
        action="store_true",
        help="measure instead the steps of coalescer_fast's own programs, one by one, by kind, form and shape",
    )
    top.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    top.add_argument("--seconds", type=float, metavar="S", help="start nothing more after so many")
    top.add_argument(
        "--compile-mode",
        choices=["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "default"],
        default="reduce-overhead",
        help="of torch.compile on a GPU (default: %(default)s)",
    )
    top.add_argument(
        "--cudnn-benchmark", action="store_true", help="have cuDNN measure its algorithms for all, on a GPU"
    )
    top.add_argument("--csv", "--out", type=Path, dest="csv", metavar="F.csv", help="add the results to a file")
    top.add_argument("--summary", type=Path, metavar="F.csv", help="print the table of a file, measure nothing")
    return top


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, at most 1")
    return value


def run(args: argparse.Namespace) -> int:
    if args.summary is not None:
        found = read(args.summary)
        print("\n".join((one_process if found and "latency_ms" in found[0] else report).tables(found)))
        return 0
    if args.device == "cuda":
        return one_process.run(for_a_gpu(args), torch.device("cuda", 0))
    args.peers = list(DEFAULT) if args.peers is None else args.peers
    args.dtypes = args.dtypes or [dtype for dtype in DTYPES if dtype != "bf16" or not args.isa]
    peaks: dict[str, float] = {}
    if args.profile:
        return profile(args, peaks)
    if args.csv is not None:
        open_csv(args.csv, COLUMNS)
    rows: list[Row] = []
    labels = environment(args)
    end = time.monotonic() + args.seconds if args.seconds else float("inf")
    for model in args.model:
        for row in benchmark(args, model, peaks, end):
            rows.append({**dict.fromkeys(COLUMNS, ""), **labels, **row})
            if args.csv is not None:
                append(args.csv, rows[-1:], COLUMNS)
    print()
    print("\n".join(report.tables(as_text(rows))))
    ran = any(row["status"] == OK for row in rows if row["provider"] == OURS)
    return 1 if any(str(row["status"]).startswith("FAIL") for row in rows) or not ran else 0


def for_a_gpu(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with the defaults of a GPU. Raises ValueError for those that are for a CPU."""
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device: leave --device out")
    peers = list(one_process.PEERS) if args.peers is None else [name for name in args.peers if name != "none"]
    dtypes = args.dtypes or ["bf16"]
    for wanted, known in ((peers, one_process.PEERS), (dtypes, one_process.DTYPES)):
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(f"{unknown[0]} is for a CPU: use some of {', '.join(known)} with --device cuda")
    return argparse.Namespace(**{**vars(args), "peers": peers, "dtypes": dtypes})


def profile(args: argparse.Namespace, peaks: dict[str, float]) -> int:
    """Print where the programs of each model and dtype spend their time, all in this process."""
    if reason := native_library.unavailable():
        raise ValueError(f"there is nothing to measure: {reason}")
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "int8"}
    ran = False
    for model, dtype in itertools.product(args.model, args.dtypes):
        with tempfile.TemporaryDirectory(prefix="networks-") as folder:
            task = task_of(args, model, folder, name=OURS, dtype=dtype)
            module = network(task)
            try:
                call = coalescer_fast_call(task, module)
            except Missing as reason:
                print(f"{model} {dtype} skipped: {reason}")
                continue
            call()
            ran = True
            runtime = runtime_of(module)
            assert runtime is not None
            program = runtime.programs.last
            assert program is not None
            timer = timing.CpuTimer().warm(call)
            whole = timing.quantiles([timer() for _ in range(args.rounds)])[0]
            print(f"{model} {dtype}, batch {task.batch}, {task.threads} threads: {1e3 * whole:.2f} ms a call")

            def peak(dtype: torch.dtype, task: Task = task) -> float:
                return highest(replace(task, dtype=names[dtype]), peaks)

            print("\n".join(profiles.report(program, peak, args.rounds)), flush=True)
    return 0 if ran else 1


def task_of(args: argparse.Namespace, model: str, folder: str, name: str = "eager", dtype: str = "fp32") -> Task:
    """What a provider is told, which finds inputs in the folder."""
    size = args.size or models.NETWORKS[model].size
    return Task(
        *("run", name, dtype, model, args.scale, size, args.batch),
        *(args.threads or torch.get_num_threads(), args.isa, folder, args.keep_weights),
    )


@dataclass
class Running:
    """A provider's process, and what is known of it.

    Attributes:
        task: that it was given.
        row: its results so far.
        process: None before its start and after its end.
        taken: measurements.
    """

    task: Task
    row: Row
    process: Process | None = None
    taken: list[timing.Measurement] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.row["status"] == OK


# Starts a worker with the package that is installed: the checkout, which has the benchmarks, comes last.
WORKER = """
import runpy, sys
sys.path.append(sys.argv.pop(1))
runpy.run_module("benchmarks.networks.worker", run_name="__main__", alter_sys=True)
"""


class Process:
    """A process of `worker`. Its answers are read one by one; what else it prints is kept for errors."""

    def __init__(self, task: Task):
        self.log = task.path(f"log-{task.stage}-{task.name}-{task.dtype}.txt")
        threads = {name: str(task.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        root = str(Path(__file__).parents[2])
        compiled = {"TORCHINDUCTOR_CACHE_DIR": task.cache or str(task.path(f"inductor-{task.dtype}"))}
        caps = instruction_sets.CAPS[task.isa] if task.isa else {}
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORKER, root, task.to_json(), repr(time.monotonic())],
                env={**os.environ, **threads, **compiled, **caps},
                cwd=os.sep,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def answer(self, question: str = "") -> dict[str, Any]:
        """What the process says next.

        Raises:
            Missing: it cannot run here.
            RuntimeError: it has ended without an answer.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if question:
            print(question, file=self.process.stdin, flush=True)
        text = self.process.stdout.readline()
        if not text:
            raise RuntimeError(self.why())
        found: dict[str, Any] = json.loads(text)
        if "missing" in found:
            raise Missing(found["missing"])
        return found

    def why(self) -> str:
        """Why the process has ended: its last words, or the signal."""
        code = self.process.wait()
        words = [line for line in self.log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        return f"the process was killed by signal {-code}" if code < 0 else words[-1] if words else f"status {code}"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def benchmark(
    args: argparse.Namespace, model: str, peaks: dict[str, float], end: float = float("inf")
) -> Iterator[Row]:
    """The rows of a model, each printed as soon as it is known; no provider is started after the time ``end``."""
    size = args.size or models.NETWORKS[model].size
    count = models.parameters(models.on_meta(model, args.scale))
    gflop = models.gflop(model, args.batch, size, args.scale)
    what: Row = {"model": model, "scale": args.scale, "size": size, "batch": args.batch, "isa": args.isa}
    print(f"{model}, scale {args.scale:g}, {count / 1e6:.1f} M parameters, {gflop:.4g} GFLOP", flush=True)
    with tempfile.TemporaryDirectory(prefix="networks-") as folder:
        base = task_of(args, model, folder)
        for timestep in models.TIMESTEPS:
            given = models.flat(models.inputs(model, args.batch, size, args.scale, timestep))
            arrays: dict[str, Any] = {name: x.numpy() for name, x in given.items()}
            np.savez(base.path(INPUTS.format(timestep)), **arrays)
        found = [Running(task, {"status": OK}) for task in tasks(args, base)]
        together = args.order == "turn" or (args.order == "auto" and fit(len(found), count))
        conversions: dict[str, tuple[Row, str]] = {}
        try:
            for each in found:
                if time.monotonic() > end:
                    each.row["status"] = "skipped: the time is over"
                    continue
                start(each, conversions, base)
                if not together:
                    measure([each], args.rounds)
                    finish(each, args)
            if together:
                measure(found, args.rounds)
                for each in found:
                    finish(each, args)
        finally:
            for each in found:
                if each.process is not None:
                    each.process.end()
        reference = timing.quantiles(found[0].taken)[0] if found[0].taken else float("nan")
        for each in found:
            row = what | {"provider": each.task.name, "dtype": each.task.dtype} | each.row
            row |= {"parameters": count, "gflop": gflop, "order": "in turn" if together else "alone"}
            row["keep_weights"] = "" if each.task.name != OURS else int(args.keep_weights)
            if each.taken:
                row |= timing.columns(each.taken, 1e3)
                seconds = timing.quantiles(each.taken)[0]
                top = highest(each.task, peaks)
                row |= {"speedup_over_eager": reference / seconds, "gflop_per_s": gflop / seconds}
                row |= {"peak_gflop_per_s": top, "percent_of_peak": 100 * gflop / seconds / top}
            print(line(row), flush=True)
            yield row


def tasks(args: argparse.Namespace, base: Task) -> Iterator[Task]:
    """What each provider is told; the first is eager float32, the truth, in any case."""
    yield base
    for name, provider in PROVIDERS.items():
        for dtype in provider.dtypes:
            wanted = (name == OURS or name in args.peers) and dtype in args.dtypes
            if wanted and (name, dtype) != (base.name, base.dtype):
                yield replace(base, name=name, dtype=dtype)


def fit(processes: int, count: int) -> bool:
    """Whether so many processes that run a network of so many parameters fit in memory at the same time."""
    return processes * (BASE + COPIES * 4 * count) < available()


def available() -> float:
    """Bytes of memory that are free or can be freed; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024.0
    except (OSError, StopIteration):
        return 0.0


def start(each: Running, conversions: dict[str, tuple[Row, str]], base: Task) -> None:
    """Convert what the provider needs, start its process, wait until it is prepared, and check its result."""
    provider = PROVIDERS[each.task.name]
    if each.task.isa and provider.uncapped:
        each.row["status"] = f"skipped: {provider.uncapped}"
        return
    for name in provider.conversions:
        if name not in conversions:
            done, status = attempt(lambda name=name: alone(replace(base, stage="convert", name=name)))  # type: ignore[misc]
            conversions[name] = (done or {}, status)
        done, status = conversions[name]
        if status != OK:
            each.row["status"] = status
            return
        each.row["convert_s"] = float(each.row.get("convert_s", 0)) + float(done["seconds"])
        each.row["convert_rss_mb"] = max(float(each.row.get("convert_rss_mb", 0)), float(done["peak_rss_mb"]))
    each.process = Process(each.task)
    answer, each.row["status"] = attempt(each.process.answer)
    if answer is None:
        stop(each)
        return
    each.row |= answer
    if wrong := check(each, base):
        each.row["status"] = f"FAIL: {wrong}"
        stop(each)


def check(each: Running, base: Task) -> str:
    """Put the relative RMS error of the result into the row; what is wrong with it, or ""."""
    result, expected = (torch.from_numpy(np.load(path)) for path in (each.task.result, base.result))
    if result.shape != expected.shape:
        return f"result has shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
    [error] = relative_errors((result,), (expected,))
    each.row["error"] = error
    limit = LIMITS[each.task.dtype]
    return "" if error <= limit else f"error {error:.3g} is above {limit:g}"  # NaN is wrong, too


def alone(task: Task) -> Row:
    """The only answer of a process."""
    process = Process(task)
    try:
        return process.answer()
    finally:
        process.end()


def measure(found: Sequence[Running], rounds: int) -> None:
    """Measurements of the processes, in turn, each round beginning with another one."""
    running = [each for each in found if each.ok]
    for n in range(rounds):
        first = n % max(1, len(running))
        for each in running[first:] + running[:first]:
            assert each.process is not None
            time.sleep(REST)
            answer, status = attempt(lambda process=each.process: process.answer("measure"))  # type: ignore[misc]
            if answer is None:
                each.row["status"] = status
            else:
                each.taken.append(timing.Measurement(**answer))
        running = [each for each in running if each.ok]


def finish(each: Running, args: argparse.Namespace) -> None:
    """Ask for what is not timed, and end the process."""
    if each.ok and each.process is not None:
        answer, _ = attempt(lambda: each.process.answer("avx512"))  # type: ignore[union-attr]
        if answer is not None and answer["avx512_percent"] is not None:
            each.row |= answer
    stop(each)
    if args.cached and each.ok and each.task.name in CACHES:
        with tempfile.TemporaryDirectory(dir=each.task.folder) as cache:
            for _ in range(2):  # the first one fills the cache
                answer, status = attempt(lambda: alone(replace(each.task, cache=cache)))
            if answer is not None:
                each.row["cached_cold_s"] = answer["cold_s"]
            elif status:
                print(f"  no cache for {each.task.name}: {status}")


CACHES = (OURS, "compile", "openvino", "openvino_int8")


def stop(each: Running) -> None:
    if each.process is not None:
        each.process.end()
        each.process = None


def highest(task: Task, peaks: dict[str, float]) -> float:
    """Billions of operations a second of products in the task's dtype or in float32, whichever is faster."""
    for dtype in {"fp32", task.dtype}:
        if dtype not in peaks:
            answer, _ = attempt(lambda dtype=dtype: alone(replace(task, stage="peak", dtype=dtype)))  # type: ignore[misc]
            peaks[dtype] = float("nan") if answer is None else float(answer["peak"])
    return max(peaks["fp32"], peaks[task.dtype])


def line(row: Row) -> str:
    head = f"  {row['provider']:20} {row['dtype']:5}"
    if "y_value_50" not in row:
        return f"{head} {row['status']}"
    mark = "~" if row["quiet"] == 0 else " "
    words = f"{head} {row['y_value_50']:10.2f}{mark} {row['y_value_20']:10.2f} -{row['y_value_80']:9.2f} ms"
    words += f" ({row['speedup_over_eager']:.2f}x) {row['percent_of_peak']:4.0f} % of peak  error {row['error']:.1e}"
    words += f"  {float(row['peak_rss_mb']):6.0f} MB  prepared in {row['prepare_s']:.1f} s, cold {row['cold_s']:.1f} s"
    return words + (f", AVX-512 at {row['avx512_percent']:.0f} % of looks" if "avx512_percent" in row else "")


def environment(args: argparse.Namespace) -> Row:
    """The columns that are the same in all rows of a run."""
    found = machine.environment()
    del found["gpu"]
    packages = ("diffusers", "openvino", "nncf", "onnxruntime", "onnx")
    found |= {**machine.versions(*packages), "timestamp": machine.timestamp(), "metric_unit": "ms"}
    threads = args.threads or torch.get_num_threads()
    return {**found, "threads": threads, "coalescer_fast": coalescer_fast.__version__}
