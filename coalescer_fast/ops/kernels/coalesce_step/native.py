"""coalesce_step in C++: see csrc/cpu/step.h."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ... import native_library
from ...abi import cf_coalesce_step_args
from ...binding import Binding, NativeKernel, contiguous, dense


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
