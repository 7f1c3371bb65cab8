"""All that is to be known of the package on a CUDA machine, by one command, from a plain checkout, in under ten
minutes.

    python -m benchmarks.gpu [--quick] [--seconds S] --out DIR

Its parts: the native libraries, built for the GPUs present; the tests that need a GPU; `benchmarks.gpu.calls` by itself
and under compute-sanitizer; `benchmarks.kernels`, with inductor on a few calls alone, for it compiles for long;
`benchmarks.sampler` for each model, beside torch.compile as far as the time goes. What fails is reported, and the rest
still runs. A part has its share of the time that is left; what was not measured in it is said. Needs torch, Triton,
nvcc and, for the tests, pytest and numpy (without hypothesis, those that draw calls are skipped), for the sampler
diffusers. Written to DIR in place of earlier ones: kernels.csv, sampler.csv, report.json, summary.md, and pytest.xml.
--only PART,PART runs these alone: "--only build,sampler" gives all the time to the sampler.

Exit status: 0, 1 if a part failed or took too long, 2 without a CUDA device. A missed target is no failure.
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
from coalescer_fast.console import sentence
from coalescer_fast.ops.dispatch import BACKENDS

from ..harness.arguments import Parser
from ..harness.results import read
from ..kernels import benchmark as kernels
from .report import Result, goals, slower, summary, targets

ROOT = Path(__file__).resolve().parents[2]
SECONDS, QUICK_SECONDS = 550.0, 100.0
GRACE = 5.0  # seconds from the interrupt to the kill
TAIL = 6000  # characters of a part's output that are kept

# for inductor: of the network l, which stand for the others; not dual_head, for whose convolution it searches longest
FEW = [
    "--shapes",
    "l",
    "--calls",
    "320x64x64 g32",
    "320x64x64 g32 film pre_bias",
    "320+320x64x64 g32",
    "320x64x64",
    "4x64x64 unit",
]
ALL = ["--shapes", "l,m,emoji-64"]
EAGER = ["--peers", "eager,eager_contiguous"]
SAMPLED = {"emoji-64": 35, "m": 45, "l": 40}  # models, and the share of each


@dataclass
class Part:
    """share: of the time that is left, against those of the parts after it; run: does it in so many seconds, gives
    status and output."""

    name: str
    share: float
    run: Callable[[float], tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    top = Parser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    top.add_argument("--quick", action="store_true", help="in under two minutes: no tests, no racecheck, few calls")
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
    if not torch.cuda.is_available():
        print("python -m benchmarks.gpu: there is no CUDA device: run it on a machine that has one", file=sys.stderr)
        return 2
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("kernels.csv", "sampler.csv", "report.json", "summary.md", "pytest.xml"):
            (args.out / name).unlink(missing_ok=True)
    except OSError as error:
        print(f"python -m benchmarks.gpu: {sentence(error)}", file=sys.stderr)
        return 1
    plan = [
        part for part in parts(args.out.resolve(), args.quick) if args.only is None or part.name.startswith(args.only)
    ]
    return run(plan, args.out, args.seconds or (QUICK_SECONDS if args.quick else SECONDS), environment())


def run(parts: Sequence[Part], out: Path, seconds: float, facts: dict[str, str]) -> int:
    """Run the parts, the report written anew after each."""
    results: list[Result] = []
    for result in execute(parts, seconds):
        results.append(result)
        print(f"{result.part:20} {result.status:14} {result.seconds:5.0f} s of {result.limit:.0f} s", flush=True)
        rows, drawn = whole(out / "kernels.csv"), whole(out / "sampler.csv")
        everything = {"environment": facts, "parts": [asdict(each) for each in results]}
        if rows:
            everything |= {"targets": targets(rows), "slower": slower(rows)}
        if drawn:
            everything |= {"goals": goals(drawn)}
        files.write_text(out / "report.json", json.dumps(everything, indent=1) + "\n")
        files.write_text(out / "summary.md", "\n".join(summary(facts, results, rows, drawn)) + "\n")
    print(out / "summary.md")
    return 1 if any(result.failed for result in results) else 0


def execute(parts: Sequence[Part], seconds: float) -> Iterator[Result]:
    start = time.monotonic()
    for n, part in enumerate(parts):
        begun = time.monotonic()
        limit = max(1.0, (seconds - (begun - start)) * part.share / (sum(other.share for other in parts[n:]) or 1.0))
        try:
            status, output = part.run(limit)
        except Exception:  # whatever it is, the other parts are still to run
            status, output = "failed", traceback.format_exc()
        yield Result(part.name, status, time.monotonic() - begun, limit, output[-TAIL:])


def command(argv: Sequence[str], limit: float, **variables: str) -> tuple[str, str]:
    """Run it in the checkout, with these variables of the environment; interrupted after ``limit`` seconds, and killed
    soon after."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", **variables}
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


