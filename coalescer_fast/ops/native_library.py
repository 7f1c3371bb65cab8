"""Loads the native libraries of csrc (see csrc/abi.h), runs the one for CPUs, and what the bindings of both share."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[1] / "lib"
ABI_VERSION = 3
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
STATUS = {1: "an argument that it does not take", 2: "out of memory"}
Call = Callable[[bytes], None]
OPENMP_FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def find(part: str, path: Path | None = None) -> tuple[ctypes.CDLL | None, str]:
    """The library of "cpu" or "cuda" kernels, or None and why there is none."""
    path = path or FOLDER / f"libcoalescer_fast_{part}.so"
    if not path.is_file():
        try:
            reason = json.loads((FOLDER / "build.json").read_text("utf-8"))[part]
        except (OSError, ValueError, KeyError):
            reason = "this checkout has not been installed"
        return (
            None,
            f"the library of {part.upper()} kernels is not there: {reason}; install coalescer_fast again to build it",
        )
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
            # OpenMP's threads are not in a child, and its next parallel region would wait for them, torch's as well as ours
            os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    return library, reason


def unavailable() -> str:
    """Why the native CPU kernels cannot run in this process, or ""."""
    return _load()[1]


def isa() -> str:
    """The instruction set that the CPU kernels use: "avx512_bf16", "avx512", "avx2" or "portable"."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library.cf_cpu_isa().decode()


def vector_width() -> int:
    """Floats in a vector of the instruction set in use."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library.cf_cpu_vector_width()


def products() -> tuple[torch.dtype, ...]:
    """The dtypes that the instruction set in use multiplies itself."""
    library, _ = _load()
    found = 0 if library is None or unavailable() else library.cf_cpu_products()
    return (torch.float32, *(dtype for bit, dtype in enumerate((torch.bfloat16, torch.uint8)) if found >> bit & 1))


def set_isa(name: str) -> None:
    """Use another instruction set from now on, to test or measure it. Raises ValueError if there is none such here."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    if library.cf_cpu_set_isa(name.encode()):
        raise ValueError(
            f"isa is {name!r}; expected one that this processor has, of avx512_bf16, avx512, avx2, portable"
        )


def _openmp() -> list[Any]:
    """`OPENMP_FUNCTIONS` of the OpenMP runtime that torch has loaded; null pointers if it has none.

    The library links to no OpenMP runtime of its own: two in a process would each start as many threads as there are cores.
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
    """The library's function ``name``, to be called with its packed arguments; raises RuntimeError if it reports a failure."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    native = library[name]
    native.argtypes = [ctypes.c_char_p]
    native.restype = ctypes.c_int

    def call(arguments: bytes) -> None:
        if status := native(arguments):
            raise RuntimeError(f"{name} reports {STATUS.get(status, f'status {status}')}")

    return call


def implementation(
    bind: Callable[[torch.Tensor], Call],
    arrange: Callable[..., tuple[Any, ...]],
    prepare: Callable[..., Callable[..., Any]],
) -> Callable[..., Any]:
    """An op's function made of three: ``bind`` gives a native function for calls on the device of a tensor; ``arrange`` gives the arguments
    with the memory layout that it takes, tensors that have it being themselves; ``prepare`` gives, after the native function, a launcher
    for such arguments and all others with their `dispatch.signature` and scalars."""

    def run(*args: Any) -> Any:
        arranged = arrange(*args)
        return prepare(bind(args[0]), *arranged)(*arranged)

    def prepare_if_arranged(*args: Any) -> Callable[..., Any] | None:
        arranged = arrange(*args)
        return prepare(bind(args[0]), *args) if all(one is other for one, other in zip(args, arranged)) else None

    run.prepare = prepare_if_arranged  # type: ignore[attr-defined]
    return run


def on_cpu(name: str) -> Callable[[torch.Tensor], Call]:
    """``bind`` of `implementation`: the CPU library's function ``name``, loaded at the first call."""
    return lambda x: function(name)


class NoMemory(TypeError):
    """An argument has no memory of its own, and the call must go the long way through `dispatch.run`."""


def missing(x: torch.Tensor) -> int:
    """The address of a tensor whose ``data_ptr()`` is 0: a tensor without elements has none. Raises `NoMemory` for any other."""
    if x.numel():
        raise NoMemory(f"a tensor of shape {tuple(x.shape)} has no memory")
    return 0


def dtype(x: torch.Tensor | None) -> int:
    """The code of the tensor's dtype in the interface."""
    return 0 if x is None else DTYPES[x.dtype]


def vector(v: torch.Tensor | None) -> torch.Tensor | None:
    """A one-dimensional parameter as the library takes it."""
    return None if v is None else v.contiguous()


def rows(v: torch.Tensor | None) -> torch.Tensor | None:
    """A matrix as the library takes it: whatever is between its rows, each is contiguous."""
    return v if v is None or v.stride(1) == 1 else v.contiguous()
