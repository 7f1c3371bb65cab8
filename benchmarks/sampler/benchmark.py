"""Speed of the sampler, accelerated, beside every strong way to run the same networks, in one run.

    python -m benchmarks.sampler --model emoji-64,m --csv benchmarks/results/sampler.csv
    python -m benchmarks.sampler --summary benchmarks/results/sampler.csv
    python -m benchmarks.sampler --plot docs/sampler.png --from benchmarks/results/sampler.csv

Parts: unet, one evaluation; sampler, the two steps from what is derived of the descriptions to latents, without guidance and with the
model's own; decoder; pipeline, a whole call, prompt to pictures (the last two of emoji-64 alone). m and l have random weights: their
times say something, their latents nothing. Providers of a part are measured in turn:

- ours: `coalescer_fast.accelerate`; on a GPU sampler and pipeline are one CUDA graph, unet and decoder are launched kernel by kernel;
- ours_int8: the same with dtype="int8", on the CPU; of larger error, so that it is compared with nobody;
- eager: the reference, float32, as users have it; eager_channels_last: channels innermost, float32 and bfloat16;
- compile: torch.compile of the reference, channels innermost, weights frozen, static shapes; on a GPU max-autotune;
- onnxruntime: float32, all optimisations; its CPU provider has no bfloat16. openvino: float32 and bfloat16, for latency. Both on the CPU;
- convolutions: the part's convolutions alone, by torch, weights packed once, in either dtype, on a GPU as one CUDA graph:
  ``percent_of_floor`` is their time over a provider's. What beats torch's own convolutions is above 100.

Conditioning is computed before the clock starts, but for the pipeline. Every result is held against the reference in float32: relative
error of the direction and of the distance, or of the whole result; a provider that is off by more than a tenth has no time. compile_s is
the first preparation of a network, without the export to ONNX. --cold measures new processes instead, from start to first picture. On
a GPU times are by the clock, launches included, as a user waits for them; not yet run on one.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import coalescer_fast
from coalescer_fast import sampling
from coalescer_fast.cli import sentence
from coalescer_fast.pipeline import CoalescerPipeline

from ..harness import results, timing
from ..harness.results import Parser, Row, add_report_options, append, command, open_csv, reported
from ..kernels.benchmark import compiler, listed, positive, positive_list
from . import providers as sampler_peers
from . import report as sampler_report
from .providers import DTYPES, PEERS, RANDOM, Engine, Missing, Tensors

MODELS = ("emoji-64", "m", "l")
PARTS = ("unet", "sampler", "decoder", "pipeline")
PROMPTS = ("octopus", "red apple", "dog", "pizza", "rocket", "umbrella", "tiger", "guitar")
BUDGET = 3.0
LOOSE = 0.1
REST = 5e-3  # seconds after which the idle threads of the provider before have ceased to spin
COLD = {  # what a new process does between loading and drawing, and how many of them
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
    *(
        "y_value_50",
        "y_value_20",
        "y_value_80",
        "images_per_s",
        "speedup_over_eager",
        "gflop",
        "gflop_per_s",
        "percent_of_floor",
    ),
    *(
        "compile_s",
        "direction_error",
        "distance_error",
        "result_error",
        "cosine",
        "status",
        "samples",
        "quiet",
        "weights",
        "allocator",
    ),
    *("timestamp", "cpu", "gpu", "threads", "python", "torch", "onnxruntime", "openvino", "coalescer_fast"),
)


@dataclass
class Provider:
    """engine: None if it cannot run here, or could not be prepared; status says why."""

    name: str
    dtype: str
    engine: Engine | None = None
    status: str = "ok"


@dataclass
class Part:
    """What is measured: its name, guidance, and evaluations; prepare: (engine) -> the call that is timed."""

    name: str
    guidance_scale: float | str
    evaluations: int
    prepare: Callable[[Engine], Callable[[], Tensors]]


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
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
    top.add_argument(
        "--dtypes", type=listed(*DTYPES), default=list(DTYPES), metavar="D,D", help="of the peers (default: fp32,bf16)"
    )
    top.add_argument(
        "--parts", type=listed(*PARTS), default=list(PARTS), metavar="P,P", help=f"default: {','.join(PARTS)}"
    )
    top.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    top.add_argument("--threads", type=positive, metavar="N", help="threads of the CPU (default: torch's own choice)")
    top.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        metavar="S",
        help="seconds for one part of a batch (default: %(default)s)",
    )
    top.add_argument(
        "--seconds", type=float, metavar="S", help="begin no batch that would end later, judged by the longest so far"
    )
    top.add_argument(
        "--allocator",
        choices=["keep", "system"],
        default="keep",
        help="as in benchmarks.kernels (default: %(default)s)",
    )
    top.add_argument(
        "--cold", action="store_true", help="measure instead the time to the first picture of a new process"
    )
    top.add_argument("--csv", type=Path, metavar="F.csv", help="add the results to a file")
    add_report_options(top)
    return top


def run(args: argparse.Namespace) -> int:
    if reported(args, sampler_report):
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and there is none: use --device cpu")
    if args.cold and "emoji-64" not in args.model:
        raise ValueError("--cold draws a picture, which needs the model emoji-64: leave --model away")
    if args.csv is not None:
        open_csv(args.csv, COLUMNS)
    rows: list[Row] = []
    with (
        timing.settings(args.threads, args.allocator == "keep" and not args.cold),
        torch.inference_mode(),
        compiler(args),
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
    print("\n".join(sampler_report.summary([{key: str(value) for key, value in row.items()} for row in rows])))
    return 1 if any(str(row["status"]).startswith("FAIL") for row in rows) else 0


def benchmark(args: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of one part after the other, each printed as it is there."""
    device = torch.device(args.device)
    timer = timing.CpuTimer(torch.cuda.synchronize if device.type == "cuda" else lambda: None)
    if "compile" in args.peers:
        torch.compile(torch.neg)(torch.ones(1, device=device))  # the compiler's own start is no network's time
    print(
        "Milliseconds, the median; in brackets, how many times as fast as eager; ~ marks a time that other processes disturbed."
    )
    start, longest = time.monotonic(), 0.0
    for model in args.model:
        with torch.inference_mode(False):
            pipe = sampler_peers.load(model, device)
        weights = "embedded" if model == "emoji-64" else RANDOM
        for batch in args.batch:
            begun = time.monotonic()
            if args.seconds is not None and longest and begun - start + longest > args.seconds:
                print(f"LEFT OUT {model} batch {batch}")
                continue
            torch._dynamo.reset()
            gc.collect()  # compiled functions are in cycles, and hold on to tensors
            config = pipe.unet.config
            shape = (batch, config.latent_channels, config.sample_size, config.sample_size)
            sample = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
            texts = [PROMPTS[n % len(PROMPTS)] for n in range(batch)]
            parts = [part for part in parts_of(pipe, model, sample, texts) if part.name in args.parts]
            with tempfile.TemporaryDirectory() as folder:
                decodes = model == "emoji-64" and not {"decoder", "pipeline"}.isdisjoint(args.parts)
                found = list(providers(args, pipe, sample, texts, decodes, Path(folder)))
                for part in parts:
                    title = f"{model} ({weights}), {part.name}" + (
                        f" w={part.guidance_scale:g}" if part.guidance_scale != "" else ""
                    )
                    print(f"{title}, batch {batch}", flush=True)
                    rows: list[Row] = []
                    for row in measure(part, found, batch, timer, args.budget):
                        print(line(row), flush=True)
                        rows.append({**row, "model": model, "batch": batch, "weights": weights})
                    yield rows
                del found
            longest = max(longest, time.monotonic() - begun)


