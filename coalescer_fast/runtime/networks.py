"""A pipeline's networks as a runtime runs them: copies, channels innermost, in the runtime's dtype."""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.unet import Conditioning

if TYPE_CHECKING:
    from ..pipeline import CoalescerPipeline


class Networks:
    """name: the runtime's; backend: of the ops; dtype: of weights and activations. R, directions, distances and pictures are float32.

    The pipeline's own networks stay as they are: what runs are copies, made anew when a weight has changed.
    """

    name: str

    def __init__(self, pipe: CoalescerPipeline, backend: str, dtype: torch.dtype):
        self.pipe, self.backend, self.dtype, self.device = pipe, backend, dtype, pipe.device
        self.state: list[tuple[int, int]] | None = None
        self.lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Take over the pipeline's weights if they are not those that the copies were made of."""
        with self.lock:
            if (state := fingerprint(self.pipe.unet, self.pipe.vae.decoder)) == self.state:
                return
            self.unet = self._copy(self.pipe.unet)
            self.unet.set_backend(self.backend)
            self.decoder = self._copy(self.pipe.vae.decoder)
            self.empty: Conditioning | None = None
            self.prepare()
            self.state = state

    def prepare(self) -> None:
        """What is to be done with new copies."""

    def explain(self) -> list[dict[str, str]]:
        """What runs each part, and why not something faster: rows of part, "runs on" and because."""
        raise NotImplementedError

    def _copy(self, network: nn.Module) -> Any:
        fast = copy.deepcopy(network).eval().requires_grad_(False)
        for parameter in fast.parameters():
            parameter.data = parameter.data.to(self.dtype)
        return fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def condition(self, texts: list[str], device: torch.device) -> Conditioning:
        """The reference's, in float32: it is small, and what it gives is then rounded once. Not to be written to; that of the empty
        description alone is kept, for it depends on the weights only."""
        if texts == [""] and self.empty is not None:
            return self.empty
        full = self.pipe.condition(texts, device)
        rounded = full.map(lambda x: x.to(self.dtype))
        anchor = None if full.anchor is None else full.anchor.contiguous(memory_format=torch.channels_last)
        found = Conditioning(rounded.film, anchor, rounded.keys_values, full.mask)
        if texts == [""]:
            self.empty = found
        return found

    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        return self.unet(sample.contiguous(memory_format=torch.channels_last), conditioning, return_dict=False)

    def decode(self, latents: Tensor) -> Tensor:
        x = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return F.pixel_shuffle(self.decoder(x).float(), self.pipe.vae.patch_size)


def fingerprint(*networks: nn.Module) -> list[tuple[int, int]]:
    """Where the weights lie and how often they have been written to: another one after any change of them."""
    return [(t.data_ptr(), t._version) for network in networks for t in network.parameters()]
