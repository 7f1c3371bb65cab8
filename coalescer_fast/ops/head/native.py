"""dual_head in C++: see csrc/cpu/head.h."""

from __future__ import annotations

import struct

import torch

from .. import layout, library
from . import direction_dtype

_pack = struct.Struct("35q").pack  # cf_dual_head_args
_call = library.function("cf_cpu_dual_head")


def dual_head(
    h: torch.Tensor,
    direction_weight: torch.Tensor,
    direction_bias: torch.Tensor,
    distance_weight: torch.Tensor,
    distance_bias: torch.Tensor,
    sample: torch.Tensor | None,
    anchor: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    n, channels, height, width = h.shape
    latent = direction_weight.shape[0]
    direction = layout.empty(h, latent, direction_dtype(h, sample))
    distance = torch.empty(n, dtype=torch.float32)
    features = h.contiguous(memory_format=torch.channels_last)
    taps = direction_weight.contiguous(memory_format=torch.channels_last)
    direction_bias, direction_bias_data, direction_bias_dtype = library.vector(direction_bias)
    distance_weight, distance_weight_data, distance_weight_dtype = library.vector(distance_weight)
    distance_bias, distance_bias_data, distance_bias_dtype = library.vector(distance_bias)
    _call(
        _pack(
            features.data_ptr(),
            library.DTYPES[features.dtype],
            n,
            channels,
            latent,
            height,
            width,
            taps.data_ptr(),
            library.DTYPES[taps.dtype],
            direction_bias_data,
            direction_bias_dtype,
            distance_weight_data,
            distance_weight_dtype,
            distance_bias_data,
            distance_bias_dtype,
            *_strided(sample),
            *_strided(anchor),
            *_strided(direction),
            distance.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return direction, distance


def _strided(x: torch.Tensor | None) -> tuple[int, ...]:
    """cf_tensor4"""
    return (0,) * 6 if x is None else (x.data_ptr(), library.DTYPES[x.dtype], *x.stride())
