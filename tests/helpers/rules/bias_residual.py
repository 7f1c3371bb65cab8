"""The rule that bias_residual is held to: its formula in extended precision, and what plain torch makes of it."""

from __future__ import annotations

import torch

from ..numerics import assert_accurate, call, exact

OP = "bias_residual"


def check(
    backend: str, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    result = call(OP, backend, x, bias, residual)
    judge(result, x, bias, residual)
    return result


def judge(
    result: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> None:
    """Hold the result to the rule."""
    truth, plain, size = exact(x), x, x.double().abs()
    if bias is not None:
        column = bias.view(-1, *[1] * (x.ndim - 2))
        truth, plain, size = truth + exact(column), plain + column.to(x.dtype), size + column.double().abs()
    if residual is not None:
        truth, plain, size = truth + exact(residual), plain + residual, size + residual.double().abs()
    assert result.dtype == x.dtype
    assert_accurate(OP, result, plain, truth, x.dtype, float(size.max()) if size.numel() else 0.0)
