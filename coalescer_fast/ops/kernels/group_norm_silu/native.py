"""group_norm_silu in C++: see csrc/cpu/group_norm.h."""

from __future__ import annotations

import math
from ctypes import c_double, c_int64, c_void_p
from typing import Any, ClassVar

from torch import Tensor

from ... import layout, native_library
from ...abi import Struct, cf_vector
from ...binding import Binding, NativeKernel, contiguous, contiguous_rows, dense, like


class cf_group_norm_silu_args(Struct):
    _fields_: ClassVar = [
        ("x", c_void_p),
        ("skip", c_void_p),
        ("y", c_void_p),
        ("dtype", c_int64),
        ("channels_last", c_int64),
        ("n", c_int64),
        ("c1", c_int64),
        ("c2", c_int64),
        ("spatial", c_int64),
        ("groups", c_int64),
        ("silu", c_int64),
        ("weight", cf_vector),
        ("bias", cf_vector),
        ("pre_bias", cf_vector),
        ("scale", cf_vector),
        ("scale_stride", c_int64),
        ("shift", cf_vector),
        ("shift_stride", c_int64),
        ("threads", c_int64),
        ("eps", c_double),
    ]


def fields(
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
) -> dict[str, Any]:
    n, c1, *spatial = x.shape
    c2 = 0 if skip is None else skip.shape[1]
    return {
        "y": x if skip is None else like(layout.empty(x, c1 + c2, x.dtype)),
        "dtype": native_library.DTYPE_CODES[x.dtype],
        "channels_last": layout.is_channels_last(x),
        "n": n,
        "c1": c1,
        "c2": c2,
        "spatial": math.prod(spatial),
        "groups": num_groups,
        "silu": activation == "silu",
        "scale_stride": 0 if scale is None else scale.stride(0),
        "shift_stride": 0 if shift is None else shift.stride(0),
    }


BINDING = Binding(
    cf_group_norm_silu_args,
    fields,
    {
        "x": dense,
        "weight": contiguous,
        "bias": contiguous,
        "scale": contiguous_rows,
        "shift": contiguous_rows,
        "skip": dense,
        "pre_bias": contiguous,
    },
)
group_norm_silu = NativeKernel(BINDING, lambda x: native_library.function("cf_cpu_group_norm_silu"))
