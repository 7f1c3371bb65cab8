"""A pipeline's networks on a CPU: weights packed once, native ops in between, bfloat16 where the CPU has it."""

from __future__ import annotations

import torch

from .. import ops
from . import packing
from .networks import Networks


def native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; without, it is emulated, and slower than float32."""
    from ..ops import library

    return not library.unavailable() and library.isa() == "avx512_bf16" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class CpuRuntime(Networks):
    """Convolutions and linear layers on packed weights, where torch can pack them."""

    name = "cpu"

    def prepare(self) -> None:
        self.packs = not packing.unavailable()
        if self.packs:
            packing.pack(self.unet)
            packing.pack_decoder(self.decoder)

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
