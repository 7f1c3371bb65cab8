"""What every runtime of an accelerated pipeline is, and the count of what they have prepared."""

from __future__ import annotations

import copy
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


def precision(runtime: Any) -> str:
    """What a runtime's networks multiply in: "int8", or the name of its dtype, which is then that of the rest."""
    return "int8" if getattr(runtime, "quantised", False) else str(runtime.dtype).removeprefix("torch.")


class Runtime(Protocol):
    """What runs a pipeline's networks in their place. name: the runtime's; device: the pipeline's; dtype: what the networks compute in;
    backend: of the ops that the pipeline itself calls.

    R, directions, distances and pictures are float32, whatever the dtype, and a result is not written to by a later call. Several threads
    may call at once.
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
