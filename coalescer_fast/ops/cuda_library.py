"""Loads the library of CUDA kernels (csrc/cuda) and launches them, on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import native_library

# The tests put here the library built for the CPU, and set INTERPRETED: its kernels then run on CPU tensors.
PATH: Path | None = None
INTERPRETED = False

CUDA_ERROR = 1000


class Device(NamedTuple):
    """What a choice of launch depends on (cf_cuda_device). shared_memory: bytes that a block may ask for."""

    ordinal: int
    capability: int
    multiprocessors: int
    shared_memory: int


class Plan(NamedTuple):
    """How a call is launched (cf_cuda_plan): a pure function of its sizes, dtypes and layout, and of the device.

    blocks, threads, shared_memory: of the first launch; cluster: blocks that exchange through shared memory; vector: elements that a thread
    reads at a time; workspace: bytes of device memory beside the arguments.
    """

    launches: int
    blocks: int
    threads: int
    shared_memory: int
    cluster: int
    vector: int
    workspace: int


# an H100, for kernels that run on the CPU
MODEL = Device(0, 90, 132, 227 * 1024)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    loaded, reason = native_library.find("cuda", PATH)
    if loaded is not None:
        loaded.cf_cuda_architectures.restype = loaded.cf_cuda_error.restype = ctypes.c_char_p
    return loaded, reason


def unavailable() -> str:
    """Why CUDA kernels cannot run in this process, or ""."""
    if reason := _load()[1]:
        return reason
    return "" if INTERPRETED or torch.cuda.is_available() else "there is no CUDA device"


def refusal(tensor: torch.Tensor) -> str:
    """Why the library cannot run on the tensor's device, or ""."""
    if tensor.device.type != "cuda":
        return ""
    capability, built = device(tensor.device).capability, architectures()
    if covers(built, capability):
        return ""
    names = ", ".join(f"sm_{each}" for each in built)
    return f"is on a GPU of sm_{capability}, and the CUDA kernels were built for {names}: install coalescer_fast again on this machine"


def architectures() -> tuple[int, ...]:
    """The compute capabilities, times ten, that the library has code for."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    text = loaded.cf_cuda_architectures().decode()
    return () if text == "host" else tuple(map(int, text.split(",")))


def covers(built: tuple[int, ...], capability: int) -> bool:
    """Whether code for these runs there: within a major version, on what is as new or newer (CUDA C++ Programming Guide, "Binary
    Compatibility")."""
    return any(each // 10 == capability // 10 and each <= capability for each in built)


@functools.cache
def device(place: torch.device) -> Device:
    """The device's properties; those of `MODEL` for the CPU."""
    if place.type != "cuda":
        return MODEL
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    torch.cuda.init()
    result = ctypes.create_string_buffer(struct.calcsize("4q"))
    index = torch.cuda.current_device() if place.index is None else place.index
    _check("a GPU's description", loaded.cf_cuda_describe(ctypes.c_int64(index), result))
    return Device(*struct.unpack("4q", result.raw))


def plan(op: str, arguments: bytes, on: Device) -> Plan:
    """How the library launches this call of the op on such a device."""
    function = _function(f"cf_cuda_{op}_plan", 3)
    result = ctypes.create_string_buffer(8 * len(Plan._fields))
    _check(op, function(arguments, struct.pack("4q", *on), result))
    return Plan(*struct.unpack(f"{len(Plan._fields)}q", result.raw))


@functools.cache
def _function(name: str, arguments: int) -> Callable[..., int]:
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    function = loaded[name]
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p] + [ctypes.c_void_p] * (arguments - 2)
    function.restype = ctypes.c_int
    return function


def _check(op: str, status: int) -> None:
    if status:
        error = _load()[0].cf_cuda_error(status).decode() if status >= CUDA_ERROR else native_library.STATUS[status]  # type: ignore[union-attr]
        raise RuntimeError(f"{op} on cuda reports {error}")


def bound(op: str, place: torch.device) -> native_library.Call:
    """The library's function for calls of one signature on one device, to be called with its packed arguments."""
    launch, on = _function(f"cf_cuda_{op}", 4), device(place)
    packed = struct.pack("4q", *on)
    current_stream = torch._C._cuda_getCurrentRawStream if place.type == "cuda" else lambda ordinal: 0
    workspace: int | None = None

    def call(arguments: bytes) -> None:
        nonlocal workspace
        if workspace is None:
            workspace = plan(op, arguments, on).workspace
        # given back on return: torch gives it out again in the stream's order
        scratch = torch.empty(workspace // 4, dtype=torch.float32, device=place) if workspace else None
        if status := launch(
            arguments, packed, None if scratch is None else scratch.data_ptr(), current_stream(on.ordinal)
        ):
            _check(op, status)

    return call


def implementation(
    op: str,
    arrange: Callable[..., tuple[Any, ...]],
    prepare: Callable[..., Callable[..., Any]],
    aligned: tuple[int, ...],
) -> Callable[..., Any]:
    """As `native_library.implementation`; ``aligned``: which arguments the kernels need at a multiple of 16 bytes. Others are copied there."""

    def align(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            a.clone() if i in aligned and a is not None and a.data_ptr() % 16 else a for i, a in enumerate(args)
        )

    run = native_library.implementation(lambda x: bound(op, x.device), lambda *args: align(arrange(*args)), prepare)
    prepared = run.prepare  # type: ignore[attr-defined]

    def prepare_aligned(*args: Any) -> Callable[..., Any] | None:
        if (launch := prepared(*args)) is None:
            return None

        def launch_aligned(*args: Any) -> Any:  # a signature says nothing of the address
            for i in aligned:
                if args[i] is not None and args[i].data_ptr() % 16:
                    return launch(*align(args))
            return launch(*args)

        return launch_aligned

    run.prepare = prepare_aligned  # type: ignore[attr-defined]
    return run
