"""Speed of the accelerated sampler beside every strong way to run the same networks, in one run.

    python -m benchmarks.sampler --model emoji-64,m --csv benchmarks/results/sampler.csv
    python -m benchmarks.sampler --summary benchmarks/results/sampler.csv
    python -m benchmarks.sampler --model m --profile
    python -m benchmarks.sampler --model m --peers eager,openvino --isa avx2 --csv F    # all capped
    python -m benchmarks.sampler --plot docs/sampler.png --from benchmarks/results/sampler.csv

Parts: unet, one evaluation; sampler, two steps from the conditioning to latents, without guidance and with the model's
own; decoder; pipeline, a whole call, prompt to pictures (the last two of emoji-64 alone). m and l have random weights:
their times mean something, their latents nothing. The providers of a part are measured in turn:

- ours: `coalescer_fast.accelerate`; on a GPU sampler and pipeline are one CUDA graph, unet and decoder are launched
  kernel by kernel;
- ours_int8: the same with dtype="int8", on the CPU; its error is larger, so it is compared with openvino_int8 alone;
- eager: the reference in float32, as users have it; on a GPU it is timed if --peers names it. eager_channels_last:
  channels_last, float32 and bfloat16;
- compile: torch.compile of the reference, channels_last, weights frozen, static shapes; on a GPU max-autotune;
  compile_graphs, on a GPU alone: the same in mode reduce-overhead, which also makes CUDA graphs and compiles sooner;
- onnxruntime: float32, all optimisations; its CPU provider has no bfloat16. openvino: float32 and bfloat16, for
  latency; openvino_int8: the UNet by NNCF's post-training quantization, of ranges in calls with the measured texts and
  other noise, the rest in bfloat16. All on the CPU;
- convolutions: the part's convolutions alone, by torch, weights packed once, in either dtype, on a GPU as one CUDA
  graph: ``percent_of_floor`` is their time over a provider's. What beats torch's own convolutions is above 100.

Conditioning is computed before the clock starts, except in the pipeline. Every result is compared with the reference in
float32 by the relative error of the direction and of the distance, or of the whole result; a provider whose error is
above a tenth has no time. compile_s is the first preparation of a network, without the export to ONNX; what
TORCHINDUCTOR_CACHE_DIR names is kept and used, where it is set. --cold measures new processes instead, from start to
first picture. On a GPU times are by the clock, launches included, as a user waits for them.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import coalescer_fast
from coalescer_fast import sampling
from coalescer_fast.bench import environment as machine
from coalescer_fast.bench import timing
from coalescer_fast.bench.errors import relative_errors
from coalescer_fast.bench.peers import OK, attempt, fresh_compiler_cache
from coalescer_fast.ops import native_library
from coalescer_fast.pipeline import CoalescerPipeline
from coalescer_fast.runtime.eager import EagerRuntime
from coalescer_fast.runtime.native.module import no_programs
from coalescer_fast.runtime.native.runtime import NativeRuntime

from ..harness import profile as profiles
from ..harness.arguments import (
    Parser,
    add_report_options,
    add_timing_options,
    command,
    listed,
    positive_list,
    reported,
)
from ..harness.results import Row, append, as_text, open_csv
from ..networks import isa as instruction_sets
from ..networks.providers import peak as products_peak
from ..networks.task import Task
from . import providers, report
from .plot import draw
from .providers import DTYPES, PEERS, RANDOM, Engine, Tensors

MODELS = ("emoji-64", "m", "l")
PARTS = ("unet", "sampler", "decoder", "pipeline")
PROMPTS = ("octopus", "red apple", "dog", "pizza", "rocket", "umbrella", "tiger", "guitar")
BUDGET = 3.0
PROFILED = 20  # rounds through all steps of a profile
LOOSE = 0.1  # largest relative error of a provider that has a time
COLD = {  # what a new process does between loading and drawing, and how many processes there are
    "eager": ("", 5),
    "ours": ("coalescer_fast.accelerate(pipe)", 5),
    "compile": (
        "import torch, torch._inductor.config as config; config.freezing = True; "
        "[m.to(dtype=torch.bfloat16, memory_format=torch.channels_last) for m in (pipe.unet, pipe.vae)]; "
        "pipe.unet.compile(dynamic=False); pipe.vae.decoder.compile(dynamic=False)",
        2,
    ),
}

COLUMNS = (
    *("model", "part", "guidance_scale", "evaluations", "batch", "provider", "dtype", "metric_unit"),
    *(*timing.TIMES, "images_per_s", "speedup_over_eager", "gflop", "gflop_per_s", "percent_of_floor"),
    *("compile_s", "direction_error", "distance_error", "result_error", "cosine"),
    *("status", "samples", "quiet", "weights", "allocator"),
    *("timestamp", "cpu", "gpu", "threads", "python", "torch", "onnxruntime", "openvino", "coalescer_fast"),
)


@dataclass
class Provider:
    """A way to run a pipeline.

    Attributes:
        name: as in the column provider.
        dtype: of its networks.
        engine: None if it cannot run here or could not be prepared.
        status: "ok", or why there is no engine.
    """

    name: str
    dtype: str
    engine: Engine | None = None
    status: str = OK


@dataclass
class Part:
    """What is measured.

    Attributes:
        name: one of `PARTS`.
        guidance_scale: "" where there is no guidance.
        evaluations: of the UNet.
        prepare: (engine) -> the call that is timed.
    """

    name: str
    guidance_scale: float | str
    evaluations: int
    prepare: Callable[[Engine], Callable[[], Tensors]]


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.isa:
        caps = instruction_sets.CAPS[args.isa]
        if any(os.environ.get(name) != value for name, value in caps.items()):  # libraries read them as they are loaded
            again = [sys.executable, "-m", "benchmarks.sampler", *(sys.argv[1:] if argv is None else argv)]
            os.execve(sys.executable, again, {**os.environ, **caps})
    return command("python -m benchmarks.sampler", lambda: run(args))


def parser() -> Parser:
    top = Parser(prog="python -m benchmarks.sampler", description=__doc__.partition("\n")[0])
    top.add_argument(
        "--model",
        type=listed(*MODELS),
        default=["emoji-64"],
        metavar="M,M",
        help="of emoji-64, m, l (default: emoji-64)",
    )
    top.add_argument("--batch", type=positive_list, default=[1, 16], metavar="N,N", help="default: 1,16")
    top.add_argument(
        "--peers", type=listed(*PEERS, "none"), default=list(PEERS), metavar="P,P", help=f"default: {','.join(PEERS)}"
    )
    top.add_argument("--dtypes", type=listed(*DTYPES), default=list(DTYPES), metavar="D,D", help="default: fp32,bf16")
    top.add_argument(
        "--parts", type=listed(*PARTS), default=list(PARTS), metavar="P,P", help=f"default: {','.join(PARTS)}"
    )
    top.add_argument(
        "--isa", choices=sorted(instruction_sets.CAPS), help="cap all to this instruction set; see networks/isa.py"
    )
    top.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    add_timing_options(top, BUDGET, "one part of a batch")
    top.add_argument(
        "--seconds", type=float, metavar="S", help="start no batch that would end later, judged by the longest so far"
    )
    top.add_argument(
        "--cold", action="store_true", help="measure instead the time to the first picture of a new process"
    )
    top.add_argument(
        "--profile",
        action="store_true",
        help="measure instead the steps of the native UNet's programs, one by one, by kind, form and shape",
    )
    add_report_options(top)
    return top


def run(args: argparse.Namespace) -> int:
    if reported(args, report.summary, draw):
        return 0
    if args.isa:
        native_library.set_isa(args.isa)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and there is none: use --device cpu")
    if args.cold and "emoji-64" not in args.model:
        raise ValueError("--cold draws a picture, which needs the model emoji-64: leave --model away")
    if args.profile:
        with timing.settings(args.threads, args.allocator == "keep"):
            return profile(args)
    if args.csv is not None:
        open_csv(args.csv, COLUMNS)
    rows: list[Row] = []
    with (
        timing.settings(args.threads, args.allocator == "keep" and not args.cold),
        torch.inference_mode(),
        fresh_compiler_cache("compile" in args.peers),
    ):
        labels: Row = {
            **environment(args.device),
            "allocator": "system" if args.cold else args.allocator,
            "metric_unit": "ms",
        }
        for new in cold(args) if args.cold else benchmark(args):
            rows += [{**dict.fromkeys(COLUMNS, ""), **labels, **row} for row in new]
            if args.csv is not None:
                append(args.csv, rows[-len(new) :], COLUMNS)
    print()
    print("\n".join(report.summary(as_text(rows))))
    return 1 if any(str(row["status"]).startswith("FAIL") for row in rows) else 0


def profile(args: argparse.Namespace) -> int:
    """Print where the programs of the native UNet spend their time, for each model, batch and dtype."""
    if args.device != "cpu":
        raise ValueError("--profile is of native programs, which run on a CPU: use --device cpu")
    found: dict[torch.dtype, float] = {}

    def peak(dtype: torch.dtype) -> float:
        if dtype not in found:
            name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "int8"}[dtype]
            found[dtype] = products_peak(Task("peak", "", name, "", 1, 0, 0, torch.get_num_threads(), "", ""))
        return found[dtype]

    for model, batch, dtype in itertools.product(args.model, args.batch, args.dtypes):
        pipe = providers.load(model, torch.device("cpu"))
        if reason := no_programs(DTYPES[dtype]):
            print(f"{model} {dtype} skipped: {reason}")
            continue
        coalescer_fast.accelerate(pipe, "cpu", DTYPES[dtype])
        pipe("octopus", num_images_per_prompt=batch, num_inference_steps=1, guidance_scale=1, output_type="latent")
        assert isinstance(pipe.runtime, NativeRuntime)
        programs = pipe.runtime.programs.programs.items()
        (program,) = [made for key, made in programs if isinstance(key, tuple) and key[0] == "unet"]
        print(f"{model} {dtype}, batch {batch}, {torch.get_num_threads()} threads, one evaluation of the UNet")
        print("\n".join(profiles.report(program, peak, PROFILED)), flush=True)
    return 0


def benchmark(args: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of one part after the other, each printed as soon as it is measured."""
    device = torch.device(args.device)
    timer = timing.CpuTimer(torch.cuda.synchronize if device.type == "cuda" else lambda: None)
    if "compile" in args.peers:
        torch.compile(torch.neg)(torch.ones(1, device=device))  # starting the compiler is part of no network's time
    print("Milliseconds, the median; in brackets, how many times as fast as eager;", end=" ")
    print("~ marks a time that other processes disturbed.")
    start, longest = time.monotonic(), 0.0
    for model in args.model:
        with torch.inference_mode(False):
            pipe = providers.load(model, device)
        for batch in args.batch:
            begun = time.monotonic()
            if args.seconds is not None and longest and begun - start + longest > args.seconds:
                print(f"LEFT OUT {model} batch {batch}")
                continue
            yield from benchmark_batch(args, pipe, model, batch, timer)
            longest = max(longest, time.monotonic() - begun)


