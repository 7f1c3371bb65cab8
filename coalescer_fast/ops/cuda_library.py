"""Loads the native library of CUDA kernels (csrc/cuda) and launches them, on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import abi, native_library

# The tests put here the library built for the CPU, and set INTERPRETED: its kernels then run on CPU tensors.
PATH: Path | None = None
INTERPRETED = False


class Device(NamedTuple):
    """What a launch plan depends on: the fields of ``cf_cuda_device``.

    Attributes:
        ordinal: CUDA's number of the device.
        capability: compute capability times ten.
        multiprocessors: how many there are.
        shared_memory: bytes that a block may ask for.
    """

    ordinal: int
    capability: int
    multiprocessors: int
    shared_memory: int


class LaunchPlan(NamedTuple):
    """How a call is launched: the fields of ``cf_cuda_plan``. It depends on sizes, dtypes, layout and device alone.

    Attributes:
        launches: how many kernels run one after another.
        blocks: of the first launch.
        threads: of a block of the first launch.
        shared_memory: bytes, of a block of the first launch.
        cluster: blocks that exchange through shared memory, 1 for none.
        vector: elements that a thread reads at a time.
        workspace: bytes of device memory that the call needs beside its arguments.
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


def _library() -> Any:
    """The library of CUDA kernels; Any, for ctypes knows no types of its functions."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


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
    return (
        f"is on a GPU of sm_{capability}, and the CUDA kernels were built for {names}: "
        "install coalescer_fast again on this machine"
    )


def architectures() -> tuple[int, ...]:
    """The compute capabilities, times ten, that the library has code for."""
    text: str = _library().cf_cuda_architectures().decode()
    return () if text == "host" else tuple(map(int, text.split(",")))


def covers(built: tuple[int, ...], capability: int) -> bool:
    """Whether code for these compute capabilities runs on a device of that one.

    It does within a major version, on what is as new or newer (CUDA C++ Programming Guide, "Binary Compatibility").
    """
    return any(each // 10 == capability // 10 and each <= capability for each in built)


@functools.cache
def device(place: torch.device) -> Device:
    """The device's properties; those of `MODEL` for the CPU."""
    if place.type != "cuda":
        return MODEL
    torch.cuda.init()
    index = torch.cuda.current_device() if place.index is None else place.index
    result = abi.cf_cuda_device()
    _check("a GPU's description", _library().cf_cuda_describe(ctypes.c_int64(index), ctypes.byref(result)))
    return Device(*(getattr(result, name) for name in Device._fields))


def plan(op: str, arguments: bytes, on: Device) -> LaunchPlan:
    """How the library launches a call of the op on such a device.

    Args:
        op: its name.
        arguments: of the call, packed (`binding.NativeKernel.packed`).
        on: the device.
    """
    result = abi.cf_cuda_plan()
    status = _function(f"cf_cuda_{op}_plan", 3)(arguments, _packed(on), ctypes.byref(result))
    _check(op, status)
    return LaunchPlan(*(getattr(result, name) for name in LaunchPlan._fields))


def _packed(on: Device) -> bytes:
    return abi.cf_cuda_device.pack(**on._asdict())


@functools.cache
def _function(name: str, arguments: int) -> Callable[..., int]:
    function = _library()[name]
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p] + [ctypes.c_void_p] * (arguments - 2)
    function.restype = ctypes.c_int
    result: Callable[..., int] = function
    return result


def _check(op: str, status: int) -> None:
    if status:
        if status >= abi.cf_status.CF_CUDA_ERROR:
            error = _library().cf_cuda_error(status).decode()
        else:
            error = f"{native_library.STATUS[status]}, or sizes beyond its 32-bit indices"
        raise RuntimeError(f"{op} on cuda reports {error}")


def function(op: str, place: torch.device) -> native_library.Call:
    """The library's function of this op for calls of one kind on one device, for calls with its packed arguments."""
    launch, on = _function(f"cf_cuda_{op}", 4), device(place)
    packed = _packed(on)
    current_stream = torch._C._cuda_getCurrentRawStream if place.type == "cuda" else lambda ordinal: 0
    workspace: int | None = None

    def call(arguments: bytes) -> None:
        nonlocal workspace
        if workspace is None:
            workspace = plan(op, arguments, on).workspace
        # given back on return: torch gives it out again in the stream's order
        scratch = torch.empty(workspace // 4, dtype=torch.float32, device=place) if workspace else None
        address = None if scratch is None else scratch.data_ptr()
        if status := launch(arguments, packed, address, current_stream(on.ordinal)):
            _check(op, status)

    return call