def parts(out: Path, quick: bool) -> list[Part]:
    def measured(dtype: str, budget: float, margin: float, *arguments: str) -> Callable[[float], tuple[str, str]]:
        argv = ["--dtypes", dtype, "--budget", str(budget), "--batch", "1,64", *arguments]
        return partial(measure, out / "kernels.csv", argv, margin)

    if quick:
        return [
            Part("build", 42, build),
            Part("calls", 15, partial(calls, [])),
            Part("memcheck", 20, partial(sanitize, "memcheck", [])),
            Part("kernels bf16", 23, measured("bf16", 0.05, 12, *EAGER, *FEW)),
            *(
                Part(name, 0, left_out)
                for name in ("tests", "racecheck", "kernels inductor", "kernels fp32", "kernels fp16")
            ),
            *(Part(f"sampler {model}", 0, left_out) for model in SAMPLED),
        ]
    return [
        Part("build", 60, build),
        Part("calls", 30, partial(calls, ["--all"])),
        Part("tests", 95, partial(tests, out / "pytest.xml")),
        Part("memcheck", 30, partial(sanitize, "memcheck", ["--all"])),
        Part("racecheck", 30, partial(sanitize, "racecheck", ["--all"])),
        Part("kernels bf16", 65, measured("bf16", 0.1, 15, *EAGER, *ALL)),
        Part("kernels inductor", 70, measured("bf16", 0.1, 25, *FEW)),
        Part("kernels fp32", 35, measured("fp32", 0.05, 12, *EAGER, *ALL)),
        Part("kernels fp16", 15, measured("fp16", 0.05, 12, *EAGER, *ALL)),
        *(
            Part(f"sampler {model}", share, partial(sample, out / "sampler.csv", model))
            for model, share in SAMPLED.items()
        ),
    ]


def left_out(limit: float) -> tuple[str, str]:
    return "left out", "by --quick"


def build(limit: float) -> tuple[str, str]:
    architectures = {"{}.{}".format(*torch.cuda.get_device_capability(n)) for n in range(torch.cuda.device_count())}
    argv = [sys.executable, "setup.py", "-q", "build_native"]
    return command(argv, limit, COALESCER_FAST_BUILD="cuda", TORCH_CUDA_ARCH_LIST=";".join(sorted(architectures)))


def calls(arguments: Sequence[str], limit: float) -> tuple[str, str]:
    return command([sys.executable, "-m", "benchmarks.gpu.calls", *arguments], limit)


def sanitize(check: str, arguments: Sequence[str], limit: float) -> tuple[str, str]:
    tool = tool_path("compute-sanitizer")
    if not tool:
        return "not installed", "compute-sanitizer is on no path"
    # what torch asks of the driver and is refused is no fault of a kernel
    argv = [tool, "--tool", check, "--error-exitcode", "97", *["--report-api-errors", "no"] * (check == "memcheck")]
    argv += [sys.executable, "-m", "benchmarks.gpu.calls", "--backends", "cuda", *arguments]
    return command(argv, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # a tensor an allocation, so that its end is known


def tests(junit: Path, limit: float) -> tuple[str, str]:
    if missing := [name for name in ("pytest", "numpy") if find_spec(name) is None]:
        return "not installed", f"the tests need {', '.join(missing)}"
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    ]
    argv += (
        ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    )  # most of their time is Triton's compiler's
    argv += [] if find_spec("diffusers") else ["tests/ops"]  # all the others need it
    status, output = command([*argv, f"--junitxml={junit}"], limit)
    return status, output + counts(junit)