def benchmark_batch(
    args: argparse.Namespace, pipe: CoalescerPipeline, model: str, batch: int, timer: timing.CpuTimer
) -> Iterator[list[Row]]:
    """The rows of one part after the other, for a model and a batch."""
    torch._dynamo.reset()
    gc.collect()  # compiled functions are in cycles, and hold on to tensors
    config, weights = pipe.unet.config, "embedded" if model == "emoji-64" else RANDOM
    shape = (batch, config.latent_channels, config.sample_size, config.sample_size)
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(args.device)
    texts = [PROMPTS[n % len(PROMPTS)] for n in range(batch)]
    decodes = model == "emoji-64" and not {"decoder", "pipeline"}.isdisjoint(args.parts)
    with tempfile.TemporaryDirectory() as folder:
        found = list(prepared(args, pipe, sample, texts, decodes, Path(folder)))
        for part in parts_of(pipe, model, sample, texts):
            if part.name not in args.parts:
                continue
            guided = f" w={part.guidance_scale:g}" if part.guidance_scale != "" else ""
            print(f"{model} ({weights}), {part.name}{guided}, batch {batch}", flush=True)
            rows: list[Row] = []
            timed = args.device == "cpu" or "eager" in args.peers
            for row in measure(part, found, batch, timer, args.budget or BUDGET, timed):
                print(line(row), flush=True)
                rows.append({**row, "model": model, "batch": batch, "weights": weights})
            yield rows


