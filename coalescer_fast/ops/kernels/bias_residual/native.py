"""bias_residual in C++: see csrc/cpu/residual.h."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ... import layout, native_library
from ...abi import cf_bias_residual_args
from ...binding import Binding, NativeKernel, contiguous, dense


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
