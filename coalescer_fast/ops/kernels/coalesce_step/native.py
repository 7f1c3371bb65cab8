"""coalesce_step in C++: see csrc/cpu/step.h."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import layout, native_library
from ...native_library import missing

_pack = struct.Struct("11q2d").pack  # cf_coalesce_step_args


def arrange(sample: Tensor, direction: Tensor, distance: Tensor, eta: float, mode: str, eps: float) -> tuple[Any, ...]:
    channels_last = layout.is_channels_last(sample)
    return (
        layout.arrange(sample, channels_last),
        layout.arrange(direction, channels_last),
        distance.contiguous(),
        eta,
        mode,
        eps,
    )


def prepare(
    call: native_library.Call, sample: Tensor, direction: Tensor, distance: Tensor, eta: float, mode: str, eps: float
) -> Callable[..., Tensor]:
    sample_dtype, direction_dtype, distance_dtype = (native_library.dtype(x) for x in (sample, direction, distance))
    n, *shape = sample.shape
    size, unit = math.prod(shape), mode == "unit"

    def launch(sample: Tensor, direction: Tensor, distance: Tensor, eta: float, mode: str, eps: float) -> Tensor:
        y = torch.empty_like(sample)
        call(
            _pack(
                sample.data_ptr() or missing(sample),
                sample_dtype,
                direction.data_ptr() or missing(direction),
                direction_dtype,
                distance.data_ptr() or missing(distance),
                distance_dtype,
                y.data_ptr(),
                n,
                size,
                unit,
                torch.get_num_threads(),
                eta,
                eps,
            )
        )
        return y

    return launch


coalesce_step = native_library.implementation(native_library.on_cpu("cf_cpu_coalesce_step"), arrange, prepare)