def providers(
    args: argparse.Namespace,
    pipe: CoalescerPipeline,
    sample: torch.Tensor,
    texts: list[str],
    decodes: bool,
    folder: Path,
) -> Iterator[Provider]:
    """All of them, prepared as far as they can be. The first is the reference, whether or not it is asked for."""
    wanted = [
        ("eager", "fp32"),
        ("ours", "auto"),
        ("ours", "fp32"),
        *([("ours_int8", "int8")] if args.device == "cpu" else []),
    ]
    wanted += [(name, dtype) for name in args.peers if name in PEERS for dtype in PEERS[name] if dtype in args.dtypes]
    known: set[tuple[str, str]] = set()
    for name, dtype in wanted:
        if (name, dtype) in known:  # ours chose it itself
            continue
        known.add((name, dtype))
        try:
            if name in ("ours", "ours_int8"):
                engine = sampler_peers.ours(dtype, pipe)
            else:
                engine = sampler_peers.peer(name, dtype, pipe, sample, texts, decodes, folder)
            known.add((name, engine.dtype))
            yield Provider(name, engine.dtype, engine)
        except Missing as reason:
            yield Provider(name, dtype, status=f"skipped: {reason}")
        except Exception as error:  # whatever a compiler or an exporter raises is its result
            if name == "eager":
                raise
            yield Provider(name, dtype, status=f"FAIL: {sentence(error)}")


