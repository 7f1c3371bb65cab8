"""dual_head in CUDA: see csrc/cuda/head.h."""

from __future__ import annotations

from typing import Any

import torch

from .. import cuda_library
from . import native

def arrange(h: torch.Tensor, direction_weight: torch.Tensor, *others: Any) -> tuple[Any, ...]:
    return native.arrange(h, direction_weight.to(h.dtype), *others)


def yields(h: torch.Tensor, *others: Any) -> str:
    """Why "auto" leaves the call to Triton, or "": in half precision Triton's kernel took a quarter to three quarters of the time at
    all sizes that were measured, on an H100."""
    return "" if h.dtype == torch.float32 else "products in half precision are for tensor cores"


dual_head = native.in_layout_of_h(cuda_library.implementation("dual_head", arrange, native.prepare, aligned=(0, 1)))
dual_head.yields = yields  # type: ignore[attr-defined]
