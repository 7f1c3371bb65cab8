"""coalesce_step in C++: see csrc/cpu/step.h."""

from __future__ import annotations

import math
from ctypes import c_double, c_int64, c_void_p
from typing import Any, ClassVar

from torch import Tensor

from ... import native_library
from ...abi import Struct, cf_vector
from ...binding import Binding, NativeKernel, contiguous, dense


class cf_coalesce_step_args(Struct):
    _fields_: ClassVar = [
        ("sample", c_void_p),
        ("dtype", c_int64),
        ("direction", c_void_p),
        ("direction_dtype", c_int64),
        ("distance", cf_vector),
        ("y", c_void_p),
        ("n", c_int64),
        ("size", c_int64),
        ("unit", c_int64),
        ("threads", c_int64),
        ("eta", c_double),
        ("eps", c_double),
    ]


def fields(sample: Tensor, direction: Tensor, distance: Tensor, eta: float, mode: str, eps: float) -> dict[str, Any]:
    n, *shape = sample.shape
    return {
        "y": sample,
        "dtype": native_library.DTYPE_CODES[sample.dtype],
        "direction_dtype": native_library.DTYPE_CODES[direction.dtype],
        "n": n,
        "size": math.prod(shape),
        "unit": mode == "unit",
    }


BINDING = Binding(cf_coalesce_step_args, fields, {"sample": dense, "direction": dense, "distance": contiguous})
coalesce_step = NativeKernel(BINDING, lambda sample: native_library.function("cf_cpu_coalesce_step"))
