"""``python -m coalescer_fast.collect_env [--json]``: what is installed, what loads, and what cannot run and why.

Made for installations that do not work: it imports the standard library alone, and it tries torch, diffusers and the
native libraries each in a process of its own. An import that raises, crashes or hangs is then one line of the report.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from . import __version__
from .console import table

PARTS = ("cpu", "cuda")
LIBRARIES = Path(__file__).parent / "lib"
# package -> the distributions that contain it
PACKAGES = {
    **{name: (name,) for name in ("torch", "triton", "diffusers", "numpy", "safetensors", "tokenizers", "onnx")},
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "nvtx": ("nvtx",),
}
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
OPENMP = ("libgomp", "libiomp5", "libomp")
VARIABLES = ("COALESCER_FAST_", "OMP_", "GOMP_", "KMP_", "MKL_", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")
SECONDS = 120  # that a trial may take

Facts = dict[str, Any]


class Failed(Exception):
    """A probe has failed; the message is the whole reason."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m coalescer_fast.collect_env", description="Report the environment.")
    parser.add_argument("--json", action="store_true", help="as JSON")
    as_json = parser.parse_args(argv).json
    facts = collect()
    print(json.dumps(facts, indent=2) if as_json else text(facts))
    return 0


def collect() -> Facts:
    """Collect the report as nested dicts of strings, numbers, booleans, lists and None.

    It never raises: what fails is {"error": one line}.
    """
    with ThreadPoolExecutor(2) as pool:
        trials = {name: pool.submit(tried, name) for name in TRIALS}
        facts = {
            "coalescer_fast": {"version": __version__, "folder": str(Path(__file__).parent)},
            "python": guarded(python),
            "packages": {name: guarded(installed, distributions) for name, distributions in PACKAGES.items()},
            "cpu": guarded(cpu),
            "gpu": guarded(gpu),
            "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)},
            "native": {"build": guarded(build)},
        }
        found = {name: trial.result() for name, trial in trials.items()}
    facts |= {name: found[name] for name in ("torch", "pipeline", "backends")}
    facts["native"] |= {part: found[f"lib {part}"] for part in PARTS}
    return facts


def guarded(probe: Callable[..., Any], *args: Any) -> Any:
    """What the probe returns, or {"error": why it cannot}."""
    try:
        return probe(*args)
    except Failed as failed:
        return {"error": one_line(str(failed))}
    except (Exception, SystemExit) as error:
        return {"error": one_line(f"{type(error).__name__}: {error}")}


def one_line(message: str) -> str:
    """A message without newlines, cut off where it is long."""
    return " ".join(message.split())[:500]


# looked up in this process


def python() -> Facts:
    return {
        "version": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "glibc": " ".join(platform.libc_ver()).strip() or None,
    }


def installed(distributions: Sequence[str]) -> str | None:
    """Version of the first distribution that is installed, by its metadata alone."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def cpu() -> Facts:
    flags: set[str] = set()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        flags = set(
            next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "").split()
        )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "flags": {name: name in flags for name in FLAGS},
    }


def cpu_name() -> str:
    """The model name of the processor, or what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def build() -> Facts:
    """Read what the installation wrote about each library, in build.json."""
    reasons = json.loads((LIBRARIES / "build.json").read_text("utf-8"))
    return {part: f"not built: {reasons[part]}" if reasons[part] else "built" for part in ("cpu", "cuda")}


def gpu() -> list[Facts]:
    fields = ("name", "compute_cap", "memory.total", "driver_version")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError:
        raise Failed("there is no nvidia-smi") from None
    if done.returncode:
        raise Failed(f"nvidia-smi fails: {done.stdout.strip() or done.stderr.strip()}")
    return [dict(zip(fields, map(str.strip, line.split(",")))) for line in done.stdout.splitlines() if line.strip()]


# tried, each in a process of its own


def try_torch() -> Facts:
    torch = import_module("torch")
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": guarded(torch.backends.cudnn.version),
        "cuda_available": guarded(torch.cuda.is_available),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "openmp": guarded(openmp),
    }


def try_pipeline() -> Facts:
    """Import all that sampling needs, and list the OpenMP runtimes that are then there: two fight for the cores."""
    import_module(f"{__package__}.pipeline")
    return {"imports": True, "openmp": guarded(openmp)}


def try_backends() -> Facts:
    """Whether each backend of each op can run here, and if not, why."""
    ops = import_module(f"{__package__}.ops")
    return {
        op: {name: {"able": able, "reason": reason} for name, (able, reason) in ops.backends(op).items()}
        for op in ops.__all__
        if op != "backends"
    }


def try_library(part: str) -> Facts:
    path = LIBRARIES / f"libcoalescer_fast_{part}.so"
    if not path.is_file():
        raise Failed(f"{path} is not there")
    library = ctypes.CDLL(str(path))
    facts: Facts = {"loads": True, "interface": library.cf_abi_version()}
    name, function = {"cpu": ("isa", "cf_cpu_isa"), "cuda": ("architectures", "cf_cuda_architectures")}[part]
    getattr(library, function).restype = ctypes.c_char_p
    return facts | {name: getattr(library, function)().decode()}


def openmp() -> list[str]:
    """Paths of the OpenMP runtimes in this process."""
    lines = Path("/proc/self/maps").read_text("utf-8").splitlines()
    paths = {parts[5].strip() for line in lines if len(parts := line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if Path(path).name.startswith(OPENMP))


TRIALS: dict[str, Callable[[], Facts]] = {
    "torch": try_torch,
    "pipeline": try_pipeline,
    "backends": try_backends,
    "lib cpu": lambda: try_library("cpu"),
    "lib cuda": lambda: try_library("cuda"),
}


def tried(name: str) -> Any:
    """Run a trial in a process that sees the same modules; {"error": ...} if it dies or hangs."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from {__package__} import collect_env; collect_env.answer({name!r})"
    )
    return guarded(ask, [sys.executable, "-c", code])


def answer(name: str) -> None:
    """Print a trial's facts as the last line of this process's output."""
    print(f"\n{json.dumps(guarded(TRIALS[name]))}", flush=True)
    os._exit(0)  # whatever a broken library does at exit


def ask(command: list[str]) -> Any:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"it has not ended after {SECONDS} s") from None
    if done.returncode < 0:
        raise Failed(f"it crashes with {signal.Signals(-done.returncode).name}")
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or [f"it exits with {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def text(facts: Facts) -> str:
    """One line a fact, its path in front."""
    return table(lines(facts))


def lines(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and set(value) == {"error"}:
        return [(path, f"ERROR {value['error']}")]
    if isinstance(value, dict) and set(value) == {"able", "reason"}:
        return [(path, "can run" if value["able"] else f"cannot run: {value['reason']}")]
    if isinstance(value, dict) and value:
        return [line for name, each in value.items() for line in lines(each, f"{path} {name}".strip())]
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return [line for i, each in enumerate(value) for line in lines(each, f"{path} {i}")]
    if isinstance(value, list):
        return [(path, ", ".join(map(str, value)) or "none")]
    if value is None or value == {}:
        return [(path, "none")]
    return [(path, ("no", "yes")[value] if isinstance(value, bool) else str(value))]


if __name__ == "__main__":
    sys.exit(main())
