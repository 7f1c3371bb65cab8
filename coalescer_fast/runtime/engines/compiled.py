"""Networks by torch.compile."""

from __future__ import annotations

import types
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .per_shape import Bind, Call, Tensors


def channels_last(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module itself in ``dtype`` and channels_last."""
    return module.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return,unused-ignore]


def prepare(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path, mode: str = "max-autotune") -> Bind:
    """A `per_shape.Prepare`: static shapes, frozen and packed weights; on a GPU in this mode, with CUDA graphs."""
    import torch._inductor.config as config
    from torch._dynamo import reset_code  # type: ignore[attr-defined,unused-ignore]

    cuda = args[0].is_cuda
    module = with_own_code(channels_last(module, dtype))
    function = torch.compile(module, dynamic=False, fullgraph=True, mode=mode if cuda else None)
    weakref.finalize(function, reset_code, module.forward.__code__)

    def bind(rest: Sequence[Tensor]) -> Call:
        def call(x: Tensor) -> Tensors:
            # contiguous, because another layout would be compiled again
            results = function(x.clone(memory_format=torch.contiguous_format), *rest)
            # the next run of a CUDA graph overwrites its outputs
            return tuple(y.clone() for y in results) if cuda else results

        return call

    with config.patch(freezing=True):
        for _ in range(3 if cuda else 1):  # compile, warm up, capture the CUDA graph
            bind(args[1:])(args[0])
    return bind


def with_own_code(module: nn.Module) -> nn.Module:
    """The module with a copy of its forward's code object.

    torch keeps what it has compiled with the code object: at most eight versions, whose guards are all checked in every
    call, until the code is reset.
    """
    forward = type(module).forward
    module.forward = types.MethodType(types.FunctionType(forward.__code__.replace(), forward.__globals__), module)
    return module