def prepared(
    args: argparse.Namespace,
    pipe: CoalescerPipeline,
    sample: torch.Tensor,
    texts: list[str],
    decodes: bool,
    folder: Path,
) -> Iterator[Provider]:
    """The providers that are asked for, with an engine where they can run; the first is the reference in any case."""
    wanted = [("eager", "fp32"), ("ours", "auto"), *[("ours", "fp32")] * ("fp32" in args.dtypes)]
    wanted += [("ours_int8", "int8")] if args.device == "cpu" else []
    wanted += [
        (name, dtype)
        for name in args.peers
        if name in PEERS
        for dtype in PEERS[name].dtypes
        if dtype in args.dtypes or (dtype == "int8" and args.device == "cpu")
        if name != "compile_graphs" or args.device == "cuda"
    ]
    known: set[tuple[str, str]] = set()
    for name, dtype in wanted:
        if (name, dtype) in known:  # "auto" has chosen it already
            continue
        if name in ("ours", "ours_int8"):
            make = partial(providers.ours, dtype, pipe)
        else:
            make = partial(providers.peer, name, dtype, pipe, sample, texts, decodes, folder)
        engine, status = attempt(make, *([Exception] if name == "eager" else []))
        dtype = dtype if engine is None else engine.dtype
        known.add((name, dtype))
        yield Provider(name, dtype, engine, status)


