"""dual_head in CUDA: see csrc/cuda/head.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import cuda_library
from ...binding import NativeKernel, channels_innermost
from .native import BINDING


def of_dtype_of_h(direction_weight: Tensor, h: Tensor) -> Tensor:
    """With channels innermost, and of h's dtype."""
    return channels_innermost(direction_weight.to(h.dtype), h)


def yields(h: Tensor, *others: Any) -> str:
    """Why "auto" leaves the call to Triton, or "".

    In half precision, Triton's kernel takes a quarter to three quarters of the time of this one at all sizes that were
    measured (on an H100).
    """
    return "" if h.dtype == torch.float32 else "products in half precision are for tensor cores"


dual_head = NativeKernel(
    BINDING,
    lambda h: cuda_library.function("dual_head", h.device),
    layouts={"direction_weight": of_dtype_of_h},
    aligned=("h", "direction_weight"),
    yields=yields,
)
