"""group_norm_silu in C++: see csrc/cpu/group_norm.h."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import layout, native_library
from ...native_library import missing

_pack = struct.Struct("24qd").pack  # cf_group_norm_silu_args


def arrange(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    pre_bias: Tensor | None,
    activation: str | None,
) -> tuple[Any, ...]:
    channels_last = layout.is_channels_last(x)
    x, skip = layout.arrange(x, channels_last), None if skip is None else layout.arrange(skip, channels_last)
    weight, bias, pre_bias = (native_library.vector(v) for v in (weight, bias, pre_bias))
    return (
        x,
        num_groups,
        weight,
        bias,
        eps,
        native_library.rows(scale),
        native_library.rows(shift),
        skip,
        pre_bias,
        activation,
    )


def prepare(
    call: native_library.Call,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    pre_bias: Tensor | None,
    activation: str | None,
) -> Callable[..., Tensor]:
    n, c1, *spatial = x.shape
    c2 = 0 if skip is None else skip.shape[1]
    channels_last = layout.is_channels_last(x)
    shape = (
        native_library.DTYPES[x.dtype],
        channels_last,
        n,
        c1,
        c2,
        math.prod(spatial),
        num_groups,
        activation == "silu",
    )
    weight_dtype, bias_dtype, pre_bias_dtype, scale_dtype, shift_dtype = map(
        native_library.dtype, (weight, bias, pre_bias, scale, shift)
    )
    scale_stride, shift_stride = (0 if v is None else v.stride(0) for v in (scale, shift))

    def launch(
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        scale: Tensor | None,
        shift: Tensor | None,
        skip: Tensor | None,
        pre_bias: Tensor | None,
        activation: str | None,
    ) -> Tensor:
        y = torch.empty_like(x) if skip is None else layout.empty(x, c1 + c2, x.dtype)
        call(
            _pack(
                x.data_ptr() or missing(x),
                0 if skip is None else skip.data_ptr() or missing(skip),
                y.data_ptr(),
                *shape,
                0 if weight is None else weight.data_ptr() or missing(weight),
                weight_dtype,
                0 if bias is None else bias.data_ptr() or missing(bias),
                bias_dtype,
                0 if pre_bias is None else pre_bias.data_ptr() or missing(pre_bias),
                pre_bias_dtype,
                0 if scale is None else scale.data_ptr() or missing(scale),
                scale_dtype,
                scale_stride,
                0 if shift is None else shift.data_ptr() or missing(shift),
                shift_dtype,
                shift_stride,
                torch.get_num_threads(),
                eps,
            )
        )
        return y

    return launch


group_norm_silu = native_library.implementation(native_library.on_cpu("cf_cpu_group_norm_silu"), arrange, prepare)
