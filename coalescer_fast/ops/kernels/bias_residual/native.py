"""bias_residual in C++: see csrc/cpu/residual.h."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import layout, native_library
from ...native_library import missing

_pack = struct.Struct("11q").pack  # cf_bias_residual_args


def arrange(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[Any, ...]:
    channels_last = layout.is_channels_last(x)
    return (
        layout.arrange(x, channels_last),
        native_library.vector(bias),
        None if residual is None else layout.arrange(residual, channels_last),
    )


def prepare(
    call: native_library.Call, x: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Callable[..., Tensor]:
    n, c, *spatial = x.shape
    shape = native_library.DTYPES[x.dtype], layout.is_channels_last(x), n, c, math.prod(spatial)
    bias_dtype = native_library.dtype(bias)

    def launch(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        y = torch.empty_like(x)
        residual_data = 0 if residual is None else residual.data_ptr() or missing(residual)
        bias_data = 0 if bias is None else bias.data_ptr() or missing(bias)
        call(
            _pack(
                x.data_ptr() or missing(x),
                residual_data,
                y.data_ptr(),
                *shape,
                bias_data,
                bias_dtype,
                torch.get_num_threads(),
            )
        )
        return y

    return launch


bias_residual = native_library.implementation(native_library.on_cpu("cf_cpu_bias_residual"), arrange, prepare)
