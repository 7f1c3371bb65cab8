"""dual_head in CUDA: see csrc/cuda/head.h."""

from __future__ import annotations

from typing import Any

import torch

from ... import cuda_library
from . import native

# Products of half precision beyond which tensor cores are faster, as counted: at 17 tera-products a second, half an H100's rate without
# them, this takes as long as a launch. Not yet measured.
MOST_PRODUCTS = 50_000_000


def arrange(h: torch.Tensor, direction_weight: torch.Tensor, *others: Any) -> tuple[Any, ...]:
    return native.arrange(h, direction_weight.to(h.dtype), *others)


def yields(h: torch.Tensor, direction_weight: torch.Tensor, *others: Any) -> str:
    """Why "auto" leaves the call to Triton, or ""."""
    products = h.numel() * direction_weight.shape[0] * 9
    if h.dtype == torch.float32 or products <= MOST_PRODUCTS:
        return ""
    return f"{products / 1e6:.0f} million products in half precision are for tensor cores"


dual_head = native.in_layout_of_h(cuda_library.implementation("dual_head", arrange, native.prepare, aligned=(0, 1)))
dual_head.yields = yields  # type: ignore[attr-defined]
