"""Networks by torch.compile, as a `per_shape.Prepare`."""

from __future__ import annotations

import types
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .per_shape import Bind, Call, Tensors


def channels_last(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def prepare(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path) -> Bind:
    """torch.compile for the very shapes, the weights frozen and packed; on a GPU max-autotune, with CUDA graphs."""
    import torch._dynamo
    import torch._inductor.config as config

    cuda = args[0].is_cuda
    module = with_code_of_its_own(channels_last(module, dtype))
    function = torch.compile(module, dynamic=False, fullgraph=True, mode="max-autotune" if cuda else None)
    weakref.finalize(function, torch._dynamo.reset_code, module.forward.__code__)

    def bind(rest: Sequence[Tensor]) -> Call:
        def call(x: Tensor) -> Tensors:
            # a copy of one layout: for any other, all would be compiled once more
            results = function(x.clone(memory_format=torch.contiguous_format), *rest)
            # a CUDA graph's outputs are overwritten by its next run
            return tuple(y.clone() for y in results) if cuda else results

        return call

    with config.patch(freezing=True):
        for _ in range(3 if cuda else 1):  # compiles; warms up for the CUDA graph, captures it
            bind(args[1:])(args[0])
    return bind


def with_code_of_its_own(module: nn.Module) -> nn.Module:
    """The module with a copy of its forward's code, where torch keeps what it has compiled: no more than eight times for one code, all of
    whose guards every call then goes through, and until the code is reset."""
    forward = type(module).forward
    module.forward = types.MethodType(types.FunctionType(forward.__code__.replace(), forward.__globals__), module)
    return module
