"""What every runtime of an accelerated pipeline is, and the count of what they have prepared."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..models.unet import Conditioning

T = TypeVar("T")

# How often something has been prepared in this process that later calls use as it is, a packed weight or a network for new shapes: a call
# after a warm-up adds nothing.
count = 0


def counted(prepared: T) -> T:
    global count
    count += 1
    return prepared


def channels_last_copy(network: nn.Module, dtype: torch.dtype) -> Any:
    """A copy for inference in this dtype, channels innermost."""
    fast = copy.deepcopy(network).eval().requires_grad_(False)
    for parameter in fast.parameters():
        parameter.data = parameter.data.to(dtype)
    return fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Inside, or as a decorator: torch makes ordinary tensors, without gradients, in the dtypes that it is given, whatever inference mode,
    gradient mode and autocast the caller has chosen."""
    with torch.inference_mode(False), torch.no_grad(), _autocast_off("cpu"), _autocast_off("cuda"):
        yield


def _autocast_off(device_type: str) -> Any:
    # made only where it is on: making it takes longer than the rest
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def entered(x: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of the caller's as a runtime reads it: on its device, in its dtype, and what lies in memory is its values, not lazily their
    negatives. Strides and offset stay as they are."""
    return x.detach().to(device, dtype).resolve_neg()


def precision(runtime: Any) -> str:
    """What a runtime's networks multiply in: "int8", or the name of its dtype, which is then that of the rest."""
    return "int8" if getattr(runtime, "quantised", False) else str(runtime.dtype).removeprefix("torch.")


class Runtime(Protocol):
    """What runs a pipeline's networks in their place. name: the runtime's; device: the pipeline's; dtype: what the networks compute in;
    backend: of the ops that the pipeline itself calls.

    What is given, R and latents, may have any floating-point dtype, strides and device (`entered`), and the caller be in inference mode or
    under autocast, which changes nothing (`quiet_torch`). R, directions, distances and pictures are float32, whatever the dtype, and a
    result is not written to by a later call. Several threads may call at once.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    backend: str

    def refresh(self) -> None:
        """Take over the pipeline's weights if they have changed; comes before every call of the pipeline."""

    def condition(self, texts: list[str], device: torch.device) -> Conditioning:
        """What the UNet derives from descriptions alone."""

    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Direction (N, C, h, w) and distance (N,) at R."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (N, 3, H, W), about in [-1, 1]."""

    def explain(self) -> list[dict[str, str]]:
        """Rows of "part", "runs on" and "because"."""
