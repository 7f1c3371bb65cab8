"""group_norm_silu in C++: see csrc/cpu/group_norm.h."""

from __future__ import annotations

import math
import struct

import torch

from .. import layout, library

_pack = struct.Struct("24qd").pack  # cf_group_norm_silu_args
_call = library.function("cf_cpu_group_norm_silu")


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    skip: torch.Tensor | None,
    pre_bias: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    channels_last = layout.is_channels_last(x)
    n, c1, *spatial = x.shape
    x = layout.arrange(x, channels_last)
    if skip is None:
        c2, skip_data = 0, 0
        y = torch.empty_like(x)
    else:
        c2, skip = skip.shape[1], layout.arrange(skip, channels_last)
        skip_data = skip.data_ptr()
        y = layout.empty(x, c1 + c2, x.dtype)
    weight, weight_data, weight_dtype = library.vector(weight)
    bias, bias_data, bias_dtype = library.vector(bias)
    pre_bias, pre_bias_data, pre_bias_dtype = library.vector(pre_bias)
    scale, scale_data, scale_dtype, scale_stride = library.rows(scale)
    shift, shift_data, shift_dtype, shift_stride = library.rows(shift)
    _call(
        _pack(
            x.data_ptr(),
            skip_data,
            y.data_ptr(),
            library.DTYPES[x.dtype],
            channels_last,
            n,
            c1,
            c2,
            math.prod(spatial),
            num_groups,
            activation == "silu",
            weight_data,
            weight_dtype,
            bias_data,
            bias_dtype,
            pre_bias_data,
            pre_bias_dtype,
            scale_data,
            scale_dtype,
            scale_stride,
            shift_data,
            shift_dtype,
            shift_stride,
            torch.get_num_threads(),
            eps,
        )
    )
    return y
