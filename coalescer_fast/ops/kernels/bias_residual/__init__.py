"""A convolution's bias and a residual connection in one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import checks, layout, op
from ...dispatch import run


def _fake(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return layout.empty(x, x.shape[1], x.dtype)


def _example(tensor: Callable[..., Tensor]) -> dict[str, Any]:
    return {"x": tensor(2, 6, 4, 5), "bias": tensor(6), "residual": tensor(2, 6, 4, 5)}


@op.declare(fake=_fake, example=_example, reference=".reference", cpu=".native", triton=".triton", cuda=".cuda")
def bias_residual(
    x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None, *, backend: str = "auto"
) -> torch.Tensor:
    r"""``y = x + bias + residual``, bias broadcast over samples and space.

    Args:
        x: (N, C, *spatial), float64, float32, float16 or bfloat16.
        bias: (C,), of any of these dtypes, 0 if None.
        residual: of x's shape and dtype, 0 if None.
        backend: "auto" or a name of `ops.backends`.

    Returns:
        (N, C, *spatial) of x's dtype, channels innermost in memory if x's are, else contiguous; never x itself.

    Raises:
        ValueError: other shapes, dtypes or devices than these, or a backend that cannot run the call.
        TypeError: an argument is no tensor.
    """
    checks.floating("x", x)
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"x has {len(shape)} dimensions; expected (N, C, *spatial)")
    checks.tensor("bias", bias, (shape[1],), x.device)
    checks.tensor("residual", residual, shape, x.device)
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"residual has dtype {residual.dtype}; expected x's, {x.dtype}")
    y: Tensor = run("bias_residual", backend, x, bias, residual)
    return y