def parts_of(pipe: CoalescerPipeline, model: str, sample: torch.Tensor, texts: list[str]) -> Iterator[Part]:
    pipe.scheduler.set_timesteps(2)
    batch, own = len(texts), float(pipe.scheduler.config.guidance_scale)
    guided = 2 if pipe.scheduler.config.guided_steps == "all" else 1

    def one(engine: Engine) -> Callable[[], Tensors]:
        return partial(engine.runtime.evaluate, sample, engine.runtime.condition(texts, sample.device))

    def steps(engine: Engine, scale: float) -> Callable[[], Tensors]:
        conditioning, empty = (engine.runtime.condition(some, sample.device) for some in (texts, [""] * batch))
        given = (pipe.scheduler, sample, conditioning, None if scale == 1 else empty, scale)
        return lambda: (engine.runtime.generate(*given, decode=False),)

    def decoding(engine: Engine) -> Callable[[], Tensors]:
        latents = sampling.sample(
            EagerRuntime(pipe), pipe.scheduler, sample, pipe.condition(texts, sample.device), None, 1.0
        )
        return lambda: (engine.runtime.decode(latents),)

    def draw(engine: Engine) -> Tensors:
        pipe = engine.pipe
        generator = torch.Generator().manual_seed(0)
        out: Any = pipe(PROMPTS[0], num_images_per_prompt=batch, generator=generator, output_type="pt")
        return (out.images,)

    yield Part("unet", "", 1, one)
    for scale in dict.fromkeys((1.0, own)):
        yield Part("sampler", scale, 2 if scale == 1 else 2 + guided, partial(steps, scale=scale))
    if model == "emoji-64":
        yield Part("decoder", "", 0, decoding)
        yield Part("pipeline", own, 2 if own == 1 else 2 + guided, lambda engine: partial(draw, engine))


