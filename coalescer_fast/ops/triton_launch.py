"""What the Triton kernels share: whether they can run here, the table of their configurations, and their launch."""

from __future__ import annotations

import functools
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from .op import missing

# Triton's own switch, read when a kernel is decorated: the kernels then run in its interpreter, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

CONFIGURATIONS = Path(__file__).with_name("triton_configs.json")


@functools.cache
def unavailable() -> str:
    """Why Triton kernels cannot run in this process, or ""."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
        return f"triton is {triton.__version__}; expected 3.5 or newer"
    return "" if INTERPRETED or torch.cuda.is_available() else "there is no CUDA device"


def refusal(tensor: torch.Tensor) -> str:
    """Why Triton kernels cannot take this tensor though its dtype and type of device are right, or ""."""
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        return (
            "has dtype torch.bfloat16, to which Triton's interpreter truncates; expected torch.float32, torch.float16"
        )
    if tensor.device.type == "cuda" and (capability := _capability(tensor.device)) < (8, 0):
        return f"is on {tensor.device} of compute capability {'.'.join(map(str, capability))}; expected 8.0 or newer"
    return ""


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors there are to fill; a few in the interpreter, where programs run one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(CONFIGURATIONS.read_text("utf-8"))
    return table


@functools.cache
def configuration(kernel: str, layout: str, size: str) -> dict[str, int]:
    """The kernel's block sizes, num_warps and num_stages for a layout and a class of sizes; not to be modified.

    Raises: KeyError for what `triton_configs.json` does not list.
    """
    options: dict[str, int] = _table()[kernel][layout][size]["configuration"]
    return options


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own, made for kernels too, takes 1.5 us."""
    return -(-a // b)


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
    """Run ``kernel`` in ``programs`` programs on the device's current stream."""
    if programs:
        for tensor in args:
            if isinstance(tensor, torch.Tensor) and not tensor.data_ptr():
                missing(tensor)
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else nullcontext():
            kernel[(programs,)](*args, **options)
