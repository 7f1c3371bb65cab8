"""A pipeline's networks on a CPU: channels innermost, weights packed once, native ops in between, bfloat16 where the CPU has it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..models.unet import Conditioning
from . import packing

if TYPE_CHECKING:
    from ..pipeline import CoalescerPipeline


def native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; without, it is emulated, and slower than float32."""
    from ..ops import library

    return not library.unavailable() and library.isa() == "avx512_bf16" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class CpuRuntime:
    """name: the runtime's; backend: of the ops; dtype: of weights and activations. R, directions, distances and pictures are float32.

    The pipeline's own networks stay as they are: what runs are copies, made anew when a weight has changed.
    """

    name = "cpu"
    device = torch.device("cpu")

    def __init__(self, pipe: CoalescerPipeline, backend: str, dtype: torch.dtype):
        self.pipe, self.backend, self.dtype = pipe, backend, dtype
        self.packs = not packing.unavailable()
        self.refresh()

    def refresh(self) -> None:
        """Take over the pipeline's weights if they are not those that the copies were made of."""
        if (state := fingerprint(self.pipe.unet, self.pipe.vae.decoder)) == getattr(self, "state", None):
            return
        self.unet = self._copy(self.pipe.unet)
        self.unet.set_backend(self.backend)
        self.decoder = self._copy(self.pipe.vae.decoder)
        if self.packs:
            packing.pack(self.unet)
            packing.pack_decoder(self.decoder)
        self.state = state

    def _copy(self, network: nn.Module) -> Any:
        fast = copy.deepcopy(network).eval().requires_grad_(False)
        for parameter in fast.parameters():
            parameter.data = parameter.data.to(self.dtype)
        return fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def condition(self, texts: list[str], device: torch.device) -> Conditioning:
        """The reference's, in float32: it is small, and what it gives is then rounded once."""
        full = self.pipe.condition(texts, device)
        film = [(scale.to(self.dtype), shift.to(self.dtype)) for scale, shift in full.film]
        keys_values = [(keys.to(self.dtype), values.to(self.dtype)) for keys, values in full.keys_values]
        anchor = None if full.anchor is None else full.anchor.contiguous(memory_format=torch.channels_last)
        return Conditioning(film, anchor, keys_values, full.mask)

    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        return self.unet(sample.contiguous(memory_format=torch.channels_last), conditioning, return_dict=False)

    def decode(self, latents: Tensor) -> Tensor:
        x = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return F.pixel_shuffle(self.decoder(x).float(), self.pipe.vae.patch_size)

    def explain(self) -> list[dict[str, str]]:
        """What runs each part, and why not something faster."""
        weights = "packed for oneDNN" if self.packs else f"not packed: {packing.unavailable()}"
        rows = [{"part": "convolutions, linear layers", "runs on": f"oneDNN, {self.dtype}", "because": weights}]
        for op in ("group_norm_silu", "bias_residual", "dual_head", "coalesce_step"):
            if op == "bias_residual" and self.packs:
                rows.append({"part": op, "runs on": "oneDNN", "because": "a packed convolution adds bias and residual itself"})
                continue
            able, reason = ops.backends(op)[self.backend]
            rows.append({"part": op, "runs on": self.backend, "because": "it can run" if able else reason})
        return rows


def fingerprint(*networks: nn.Module) -> list[tuple[int, int]]:
    """Where the weights lie and how often they have been written to: another one after any change of them."""
    return [(t.data_ptr(), t._version) for network in networks for t in network.parameters()]