def measure(
    part: Part,
    found: Sequence[Provider],
    batch: int,
    timer: timing.CpuTimer,
    budget: float,
    time_reference: bool = True,
) -> Iterator[Row]:
    """A row for each provider, of which the first is the reference, and for the convolutions alone in each dtype."""
    reference = found[0].engine
    assert reference is not None
    # the truth; the providers run as users have them
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = tuple(y.clone() for y in part.prepare(reference)())
    with torch.inference_mode(False), torch.no_grad():
        once = part.prepare(reference)
        # attention by matmuls, which are counted, where the CPU's fused kernel is not; a GPU's fused kernels are, too
        kernels = sdpa_kernel(SDPBackend.MATH) if expected[0].is_cpu else nullcontext()
        with FlopCounterMode(display=False) as flops, kernels:
            once()
    found = found if time_reference else found[1:]
    gflop = flops.get_total_flops() / 1e9
    runs: dict[str, Callable[[], Any]] = {}
    rows: dict[str, Row] = {}
    for provider in found:
        key = f"{provider.name} {provider.dtype}"
        rows[key] = {"provider": provider.name, "dtype": provider.dtype, "status": provider.status}
        if provider.engine is None:
            continue
        tried, rows[key]["status"] = attempt(partial(try_out, part, provider.engine, expected))
        if tried is None:
            continue
        run, errors = tried
        networks = {"decoder": ("decoder",), "pipeline": ("unet", "decoder")}.get(part.name, ("unet",))
        if mine := [seconds for network, seconds in provider.engine.seconds.items() if network in networks]:
            rows[key]["compile_s"] = sum(mine)
        rows[key] |= errors
        if wrong := too_large(errors):
            rows[key]["status"] = f"FAIL: {wrong}"
        else:
            runs[key] = run
    alone = [name for name in DTYPES if any(provider.dtype == name for provider in found)]
    for name in alone:
        key = f"convolutions {name}"
        runs[key] = providers.convolutions(once, DTYPES[name])
        rows[key] = {"provider": "convolutions", "dtype": name, "status": OK}
    taken = timing.interleave({key: timing.rested(timer.warm(run)) for key, run in runs.items()}, budget)
    medians = {key: timing.quantiles(mine)[0] for key, mine in taken.items()}
    floors = {name: medians[f"convolutions {name}"] for name in alone}
    what = {"part": part.name, "guidance_scale": part.guidance_scale, "evaluations": part.evaluations, "gflop": gflop}
    for key, row in rows.items():
        row |= what
        if key in taken:
            median = medians[key]
            row |= {**timing.columns(taken[key], 1e3), "images_per_s": batch / median}
            row["gflop_per_s"] = gflop / median
            if "eager fp32" in medians:
                row["speedup_over_eager"] = medians["eager fp32"] / median
            row["percent_of_floor"] = 100 * floors.get(str(row["dtype"]), min(floors.values())) / median
        yield row


def try_out(part: Part, engine: Engine, expected: Tensors) -> tuple[Callable[[], Tensors], Row]:
    """What is timed, run once, and its errors."""
    run = part.prepare(engine)
    return run, errors_of(part.name, run(), expected)


def errors_of(part: str, result: Tensors, expected: Tensors) -> Row:
    """Relative errors of the outputs of a part, and the cosine of the first. Raises ValueError for other shapes."""
    names = ("direction_error", "distance_error") if part == "unet" else ("result_error",)
    errors = dict(zip(names, relative_errors(result, expected)))
    first = (result[0].double().flatten(), expected[0].double().flatten())
    return {**errors, "cosine": float(torch.cosine_similarity(*first, dim=0))}


