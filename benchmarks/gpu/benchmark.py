"""All that is to be known of the package on a CUDA machine, by one command, from a plain checkout, in fifteen
minutes.

    python -m benchmarks.gpu [--quick] [--stages a,b] [--seconds S] --out DIR
    python -m benchmarks.gpu --rehearse --out DIR            # the same plan on a CPU, with smaller calls

The stages, the most valuable first; each has its share of the time that is left:

- a: the native libraries, compiled only if coalescer_fast/lib has none of these sources for these GPUs; every op in
  every dtype against float64 (`benchmarks.gpu.calls`); pictures from a CUDA graph (`benchmarks.gpu.picture`);
- b: the tests that need a GPU; the calls under compute-sanitizer's memcheck;
- c: `benchmarks.kernels` in bfloat16 beside eager PyTorch, and a few calls beside inductor and a chunked GroupNorm;
- d: `benchmarks.sampler` of each model, first ours beside eager, then beside torch.compile with CUDA graphs;
- e: `benchmarks.networks`, diffusers' own UNet of SD-Turbo's size;
- f: what is left of the time: racecheck, the launch plans of GroupNorm, torch.compile with max-autotune, float32 and
  float16.

--quick is a short look at everything, in under 150 seconds. DIR keeps what was done: parts that its report.json has as
"ok" are not run again, and rows of CSV files are added to. So a run that was cut goes on with the same command. What
fails is reported, and the rest still runs. Written to DIR: report.json, summary.md, kernels.csv, sampler.csv,
networks.csv, launch_plans.csv, pytest.xml, picture.png, and failures.pt for `benchmarks.gpu.replay`. Needs torch,
Triton, nvcc unless the libraries are there and, for the tests, pytest and numpy (without hypothesis, those that draw
calls are skipped), for pictures diffusers. --only PART,PART runs these alone: "--only build,sampler" gives all the time
to the sampler.

Exit status: 0, 1 if a part failed or took too long, 2 without a CUDA device. A missed target is no failure, nor is what
was cut ("cut").
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import torch

import coalescer_fast
from coalescer_fast import files, ops
from coalescer_fast.bench import environment as machine
from coalescer_fast.console import sentence
from coalescer_fast.ops.dispatch import BACKENDS

from ..harness.arguments import Parser, listed
from ..harness.results import Text, read
from ..kernels import benchmark as kernels
from .report import Result, goals, screen, slower, summary, targets

ROOT = Path(__file__).resolve().parents[2]
SECONDS, QUICK_SECONDS = 900.0, 135.0
NEEDED = 120.0
GRACE = 5.0  # seconds from the interrupt to the kill
TAIL = 6000  # characters of a part's output that are kept
SHOWN = 1200  # characters of a failed part's output that are printed
STAGES = tuple("abcdef")
COMPILED = Path(tempfile.gettempdir()) / "coalescer_fast-inductor"  # what inductor has compiled, for later parts

# for inductor: of the network l, which stand for the others; not dual_head, for whose convolution it searches longest
FEW = [
    "--shapes",
    "l",
    "--calls",
    "320x64x64 g32",
    "320x64x64 g32 film pre_bias",
    "320+320x64x64 g32",
    "1280x8x8 g32 film pre_bias",
    "320x64x64",
    "4x64x64 unit",
]
FEW_REHEARSED = ["--shapes", "emoji-64", "--calls", "96x8x8 g8 film pre_bias", "96x8x8", "16x8x8 unit"]
ALL = ["--shapes", "l,m,emoji-64"]
EAGER = ["--peers", "eager,eager_contiguous"]
EAGER_SAMPLER = "eager_channels_last"
TESTS = ["tests/runtime/cuda", "tests/models/test_description.py", "tests/bench/test_timing.py", "tests/ops"]

Work = Callable[[float], tuple[str, str]]


@dataclass
class Part:
    """A part of the plan.

    Attributes:
        name: as in the report.
        share: of the time that is left, against those of the parts after it.
        run: does it in so many seconds, gives status and output.
        stage: one of `STAGES`.
        least: seconds that it needs; with fewer it is left out.
        always: all else needs it: it is run though an earlier run has done it, on another machine perhaps, and has at
            least `NEEDED` seconds.
    """

    name: str
    share: float
    run: Work
    stage: str = "a"
    least: float = 0.0
    always: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    top = Parser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    top.add_argument("--quick", action="store_true", help="a short look at everything, in under 150 seconds")
    top.add_argument("--rehearse", action="store_true", help="the same plan on a CPU, with smaller calls")
    top.add_argument(
        "--stages", type=listed(*STAGES), default=list(STAGES), metavar="S,S", help="of a to f (default: all)"
    )
    top.add_argument(
        "--only",
        type=lambda text: tuple(text.split(",")),
        metavar="P,P",
        help="the parts whose names begin so (default: all)",
    )
    top.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help=f"for all parts (default: {SECONDS:g}, with --quick {QUICK_SECONDS:g})",
    )
    top.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = top.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print(f"{top.prog}: there is no CUDA device: run it on a machine that has one", file=sys.stderr)
        return 2
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        files.check_writable(args.out / "report.json")
    except OSError as error:
        print(f"{top.prog}: {sentence(error)}", file=sys.stderr)
        return 1
    device = "cpu" if args.rehearse else "cuda"
    plan = [
        part
        for part in parts(args.out.resolve(), args.quick, device)
        if part.stage in args.stages and (args.only is None or part.name.startswith(args.only))
    ]
    with ended_by_signals():
        return run(plan, args.out, args.seconds or (QUICK_SECONDS if args.quick else SECONDS), environment(device))


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM end the process as an exception does, so that what it has started ends with it."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(parts: Sequence[Part], out: Path, seconds: float, facts: dict[str, str]) -> int:
    """Run the parts that were not done before, the report written anew after each."""
    results = earlier(out)
    done = {name for name, result in results.items() if result.status == "ok"}
    left = [part for part in parts if part.always or part.name not in done]
    for part in parts:
        if part not in left:
            print(f"{part.stage} {part.name:20} done before", flush=True)
    for result in execute(left, seconds):
        results[result.part] = result
        line = f"{result.stage} {result.part:20} {result.status:14} {result.seconds:5.0f} s of {result.limit:.0f} s"
        print(line, flush=True)
        if result.failed:
            print(result.output.strip()[-SHOWN:], flush=True)
        report(out, facts, list(results.values()))
    mine = [results[part.name] for part in parts if part.name in results]
    print()
    print("\n".join(screen(facts, mine, *(whole(out / f"{name}.csv") for name in ("kernels", "sampler", "networks")))))
    return 1 if any(result.failed for result in mine) else 0


def earlier(out: Path) -> dict[str, Result]:
    """What the report in the folder says of each part, nothing if there is none."""
    try:
        found = json.loads((out / "report.json").read_text("utf-8"))["parts"]
        return {each["part"]: Result(**each) for each in found}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def report(out: Path, facts: dict[str, str], results: Sequence[Result]) -> None:
    """Write report.json and summary.md."""
    rows, drawn = whole(out / "kernels.csv"), whole(out / "sampler.csv")
    everything = {"environment": facts, "parts": [asdict(each) for each in results]}
    if rows:
        everything |= {"targets": targets(rows), "slower": slower(rows)}
    if drawn:
        everything |= {"goals": goals(drawn)}
    files.write_text(out / "report.json", json.dumps(everything, indent=1) + "\n")
    nets = whole(out / "networks.csv")
    files.write_text(out / "summary.md", "\n".join(summary(facts, results, rows, drawn, nets)) + "\n")


def execute(parts: Sequence[Part], seconds: float) -> Iterator[Result]:
    start = time.monotonic()
    for n, part in enumerate(parts):
        begun = time.monotonic()
        limit = max(1.0, (seconds - (begun - start)) * part.share / (sum(other.share for other in parts[n:]) or 1.0))
        if part.always:
            limit = max(limit, NEEDED)
        try:
            if limit < part.least:
                status, output = "left out", f"{limit:.0f} s are too few, it needs {part.least:g}"
            else:
                status, output = part.run(limit)
        except Exception:  # whatever it is, the other parts are still to run
            status, output = "failed", traceback.format_exc()
        yield Result(part.name, status, time.monotonic() - begun, limit, output[-TAIL:], part.stage)


def command(argv: Sequence[str], limit: float, **variables: str) -> tuple[str, str]:
    """Run it in the checkout, with these variables of the environment; interrupted after ``limit`` seconds, and killed
    soon after."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {"TORCHINDUCTOR_CACHE_DIR": str(COMPILED), **os.environ, "PYTHONPATH": path}
    env |= {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", **variables}
    with tempfile.TemporaryFile(
        "w+", encoding="utf-8", errors="replace"
    ) as output:  # a pipe would wait for whoever else has it open
        process = subprocess.Popen(
            argv, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "failed" if process.wait(limit) else "ok"
        except subprocess.TimeoutExpired:
            status = "timed out"
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return status, output.read()


def parts(out: Path, quick: bool, device: str = "cuda") -> list[Part]:
    """The plan; on "cpu" that of a rehearsal."""
    rehearsal = device == "cpu"
    few = FEW_REHEARSED if rehearsal else FEW
    every = ["--shapes", "emoji-64"] if rehearsal else ALL

    def measured(dtype: str, batch: str, budget: float, margin: float, *arguments: str) -> Work:
        argv = ["--dtypes", dtype, "--budget", str(budget), "--batch", batch, *arguments]
        return partial(measure, out / "kernels.csv", device, argv, margin)

    def sampled(model: str, batch: str, peers: str, *arguments: str) -> Work:
        argv = ["--model", model, "--batch", batch, "--peers", peers, "--dtypes", "bf16", *arguments]
        return partial(sample, out / "sampler.csv", device, argv)

    def drawn(*arguments: str) -> Work:
        return partial(networks, out / "networks.csv", device, list(arguments))

    failures = ["--failures", str(out / "failures.pt")]
    build_part = Part("build", 20, partial(build, device), always=True)
    if quick:
        tiny = ["--parts", "unet,sampler,pipeline", "--budget", "0.05"]
        return [
            build_part,
            Part("calls quick", 25, partial(calls, device, failures)),
            Part("picture", 30, partial(picture, device, out / "picture.png")),
            Part("memcheck quick", 20, partial(sanitize, "memcheck", []), "b"),
            Part("kernels quick", 17, measured("bf16", "1,64", 0.05, 10, *EAGER, *few), "c"),
            Part(
                "sampler quick", 22, sampled("emoji-64" if rehearsal else "emoji-64,m", "1", EAGER_SAMPLER, *tiny), "d"
            ),
            Part("networks quick", 22, drawn("--peers", "eager", "--scale", "0.25", "--rounds", "2"), "e"),
        ]
    small = ["--parts", "sampler,pipeline", "--budget", "0.3"]
    graphs = f"{EAGER_SAMPLER},{'compile' if rehearsal else 'compile_graphs'}"
    batches = "1,4" if rehearsal else "1,64"
    large = left_out if rehearsal else None
    first = "emoji-64,m" if rehearsal else "emoji-64,m,l"
    chunked = ["--peers", "eager,eager_contiguous,compile" + ",chunked" * (not rehearsal)]
    return [
        build_part,
        # calls, tests, memcheck, kernels and sampler: about what an H100 took, in seconds
        Part("calls", 75 if rehearsal else 40, partial(calls, device, ["--all", *failures])),
        Part("picture", 30, partial(picture, device, out / "picture.png")),
        Part("tests", 110, partial(tests, out / "pytest.xml"), "b"),
        Part("memcheck", 15, partial(sanitize, "memcheck", ["--all"]), "b"),
        Part("kernels bf16", 60, measured("bf16", "1,64", 0.05, 15, *EAGER, *every), "c"),
        Part("kernels few", 55, measured("bf16", "64", 0.1, 20, *chunked, *few), "c"),
        # one process: to start one takes as long as a model
        Part("sampler", 130, sampled(first, "1" if rehearsal else "1,64,16", EAGER_SAMPLER, *small), "d"),
        Part("networks", 110, drawn("--peers", "eager,compile"), "e"),
        # to compile emoji-64 for one batch took 25 s
        Part("compile emoji-64", 105, sampled("emoji-64", batches, graphs, *small), "d", 15),
        Part("compile m", 115, large or sampled("m", "1,64", graphs, *small), "d", 15),
        Part("compile l", 110, large or sampled("l", "1,64", graphs, *small), "d", 25),
        Part("racecheck", 10, partial(sanitize, "racecheck", ["--all"]), "f", 20),
        Part("launch plans", 10, large or partial(launch_plans, out / "launch_plans.csv"), "f", 45),
        Part("autotune emoji-64", 10, large or sampled("emoji-64", "1,64", f"{graphs},compile", *small), "f", 40),
        Part("autotune m", 10, large or sampled("m", "1,64", f"{graphs},compile", *small), "f", 60),
        Part("autotune l", 10, large or sampled("l", "1", f"{graphs},compile", *small), "f", 60),
        Part("kernels fp32", 5, measured("fp32", "1,64", 0.05, 12, *EAGER, *every), "f", 20),
        Part("kernels fp16", 5, measured("fp16", "1,64", 0.05, 12, *EAGER, *every), "f", 20),
    ]


def left_out(limit: float) -> tuple[str, str]:
    return "left out", "by --rehearse: it is too large for a CPU"


def build(device: str, limit: float) -> tuple[str, str]:
    """The libraries, unless they are there already; a rehearsal builds them for an H100."""
    architectures = {"9.0"}
    if device == "cuda":
        count = torch.cuda.device_count()
        architectures = {"{}.{}".format(*torch.cuda.get_device_capability(n)) for n in range(count)}
    argv = [sys.executable, "setup.py", "-q", "build_native", "--keep"]
    variables = {"COALESCER_FAST_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": ";".join(sorted(architectures))}
    status, output = command(argv, limit, **variables)
    made = [path.name for path in sorted((ROOT / "coalescer_fast" / "lib").glob("*.so"))]
    if status == "ok" and "libcoalescer_fast_cuda.so" not in made:
        status = "failed"  # installed without them, which is no failure of an installation
    kept = output.count("was compiled of these sources already")
    return status, f"{output}\n{len(made)} libraries, {kept} of them compiled before"


def calls(device: str, arguments: Sequence[str], limit: float) -> tuple[str, str]:
    emulated = ["--emulated"] if device == "cpu" else []
    status, output = command([sys.executable, "-m", "benchmarks.gpu.calls", *emulated, *arguments], limit)
    return status, output + "; ".join(re.findall(r"^\w+: \d+ calls, .*", output, re.MULTILINE))


def picture(device: str, png: Path, limit: float) -> tuple[str, str]:
    if find_spec("diffusers") is None:
        return "not installed", "pictures need diffusers"
    return command([sys.executable, "-m", "benchmarks.gpu.picture", "--device", device, "--out", str(png)], limit)


def sanitize(check: str, arguments: Sequence[str], limit: float) -> tuple[str, str]:
    tool = tool_path("compute-sanitizer")
    if not tool:
        return "not installed", "compute-sanitizer is on no path"
    # what torch asks of the driver and is refused is no fault of a kernel
    argv = [tool, "--tool", check, "--error-exitcode", "97", *["--report-api-errors", "no"] * (check == "memcheck")]
    argv += [sys.executable, "-m", "benchmarks.gpu.calls", "--backends", "cuda", *arguments]
    return command(argv, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # a tensor an allocation, so that its end is known


def tests(junit: Path, limit: float) -> tuple[str, str]:
    """Those that need a GPU, the runtimes' first. What failed is said also if they are cut."""
    if missing := [name for name in ("pytest", "numpy") if find_spec(name) is None]:
        return "not installed", f"the tests need {', '.join(missing)}"
    argv = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
    argv += ["--continue-on-collection-errors", "--tb=short", f"--junitxml={junit}"]
    # most of their time is Triton's compiler's
    argv += ["-n", str(min(14, os.cpu_count() or 1))] if find_spec("xdist") else []
    argv += ["--timeout=120"] if find_spec("pytest_timeout") else []
    argv += TESTS if find_spec("diffusers") else ["tests/ops"]  # all the others need it
    status, output = command(argv, limit)
    lines = [line for line in output.splitlines() if re.search(r"\bFAILED\b", line)]
    return status, "\n".join([output, *lines]) + counts(junit)


def counts(junit: Path) -> str:
    if not junit.exists():
        return "\nno results"
    suites = list(ElementTree.parse(junit).iter("testsuite"))
    return "\n" + ", ".join(
        f"{sum(int(s.get(name, 0)) for s in suites)} {name}" for name in ("tests", "failures", "errors", "skipped")
    )


def measure(csv: Path, device: str, arguments: Sequence[str], margin: float, limit: float) -> tuple[str, str]:
    """benchmarks.kernels of what the file lacks; its start and last call take up to ``margin`` seconds."""
    states = {name: state for name, state in ops.backends("bias_residual").items() if BACKENDS[name].device == device}
    able = [name for name, (can, _) in states.items() if can]
    if not able:
        return "failed", "; ".join(f"{name} cannot run: {reason}" for name, (_, reason) in states.items())
    drop_partial_row(csv)
    before = len(whole(csv))
    argv = [sys.executable, "-m", "benchmarks.kernels", "--device", device, "--backends", *able, "--csv", str(csv)]
    status, output = command([*argv, "--again", "--seconds", f"{max(1.0, limit - margin):.0f}", *arguments], limit)
    return judged(status, output, whole(csv)[before:], lambda row: bool(row["backend"]))


def sample(csv: Path, device: str, arguments: Sequence[str], limit: float) -> tuple[str, str]:
    """benchmarks.sampler. A compiler that is not done when the time is over is no failure, if ours was measured."""
    if find_spec("diffusers") is None:
        return "not installed", "the sampler needs diffusers"
    argv = [sys.executable, "-m", "benchmarks.sampler", "--device", device, "--seconds", f"{limit:.0f}"]
    return timed(csv, [*argv, "--csv", str(csv), *arguments], limit, "ours")


def networks(csv: Path, device: str, arguments: Sequence[str], limit: float) -> tuple[str, str]:
    """benchmarks.networks of SD-Turbo's UNet; in a rehearsal a small autoencoder."""
    if find_spec("diffusers") is None:
        return "not installed", "the networks are diffusers'"
    argv = [sys.executable, "-m", "benchmarks.networks", "--device", device, "--csv", str(csv)]
    argv += ["--model", "sd-turbo" if device == "cuda" else "tiny-vae", "--seconds", f"{max(1.0, limit - 5):.0f}"]
    argv += arguments if device == "cuda" else ["--peers", "eager", "--size", "8", "--rounds", "2"]
    return timed(csv, argv, limit, "coalescer_fast")


def timed(csv: Path, argv: Sequence[str], limit: float, own: str) -> tuple[str, str]:
    """A command that adds rows to the file, those of the provider ``own`` among them."""
    drop_partial_row(csv)
    before = len(whole(csv))
    status, output = command(argv, limit)
    return judged(status, output, whole(csv)[before:], lambda row: row["provider"] == own)


def judged(status: str, output: str, rows: Sequence[Text], own: Callable[[Text], bool]) -> tuple[str, str]:
    """The status, and the output, ending in what was measured and what was not.

    A peer that fails is no failure of the package's. The status is "cut" where something was left out, also where the
    time was over after something of our ``own`` was measured.
    """
    wrong = [row for row in rows if row["status"] != "ok" and not row["status"].startswith("skipped")]
    if status == "failed" and wrong and not any(map(own, wrong)) and "Traceback" not in output:
        status = "ok"
    left = [line for line in output.splitlines() if re.search(r"calls are left out|^LEFT OUT ", line)]
    if status == "timed out" and any(own(row) and row["y_value_50"] for row in rows):
        status = "ok"
        left.append("LEFT OUT what was not done in time")
    left += [f"{row['provider']} {row['status']}" for row in rows if row["status"].startswith("skipped: the time")]
    if status == "ok" and left:
        status = "cut"
    said = output.strip().splitlines()[-1:] if status == "failed" and not rows else []
    return status, "\n".join([output, "; ".join([*said, f"{len(rows)} times, {len(wrong)} wrong results", *left])])


def whole(csv: Path) -> list[Text]:
    """The rows that there are, without one that a kill has cut short."""
    return [row for row in (read(csv) if csv.exists() else []) if None not in row.values()]


def drop_partial_row(csv: Path) -> None:
    """Cut off what a killed process has left of its last row, so that rows can be added."""
    if csv.exists():
        content = csv.read_bytes()
        with csv.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def launch_plans(csv: Path, limit: float) -> tuple[str, str]:
    """The times of all ways to cut group_norm_silu into blocks; needs nvcc."""
    status, output = command([sys.executable, "-m", "benchmarks.kernels.launch_plans", "--csv", str(csv)], limit)
    return status, f"{output}\n{len(whole(csv))} plans"


def tool_path(name: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which(name) or next(
        filter(None, (shutil.which(name, path=f"{home}/bin") for home in homes if home)), None
    )


def environment(device: str) -> dict[str, str]:
    """The first GPU, as found, and what is installed."""
    installed = {
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "Python": platform.python_version(),
        "coalescer_fast": coalescer_fast.__version__,
        "date": machine.timestamp(),
    }
    if device == "cpu":
        return {"GPU": "none, this is a rehearsal on a CPU", **installed}
    names = {
        "clocks.sm": "SM clock as found",
        "clocks.max.sm": "SM clock, largest",
        "clocks.mem": "memory clock as found",
        "clocks.max.mem": "memory clock, largest",
        "power.limit": "power limit",
    }
    gpu = torch.cuda.get_device_properties(0).uuid
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", f"--id=GPU-{gpu}"]
    nvcc = tool_path("nvcc")
    release = re.search(r"release [^\n]+", said([nvcc, "--version"])) if nvcc else None
    found = kernels.environment("cuda")
    return {
        "GPU": str(found["gpu_name"]) + (f", the first of {n}" if (n := torch.cuda.device_count()) > 1 else ""),
        "driver": str(found["driver"]),
        **dict(zip(names.values(), said(query).strip().split(", "))),
        "Triton": str(found["triton"]) or "none",
        "CUDA toolkit": release[0] if release else "none",
        "CPU": str(found["device"]),
        **installed,
    }


def said(argv: Sequence[str]) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
