"""dual_head in C++: see csrc/cpu/head.h."""

from __future__ import annotations

from ctypes import c_int64, c_void_p
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import layout, native_library
from ...abi import Struct, cf_tensor4, cf_vector
from ...binding import Binding, NativeKernel, channels_innermost, contiguous, like
from . import direction_dtype


class cf_dual_head_args(Struct):
    _fields_: ClassVar = [
        ("h", c_void_p),
        ("dtype", c_int64),
        ("n", c_int64),
        ("c", c_int64),
        ("cz", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("direction_weight", cf_vector),
        ("direction_bias", cf_vector),
        ("distance_weight", cf_vector),
        ("distance_bias", cf_vector),
        ("sample", cf_tensor4),
        ("anchor", cf_tensor4),
        ("direction", cf_tensor4),
        ("distance", c_void_p),
        ("threads", c_int64),
    ]


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