def too_large(errors: Row) -> str:
    """The errors above the limit, or that are NaN, in words; "" if there is none."""
    wrong = {name: e for name, e in errors.items() if name != "cosine" and not float(e) <= LOOSE}
    return ", ".join(f"{name.replace('_', ' ')} {e:.3g}" for name, e in wrong.items())


def cold(args: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of the time from the start of a Python process to its first picture, with processes in turn."""
    print("Milliseconds from the start of a process to the first picture; whether others had the CPUs is not known.")
    taken: dict[str, list[timing.Measurement]] = {name: [] for name in COLD if name != "compile" or name in args.peers}
    status = dict.fromkeys(taken, OK)
    root = str(Path(coalescer_fast.__file__).parents[1])
    for n in range(max(count for _, count in COLD.values())):
        for name, mine in taken.items():
            way, count = COLD[name]
            if status[name] != OK or n >= count:
                continue
            done, measurement = first_picture(way, args.device, root)
            mine.append(measurement)
            if done.returncode:
                status[name] = f"FAIL: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    dtypes = {"eager": "fp32", "ours": "auto", "compile": "bf16"}
    rows = []
    for name, mine in taken.items():
        row: Row = {"model": "emoji-64", "part": "cold", "batch": 1, "provider": name, "dtype": dtypes[name]}
        row |= {"status": status[name], "weights": "embedded"}
        if status[name] == OK:
            median = timing.quantiles(mine)[0]
            row |= {**timing.columns(mine, 1e3), "quiet": "", "images_per_s": 1 / median}
            if status["eager"] == OK:
                row["speedup_over_eager"] = timing.quantiles(taken["eager"])[0] / median
        print(line(row), flush=True)
        rows.append(row)
    yield rows


def first_picture(way: str, device: str, root: str) -> tuple[subprocess.CompletedProcess[str], timing.Measurement]:
    """Run a process that loads the model, accelerates it in this way, and draws one picture."""
    code = [
        "import coalescer_fast",
        "pipe = coalescer_fast.CoalescerPipeline.from_pretrained('emoji-64')",
        *([f"pipe.to({device!r})"] if device != "cpu" else []),
        way,
        f"pipe({PROMPTS[0]!r})",
    ]
    with tempfile.TemporaryDirectory() as cache:
        paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONPATH": paths}
        start = time.perf_counter()
        command = [sys.executable, "-c", "\n".join(code)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        return done, timing.Measurement(time.perf_counter() - start)


def line(row: Row) -> str:
    head = f"  {row['provider']:20} {row['dtype']:5}"
    if "y_value_50" not in row:
        return f"{head} {row['status']}"
    mark = "~" if row.get("quiet") == 0 else " "
    words = (
        f"{head} {row['y_value_50']:10.2f}{mark} ({row['speedup_over_eager']:.2f}x)"
        if "speedup_over_eager" in row
        else head
    )
    words += f" {row['y_value_20']:10.2f} -{row['y_value_80']:9.2f}  {row['images_per_s']:8.1f} images/s"
    if "percent_of_floor" in row:
        words += f" {row['percent_of_floor']:4.0f} % of floor"
    if errors := [f"{row[name]:.1e}" for name in ("direction_error", "distance_error", "result_error") if name in row]:
        words += f"  error {' '.join(errors)}"
    return words + (f"  prepared in {row['compile_s']:.1f} s" if row.get("compile_s") else "")


def environment(device: str) -> Row:
    """The columns that are the same in all rows of a run."""
    found: Row = {
        **machine.environment(),
        "timestamp": machine.timestamp(),
        **machine.versions("onnxruntime", "openvino"),
    }
    return {**found, "gpu": found["gpu"] if device == "cuda" else "", "coalescer_fast": coalescer_fast.__version__}
