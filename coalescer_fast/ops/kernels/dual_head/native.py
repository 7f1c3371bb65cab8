"""dual_head in C++: see csrc/cpu/head.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import layout, native_library
from ...abi import cf_dual_head_args
from ...binding import Binding, NativeKernel, channels_innermost, contiguous, like
from . import direction_dtype


def fields(
    h: Tensor,
    direction_weight: Tensor,
    direction_bias: Tensor,
    distance_weight: Tensor,
    distance_bias: Tensor,
    sample: Tensor | None,
    anchor: Tensor | None,
) -> dict[str, Any]:
    n, channels, height, width = h.shape
    latent = direction_weight.shape[0]
    return {
        "direction": like(layout.empty(h, latent, direction_dtype(h, sample))),
        "distance": like(torch.empty(n, dtype=torch.float32, device=h.device)),
        "dtype": native_library.DTYPE_CODES[h.dtype],
        "n": n,
        "c": channels,
        "cz": latent,
        "height": height,
        "width": width,
    }


def restore(results: tuple[Tensor, Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
    """The direction in h's layout: kernels write channels innermost."""
    direction, distance = results
    return layout.arrange(direction, layout.is_channels_last(h)), distance


BINDING = Binding(
    cf_dual_head_args,
    fields,
    {
        "h": channels_innermost,
        "direction_weight": channels_innermost,
        "direction_bias": contiguous,
        "distance_weight": contiguous,
        "distance_bias": contiguous,
    },
    restore,
)
dual_head = NativeKernel(BINDING, lambda h: native_library.function("cf_cpu_dual_head"))
