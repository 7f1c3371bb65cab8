"""bias_residual in C++: see csrc/cpu/residual.h."""

from __future__ import annotations

import math
import struct

import torch

from .. import layout, library

_pack = struct.Struct("11q").pack  # cf_bias_residual_args
_call = library.function("cf_cpu_bias_residual")


def bias_residual(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    channels_last = layout.is_channels_last(x)
    x = layout.arrange(x, channels_last)
    residual_data = 0
    if residual is not None:
        residual = layout.arrange(residual, channels_last)
        residual_data = residual.data_ptr()
    y = torch.empty_like(x)
    bias, bias_data, bias_dtype = library.vector(bias)
    n, c, *spatial = x.shape
    _call(
        _pack(
            x.data_ptr(),
            residual_data,
            y.data_ptr(),
            library.DTYPES[x.dtype],
            channels_last,
            n,
            c,
            math.prod(spatial),
            bias_data,
            bias_dtype,
            torch.get_num_threads(),
        )
    )
    return y
