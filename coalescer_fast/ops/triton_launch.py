"""What the Triton kernels share: whether they can run here, the table of their configurations, and their launch."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from .op import missing

# Triton's own switch, read when a kernel is decorated: the kernels then run in its interpreter, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

CONFIGURATIONS = Path(__file__).with_name("triton_configs.json")


# Kernels count the positions of a sample, and the elements of a tile with a row of the image around it, in 32 bits, and
# all else in 64: 2^31 less the last block, and less what workspaces take for each channel.
MOST_POSITIONS, MOST_IN_A_TILE = 2**31 - 2**16, 2**28
TILE = 256  # positions, at most


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
    return _too_large(tensor.shape[1:])


def _too_large(shape: Sequence[int]) -> str:
    """Why kernels have no indices for samples of this shape, channels first, or ""."""
    if not shape:
        return ""
    channels, *size = shape
    positions, elements = math.prod(size), math.prod(shape)
    in_a_tile = channels * min(positions, TILE + (size[-1] if size else 0))
    # a loop over so many elements would not end
    is_last_block = MOST_POSITIONS < elements < 2**31
    if positions <= MOST_POSITIONS and in_a_tile <= MOST_IN_A_TILE and not is_last_block:
        return ""
    return f"has samples of shape {tuple(shape)}, which are too large for the 32-bit indices of Triton's kernels"


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
