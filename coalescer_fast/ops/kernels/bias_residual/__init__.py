"""A convolution's bias and a residual connection in one op."""

from __future__ import annotations

import torch

from ... import checks, layout
from ...dispatch import launchers, register, run, signing


def bias_residual(
    x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None, *, backend: str = "auto"
) -> torch.Tensor:
    r"""``y = x + bias + residual``, bias broadcast over samples and space.

    Args:
        x: (N, C, *spatial), float64, float32, float16 or bfloat16.
        bias: (C,), of any of these dtypes, 0 if None.
        residual: of x's shape and dtype, 0 if None.
        backend: "auto" or a name of `ops.backends`.

    Returns: (N, C, *spatial) of x's dtype, channels innermost in memory if x's are, else contiguous; never x itself.

    Raises: ValueError for other shapes, dtypes or devices, and for a backend that cannot run the call; TypeError for what is no tensor.
    """
    key = None
    if (signature := signing(x)) is not None:
        key = ("bias_residual", backend, signature(x), signature(bias), signature(residual))
        try:
            return launchers[key](x, bias, residual)
        except KeyError:  # the first call of its kind
            pass
        except TypeError:  # no hash, which the checks refuse, or no memory
            key = None
    checks.floating("x", x)
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"x has {len(shape)} dimensions; expected (N, C, *spatial)")
    checks.tensor("bias", bias, (shape[1],), x.device)
    checks.tensor("residual", residual, shape, x.device)
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"residual has dtype {residual.dtype}; expected x's, {x.dtype}")
    return run("bias_residual", backend, x, bias, residual, key=key)


def _fake(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return layout.empty(x, x.shape[1], x.dtype)


register(
    "bias_residual(Tensor x, Tensor? bias=None, Tensor? residual=None, *, str backend='auto') -> Tensor",
    bias_residual,
    _fake,
)
