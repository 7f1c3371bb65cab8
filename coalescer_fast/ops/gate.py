"""A gated activation, as in the feed-forward layers of transformers (GEGLU, arXiv 2002.05202). Not a public op."""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton_launch
from .abi import cf_function
from .kernels.gate import reference
from .op import differentiated, plain

FUSED = (cf_function.CF_SILU, cf_function.CF_GELU, cf_function.CF_GELU_TANH)


def gated(x: Tensor, value: int, gate: int, channels: int, function: cf_function, backend: str = "auto") -> Tensor:
    """Compute ``x[..., value : value + channels] * f(x[..., gate : gate + channels])``.

    On a CUDA device it is one pass, computed in float32 and rounded once; else two of torch's, also where a gradient, a
    transform or a compiler has to see them.

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
        and plain(x)
        and not differentiated(("x",), (x,))
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and x.is_contiguous()
        and not x.is_neg()
        and 0 <= min(value, gate) <= max(value, gate) <= x.shape[-1] - channels
        and not triton_launch.unavailable()
        and not triton_launch.refusal(x.new_empty(0))
    ):
        from .kernels.gate import triton

        return triton.gate(x, value, gate, channels, function)
    return reference.gate(x, value, gate, channels, function)