def parts_of(pipe: CoalescerPipeline, model: str, sample: torch.Tensor, texts: list[str]) -> Iterator[Part]:
    pipe.scheduler.set_timesteps(2)
    batch, own = len(texts), float(pipe.scheduler.config.guidance_scale)
    guided = 2 if pipe.scheduler.config.guided_steps == "all" else 1

    def one(engine: Engine) -> Callable[[], Tensors]:
        return partial(engine.runtime.evaluate, sample, engine.runtime.condition(texts, sample.device))

    def steps(engine: Engine, scale: float) -> Callable[[], Tensors]:
        conditioning, empty = (engine.runtime.condition(some, sample.device) for some in (texts, [""] * batch))
        given = (pipe.scheduler, sample, conditioning, None if scale == 1 else empty, scale)
        if at_once := getattr(engine.runtime, "generate", None):
            return lambda: (at_once(*given, decode=False),)
        return lambda: (sampling.sample(engine.runtime, *given),)

    def decoding(engine: Engine) -> Callable[[], Tensors]:
        latents = sampling.sample(pipe, pipe.scheduler, sample, pipe.condition(texts, sample.device), None, 1.0)
        return lambda: (engine.runtime.decode(latents),)

    def draw(engine: Engine) -> Tensors:
        pipe: Any = engine.pipe
        generator = torch.Generator().manual_seed(0)
        return (pipe(PROMPTS[0], num_images_per_prompt=batch, generator=generator, output_type="pt").images,)

    yield Part("unet", "", 1, one)
    for scale in dict.fromkeys((1.0, own)):
        yield Part("sampler", scale, 2 if scale == 1 else 2 + guided, partial(steps, scale=scale))
    if model == "emoji-64":
        yield Part("decoder", "", 0, decoding)
        yield Part("pipeline", own, 2 if own == 1 else 2 + guided, lambda engine: partial(draw, engine))


def measure(part: Part, found: Sequence[Provider], batch: int, timer: timing.CpuTimer, budget: float) -> Iterator[Row]:
    """A row a provider and two of the convolutions alone."""
    reference = found[0].engine
    assert reference is not None
    with torch.backends.cudnn.flags(allow_tf32=False):  # the truth; whoever is measured runs as users have it
        expected = tuple(y.clone() for y in part.prepare(reference)())
    with torch.inference_mode(False), torch.no_grad():
        once = part.prepare(reference)
        with (
            FlopCounterMode(display=False) as flops,
            sdpa_kernel(SDPBackend.MATH),
        ):  # its matmuls are counted; not the CPU's fused one
            once()
    gflop = flops.get_total_flops() / 1e9
    runs: dict[str, Callable[[], Any]] = {}
    rows: dict[str, Row] = {}
    for provider in found:
        key = f"{provider.name} {provider.dtype}"
        rows[key] = {"provider": provider.name, "dtype": provider.dtype, "status": provider.status}
        if provider.engine is None:
            continue
        try:
            run = part.prepare(provider.engine)
            errors = check(part.name, run(), expected)
        except Exception as error:  # is its result, too
            rows[key]["status"] = f"FAIL: {sentence(error)}"
            continue
        networks = {"decoder": ("decoder",), "pipeline": ("unet", "decoder")}.get(part.name, ("unet",))
        if mine := [seconds for network, seconds in provider.engine.seconds.items() if network in networks]:
            rows[key]["compile_s"] = sum(mine)
        rows[key] |= errors
        wrong = [
            f"{name.replace('_', ' ')} {e:.3g}"
            for name, e in errors.items()
            if name != "cosine" and not float(e) <= LOOSE
        ]
        if wrong:  # NaN is, too
            rows[key]["status"] = f"FAIL: {', '.join(wrong)}"
        else:
            runs[key] = run
    for name, dtype in DTYPES.items():
        key = f"convolutions {name}"
        runs[key] = sampler_peers.convolutions(once, dtype)
        rows[key] = {"provider": "convolutions", "dtype": name, "status": "ok"}
    taken = timing.interleave({key: rested(timer.warm(run)) for key, run in runs.items()}, budget)
    quantiles = {key: timing.quantiles(mine) for key, mine in taken.items()}
    floors = {name: quantiles[f"convolutions {name}"][0] for name in DTYPES}
    for key, row in rows.items():
        row |= {
            "part": part.name,
            "guidance_scale": part.guidance_scale,
            "evaluations": part.evaluations,
            "gflop": gflop,
        }
        if key in quantiles:
            median, low, high = quantiles[key]
            row |= {
                "y_value_50": median * 1e3,
                "y_value_20": low * 1e3,
                "y_value_80": high * 1e3,
                "images_per_s": batch / median,
            }
            row |= {"speedup_over_eager": quantiles["eager fp32"][0] / median, "gflop_per_s": gflop / median}
            row["percent_of_floor"] = 100 * floors.get(str(row["dtype"]), min(floors.values())) / median
            row |= {"samples": len(taken[key]), "quiet": int(all(m.quiet for m in taken[key]))}
        yield row