def counts(junit: Path) -> str:
    if not junit.exists():
        return "\nno results"
    suites = list(ElementTree.parse(junit).iter("testsuite"))
    return "\n" + ", ".join(
        f"{sum(int(s.get(name, 0)) for s in suites)} {name}" for name in ("tests", "failures", "errors", "skipped")
    )


def measure(csv: Path, arguments: Sequence[str], margin: float, limit: float) -> tuple[str, str]:
    """benchmarks.kernels, whose start and last call take up to ``margin`` seconds."""
    states = {name: state for name, state in ops.backends("bias_residual").items() if BACKENDS[name].device == "cuda"}
    able = [name for name, (can, _) in states.items() if can]
    if not able:
        return "failed", "; ".join(f"{name} cannot run: {reason}" for name, (_, reason) in states.items())
    before = len(whole(csv))
    argv = [sys.executable, "-m", "benchmarks.kernels", "--device", "cuda", "--backends", *able, "--csv", str(csv)]
    status, output = command([*argv, "--seconds", f"{max(1.0, limit - margin):.0f}", *arguments], limit)
    return judged(status, output, whole(csv)[before:], lambda row: bool(row["backend"]))


def sample(csv: Path, model: str, limit: float) -> tuple[str, str]:
    """benchmarks.sampler of one model. A compiler that is not done when the time is over is no failure, if ours has
    been measured."""
    if find_spec("diffusers") is None:
        return "not installed", "the sampler needs diffusers"
    before = len(whole(csv))
    argv = [sys.executable, "-m", "benchmarks.sampler", "--device", "cuda", "--model", model, "--batch", "1,64,16"]
    argv += [
        "--parts",
        "sampler,pipeline",
        "--peers",
        "eager,eager_channels_last,compile",
        "--dtypes",
        "bf16",
        "--budget",
        "0.5",
    ]
    status, output = command([*argv, "--seconds", f"{limit:.0f}", "--csv", str(csv)], limit)
    rows = whole(csv)[before:]
    if status == "timed out" and any(row["provider"] == "ours" and row["y_value_50"] for row in rows):
        status, output = "ok", f"{output}\nLEFT OUT what was not done after {limit:.0f} s"
    return judged(status, output, rows, lambda row: row["provider"] == "ours")


def judged(
    status: str, output: str, rows: Sequence[dict[str, str]], own: Callable[[dict[str, str]], bool]
) -> tuple[str, str]:
    """The status where a peer that fails is no failure of the package's; and the output, ending in what was measured
    and what was not."""
    wrong = [row for row in rows if row["status"] != "ok"]
    if status == "failed" and wrong and not any(map(own, wrong)) and "Traceback" not in output:
        status = "ok"
    cut = [line for line in output.splitlines() if re.search(r"calls are left out|^LEFT OUT ", line)]
    return status, "\n".join([output, "; ".join([f"{len(rows)} times, {len(wrong)} wrong results", *cut])])


def whole(csv: Path) -> list[dict[str, str]]:
    """The rows that there are, without one that a kill has cut short."""
    return [row for row in (read(csv) if csv.exists() else []) if None not in row.values()]


def tool_path(name: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which(name) or next(
        filter(None, (shutil.which(name, path=f"{home}/bin") for home in homes if home)), None
    )


def environment() -> dict[str, str]:
    """The first GPU, as found, and what is installed."""
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
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "Triton": str(found["triton"]) or "none",
        "CUDA toolkit": release[0] if release else "none",
        "Python": platform.python_version(),
        "CPU": str(found["device"]),
        "coalescer_fast": coalescer_fast.__version__,
        "date": str(found["timestamp"]),
    }


def said(argv: Sequence[str]) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
