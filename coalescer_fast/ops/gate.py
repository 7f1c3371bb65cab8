"""A gated activation, as in the feed-forward layers of transformers (GEGLU, arXiv 2002.05202). Not a public op."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton_launch
from .abi import cf_function

FUNCTIONS: dict[cf_function, Callable[[Tensor], Tensor]] = {
    cf_function.CF_IDENTITY: lambda x: x,
    cf_function.CF_SILU: F.silu,
    cf_function.CF_TANH: torch.tanh,
    cf_function.CF_RELU: F.relu,
    cf_function.CF_GELU: F.gelu,
    cf_function.CF_GELU_TANH: partial(F.gelu, approximate="tanh"),
    cf_function.CF_SIGMOID: torch.sigmoid,
}
FUSED = (cf_function.CF_SILU, cf_function.CF_GELU, cf_function.CF_GELU_TANH)


def gated(x: Tensor, value: int, gate: int, channels: int, function: cf_function, backend: str = "auto") -> Tensor:
    """Compute ``x[..., value : value + channels] * f(x[..., gate : gate + channels])``.

    On a CUDA device it is one pass, computed in float32 and rounded once; else two of torch's.

    Args:
        x: rows of vectors (..., C).
        value: first channel of the values.
        gate: first channel of the gates.
        channels: of the result (..., channels).
        function: f.
        backend: see `coalescer_fast.ops`; "auto" and "triton" are the one pass where it can run.
    """
    if (
        backend in ("auto", "triton")
        and function in FUSED
        and (x.is_cuda or (triton_launch.INTERPRETED and backend == "triton"))
        and x.is_contiguous()
        and not triton_launch.unavailable()
        and not triton_launch.refusal(x.new_empty(0))
    ):
        from .kernels.gate import triton

        return triton.gate(x, value, gate, channels, function)
    return x[..., value : value + channels] * FUNCTIONS[function](x[..., gate : gate + channels])