def rested(sample: timing.Sample) -> timing.Sample:
    """Each provider has threads of its own, which spin for a while after a call: not at the next one's expense."""

    def measure() -> timing.Measurement:
        time.sleep(REST)
        return sample()

    return measure


def check(part: str, result: Tensors, expected: Tensors) -> Row:
    """Relative errors ||y - y_ref|| / ||y_ref||, and the cosine of the first output. Raises ValueError for other shapes."""
    if shapes := [
        f"{tuple(y.shape)}, expected {tuple(e.shape)}" for y, e in zip(result, expected) if y.shape != e.shape
    ]:
        raise ValueError(f"result has shape {shapes[0]}")
    pairs = [(y.double().flatten(), e.double().flatten()) for y, e in zip(result, expected)]
    errors = [float((y - e).norm() / e.norm()) for y, e in pairs]
    names = ("direction_error", "distance_error") if part == "unet" else ("result_error",)
    return {**dict(zip(names, errors)), "cosine": float(torch.cosine_similarity(*pairs[0], dim=0))}


def cold(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Seconds from the start of a Python process to its first picture, processes in turn."""
    print("Milliseconds from the start of a process to the first picture; whether others had the CPUs is not known.")
    taken: dict[str, list[timing.Measurement]] = {name: [] for name in COLD if name != "compile" or name in args.peers}
    status = dict.fromkeys(taken, "ok")
    root = str(Path(coalescer_fast.__file__).parents[1])
    for n in range(max(count for _, count in COLD.values())):
        for name, mine in taken.items():
            way, count = COLD[name]
            if status[name] != "ok" or n >= count:
                continue
            code = [
                "import coalescer_fast",
                "pipe = coalescer_fast.CoalescerPipeline.from_pretrained('emoji-64')",
                *([f"pipe.to({args.device!r})"] if args.device != "cpu" else []),
                way,
                f"pipe({PROMPTS[0]!r})",
            ]
            with tempfile.TemporaryDirectory() as cache:
                paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
                env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONPATH": paths}
                start = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", "\n".join(code)], env=env, capture_output=True, text=True, check=False
                )
                mine.append(timing.Measurement(time.perf_counter() - start))
            if done.returncode:
                status[name] = f"FAIL: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    rows = []
    for name, mine in taken.items():
        row: Row = {
            "model": "emoji-64",
            "part": "cold",
            "batch": 1,
            "provider": name,
            "status": status[name],
            "weights": "embedded",
        }
        row["dtype"] = {"eager": "fp32", "ours": "auto", "compile": "bf16"}[name]
        if status[name] == "ok":
            median, low, high = timing.quantiles(mine)
            row |= {
                "y_value_50": median * 1e3,
                "y_value_20": low * 1e3,
                "y_value_80": high * 1e3,
                "images_per_s": 1 / median,
            }
            if status["eager"] == "ok":
                row["speedup_over_eager"] = timing.quantiles(taken["eager"])[0] / median
            row["samples"] = len(mine)
        print(line(row), flush=True)
        rows.append(row)
    yield rows


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
    found: Row = {**results.environment(), "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    for package in ("onnxruntime", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return {**found, "gpu": found["gpu"] if device == "cuda" else "", "coalescer_fast": coalescer_fast.__version__}
