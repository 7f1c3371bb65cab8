"""Calls of every op that is declared, from its declaration."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from coalescer_fast import ops
from coalescer_fast.ops.op import OPS

NAMES = sorted(OPS)


def example(
    op: str, memory_format: torch.memory_format = torch.contiguous_format, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The declaration's call: random tensors, the same each time, for all arguments but the backend."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=generator).to(dtype)
        return x.contiguous(memory_format=memory_format) if x.ndim == 4 else x

    return OPS[op].example(tensor)


def shortest(op: str, **options: Any) -> dict[str, Any]:
    """The same without the arguments that have defaults."""
    parameters = inspect.signature(getattr(ops, op)).parameters
    given = example(op, **options)
    return {name: a for name, a in given.items() if parameters[name].default is inspect.Parameter.empty}


def several(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The results of an op, of those with one as well."""
    return result if isinstance(result, tuple) else (result,)
