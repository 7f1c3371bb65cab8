"""dual_head in CUDA: see csrc/cuda/head.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import cuda_library
from ...binding import NativeKernel, channels_innermost
from .native import BINDING

# Products of half precision beyond which tensor cores are faster, as counted: at 17 tera-products a second, half an
# H100's rate without them, this takes as long as a launch. Not yet measured.
MOST_PRODUCTS = 50_000_000


def of_dtype_of_h(direction_weight: Tensor, h: Tensor) -> Tensor:
    """With channels innermost, and of h's dtype."""
    return channels_innermost(direction_weight.to(h.dtype), h)


def yields(h: Tensor, direction_weight: Tensor, *others: Any) -> str:
    """Why "auto" leaves the call to Triton, or ""."""
    products = h.numel() * direction_weight.shape[0] * 9
    if h.dtype == torch.float32 or products <= MOST_PRODUCTS:
        return ""
    return f"{products / 1e6:.0f} million products in half precision are for tensor cores"


dual_head = NativeKernel(
    BINDING,
    lambda h: cuda_library.function("dual_head", h.device),
    layouts={"direction_weight": of_dtype_of_h},
    aligned=("h", "direction_weight"),
    yields=yields,
)
