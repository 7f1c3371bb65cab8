"""The reference: the pipeline's own networks, as PyTorch runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.unet import Conditioning
from .base import Part, Runtime

if TYPE_CHECKING:
    from ..prompts import Descriptions


class EagerRuntime(Runtime):
    """Runs the pipeline's own `condition`, `evaluate` and `decode`, which a user may replace.

    Device, dtype and backend are those that the networks have at the moment, so there is nothing to refresh.
    """

    name = "reference"

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # read-only here
        device: torch.device = self.pipe._execution_device
        return device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        dtype: torch.dtype = self.pipe.unet.dtype
        return dtype

    @property
    def backend(self) -> str:  # type: ignore[override]
        backend: str = self.pipe.unet.backend
        return backend

    def condition(self, texts: Descriptions, device: torch.device) -> Conditioning:
        return self.pipe.condition(texts, device)

    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        return self.pipe.evaluate(sample, conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        return self.pipe.decode(latents)

    def explain(self) -> list[Part]:
        return [Part("all", "reference", "the pipeline is not accelerated")]
