"""Finds the native libraries, which are compiled from csrc, and calls the one for CPUs."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .abi import ABI_VERSION, cf_dtype, cf_status

FOLDER = Path(__file__).parents[1] / "lib"
# what calls that fail report, by status
STATUS: dict[int, str] = {
    cf_status.CF_INVALID_ARGUMENT: "an argument that it does not take",
    cf_status.CF_OUT_OF_MEMORY: "out of memory",
}
# The dtypes of tensors that kernels of ops take, by their numbers in csrc/abi.h.
DTYPE_CODES = {
    torch.float32: cf_dtype.CF_FLOAT32.value,
    torch.float16: cf_dtype.CF_FLOAT16.value,
    torch.bfloat16: cf_dtype.CF_BFLOAT16.value,
}
# A function of a native library, given its packed arguments; it raises RuntimeError if it reports a failure.
Call = Callable[[bytes], None]
# CPU kernels run on CPU tensors alone: see `dispatch.Support`.
INTERPRETED = False
# Instruction sets of the CPU kernels, the best first.
ISAS = ("avx512_bf16", "avx512", "avx2_vnni", "avx2", "portable")
OPENMP_FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def find(part: str, path: Path | None = None) -> tuple[ctypes.CDLL | None, str]:
    """The library of "cpu" or "cuda" kernels, or None and why there is none."""
    path = path or FOLDER / f"libcoalescer_fast_{part}.so"
    if not path.is_file():
        fix = "install coalescer_fast again to build it"
        try:
            reason = json.loads((FOLDER / "build.json").read_text("utf-8"))[part]
        except (OSError, ValueError, KeyError):
            # an installation elsewhere does not help whoever imports the package from a checkout
            reason = f"{FOLDER.parent} is a checkout that nothing was built in"
            fix = f"run `python setup.py build_native` or `pip install -e .` in {FOLDER.parents[1]}"
        return None, f"the library of {part.upper()} kernels is not there: {reason}; {fix}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} cannot be loaded: {error}"
    if (version := library.cf_abi_version()) != ABI_VERSION:
        return (
            None,
            f"{path.name} has interface version {version}; expected {ABI_VERSION}: install coalescer_fast again",
        )
    return library, ""


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    library, reason = find("cpu")
    if library is not None:
        library.cf_cpu_isa.restype = ctypes.c_char_p
        library.cf_cpu_set_openmp(*_openmp())
        if hasattr(os, "register_at_fork"):
            # A child process does not have OpenMP's threads. Its next parallel region would wait for them forever,
            # torch's as well as ours.
            os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    return library, reason


def unavailable() -> str:
    """Why the native CPU kernels cannot run in this process, or ""."""
    return _load()[1]


def refusal(tensor: torch.Tensor) -> str:
    """Why they cannot take this tensor, whose dtype and device are right: never."""
    return ""


def _library() -> Any:
    """The library of CPU kernels; Any, for ctypes knows no types of its functions."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


def isa() -> str:
    """The instruction set that the CPU kernels use: "avx512_bf16", "avx512", "avx2_vnni", "avx2" or "portable"."""
    name: bytes = _library().cf_cpu_isa()
    return name.decode()


def vector_width() -> int:
    """Floats in a vector of the instruction set in use."""
    return int(_library().cf_cpu_vector_width())


def products() -> tuple[torch.dtype, ...]:
    """The dtypes that the instruction set in use multiplies itself."""
    library, _ = _load()
    found = 0 if library is None or unavailable() else library.cf_cpu_products()
    return (torch.float32, *(dtype for bit, dtype in enumerate((torch.bfloat16, torch.uint8)) if found >> bit & 1))


def largest_weight() -> int:
    """The largest int8 weight that the instruction set in use multiplies, and the smallest with a minus: 127 or 64."""
    return int(_library().cf_cpu_largest_weight())


@functools.cache
def amx() -> bool:
    """Whether torch's convolutions (oneDNN's) multiply bfloat16 and 8-bit integers by AMX here.

    The processor must have it, the system must let this process use it, which torch asks for, as oneDNN does, and
    oneDNN must not be switched off or capped below it by the environment.
    """
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    allowed = cap in ("", "DEFAULT", "ALL") or "AMX" in cap
    able = allowed and torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()
    return bool(able and torch.cpu._init_amx())


def slower_than_torch(dtype: torch.dtype) -> str:
    """Why torch's convolutions are the faster ones for networks in this dtype, or ""."""
    if dtype not in (torch.bfloat16, torch.int8) or not torch.backends.mkldnn.enabled or not amx():
        return ""
    return "the processor has AMX, which torch's convolutions use and native ones do not; backend='cpu' takes those"


def set_isa(name: str) -> None:
    """Use another instruction set from now on, to test or measure it.

    Raises:
        ValueError: the processor or the library does not have it, or there is no library.
    """
    if reason := unavailable():
        raise ValueError(reason)
    if _library().cf_cpu_set_isa(name.encode()):
        raise ValueError(f"isa is {name!r}; expected one that this processor has, of {', '.join(ISAS)}")


def _openmp() -> list[Any]:
    """`OPENMP_FUNCTIONS` of the OpenMP runtime that torch has loaded, or null pointers if it has none.

    The library links to no OpenMP runtime: two in a process would each start as many threads as there are cores.
    """
    candidates = [
        str(path)
        for pattern in ("libgomp*", "libiomp5*", "libomp*")
        for path in Path(torch.__file__).parent.glob(f"lib/{pattern}")
    ]
    try:
        mapped = {
            line.split(maxsplit=5)[-1].strip()
            for line in Path("/proc/self/maps").read_text().splitlines()
            if "omp" in line
        }
    except OSError:
        mapped = set()
    candidates += sorted(p for p in mapped if Path(p).name.startswith(("libgomp", "libiomp5", "libomp")))
    for path in candidates:
        try:
            runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in OPENMP_FUNCTIONS]
        except (OSError, AttributeError):
            continue
    return [None] * len(OPENMP_FUNCTIONS)


@functools.cache
def function(name: str) -> Call:
    """The library's function of this name, for calls with its packed arguments."""
    native = _library()[name]
    native.argtypes = [ctypes.c_char_p]
    native.restype = ctypes.c_int

    def call(arguments: bytes) -> None:
        if status := native(arguments):
            raise RuntimeError(f"{name} reports {STATUS.get(status, f'status {status}')}")

    return call
