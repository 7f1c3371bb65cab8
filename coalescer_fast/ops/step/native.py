"""coalesce_step in C++: see csrc/cpu/step.h."""

from __future__ import annotations

import math
import struct

import torch

from .. import layout, library

_pack = struct.Struct("11q2d").pack  # cf_coalesce_step_args
_call = library.function("cf_cpu_coalesce_step")


def coalesce_step(sample: torch.Tensor, direction: torch.Tensor, distance: torch.Tensor, eta: float, mode: str, eps: float) -> torch.Tensor:
    channels_last = layout.is_channels_last(sample)
    sample, direction = layout.arrange(sample, channels_last), layout.arrange(direction, channels_last)
    y = torch.empty_like(sample)
    distance, distance_data, distance_dtype = library.vector(distance)
    n, *shape = sample.shape
    _call(
        _pack(
            sample.data_ptr(),
            library.DTYPES[sample.dtype],
            direction.data_ptr(),
            library.DTYPES[direction.dtype],
            distance_data,
            distance_dtype,
            y.data_ptr(),
            n,
            math.prod(shape),
            mode == "unit",
            torch.get_num_threads(),
            eta,
            eps,
        )
    )
    return y
