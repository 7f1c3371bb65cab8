"""A convolution's bias and a residual connection in one op."""

from __future__ import annotations

import torch

from .. import checks
from ..dispatch import implementation, register
from . import reference

register("bias_residual", "reference", reference.bias_residual)


def bias_residual(
    x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None, *, backend: str = "auto"
) -> torch.Tensor:
    r"""``y = x + bias + residual``, bias broadcast over samples and space.

    Args:
        x: (N, C, *spatial), any floating dtype.
        bias: (C,), 0 if None.
        residual: of x's shape and dtype, 0 if None.
        backend: "auto" or a name of `ops.backends`.

    Returns: (N, C, *spatial) of x's dtype; never x itself.

    Raises: ValueError for other shapes, dtypes or devices.
    """
    checks.floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x has {x.ndim} dimensions; expected (N, C, *spatial)")
    checks.shape("bias", bias, (x.shape[1],))
    checks.shape("residual", residual, tuple(x.shape))
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"residual has dtype {residual.dtype}; expected x's, {x.dtype}")
    checks.device(x, bias=bias, residual=residual)
    return implementation("bias_residual", backend)(x, bias, residual)
