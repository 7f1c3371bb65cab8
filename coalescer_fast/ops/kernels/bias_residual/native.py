"""bias_residual in C++: see csrc/cpu/residual.h."""

from __future__ import annotations

import math
from ctypes import c_int64, c_void_p
from typing import Any, ClassVar

from torch import Tensor

from ... import layout, native_library
from ...abi import Struct, cf_vector
from ...binding import Binding, NativeKernel, contiguous, dense


class cf_bias_residual_args(Struct):
    _fields_: ClassVar = [
        ("x", c_void_p),
        ("residual", c_void_p),
        ("y", c_void_p),
        ("dtype", c_int64),
        ("channels_last", c_int64),
        ("n", c_int64),
        ("c", c_int64),
        ("spatial", c_int64),
        ("bias", cf_vector),
        ("threads", c_int64),
    ]


def fields(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> dict[str, Any]:
    n, c, *spatial = x.shape
    return {
        "y": x,
        "dtype": native_library.DTYPE_CODES[x.dtype],
        "channels_last": layout.is_channels_last(x),
        "n": n,
        "c": c,
        "spatial": math.prod(spatial),
    }


BINDING = Binding(cf_bias_residual_args, fields, {"x": dense, "bias": contiguous, "residual": dense})
bias_residual = NativeKernel(BINDING, lambda x: native_library.function("cf_cpu_bias_residual"))
