"""The rule that every op is held to, and inputs that are hard to compute with.

Truth is the op's formula written out in extended precision. An implementation passes if its largest error is at most
twice that of plain torch in the same dtype, and one ulp of the largest intermediate result more, and also below an
absolute cap for the dtype.
"""

from __future__ import annotations

import numpy as np
import torch

from coalescer_fast import ops
from coalescer_fast.ops import cuda_library
from coalescer_fast.ops.dispatch import FLOAT_AT_MOST_32
from coalescer_fast.ops.op import OPS
from coalescer_fast.ops.triton_launch import INTERPRETED

# backends whose tests run on CUDA tensors
ON_GPU = () if INTERPRETED else ("triton", "cuda")
# the CUDA kernels on CPU tensors, where the tests' emulation runs them
EMULATED = ["cuda"] if cuda_library.INTERPRETED else []

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Largest error in ulps, on top of what the sizes below account for: every op rounds a handful of times, by half an ulp
# each. Measured on the tests' inputs: 1.5 ulps of the largest intermediate at most.
CAP_ULPS = 4


def cap(dtype: torch.dtype) -> float:
    """The absolute cap of a dtype, for sizes of 1: 9e-16 in float64, 5e-7 in float32, 0.004 in float16, 0.03 in
    bfloat16."""
    return CAP_ULPS * torch.finfo(dtype).eps


def exact(x: torch.Tensor | None) -> np.ndarray | None:
    """The tensor in extended precision."""
    return None if x is None else x.detach().cpu().double().numpy().astype(np.longdouble)


def error(result: torch.Tensor, truth: np.ndarray) -> float:
    """The largest absolute error; NaN if there is one in the result that the truth has not."""
    return float(np.abs(exact(result) - truth).max(initial=0))


def assert_accurate(
    name: str,
    result: torch.Tensor,
    plain: torch.Tensor,
    truth: np.ndarray,
    dtype: torch.dtype,
    size: float = 1.0,
    condition: float = 0.0,
) -> None:
    """The rule. dtype: of the computation; size: largest intermediate result, at least 1 (a sum rounds by its terms,
    not by itself);
    condition: what one relative rounding of the input in the dtype of the statistics can add to the output."""
    assert tuple(result.shape) == truth.shape, f"{name}: shape {tuple(result.shape)}, expected {truth.shape}"
    assert torch.isfinite(result).all(), f"{name}: not finite"
    eps = torch.finfo(dtype).eps
    largest = max(size, float(np.abs(truth).max(initial=1)))
    is_, plain_ = error(result, truth), error(plain, truth)
    assert is_ <= 2 * plain_ + eps * largest, (
        f"{name}: error {is_:.3g}, plain torch's is {plain_:.3g}, an ulp {eps * largest:.3g}"
    )
    limit = cap(dtype) * max(1.0, size) + CAP_ULPS * condition
    assert is_ <= limit, f"{name}: error {is_:.3g} is above the cap {limit:.3g}"


def statistics_eps(dtype: torch.dtype) -> float:
    """One rounding in the dtype that sums are kept in: float32, or float64 for float64."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def takes(backend: str, *dtypes: torch.dtype) -> bool:
    """Whether the backend runs on all these dtypes here: no native code for float64, no bfloat16 in Triton's
    interpreter."""
    if backend == "reference":
        return True
    allowed = (torch.float32, torch.float16) if backend == "triton" and INTERPRETED else FLOAT_AT_MOST_32
    return all(dtype in allowed for dtype in dtypes)


def able(op: str, *dtypes: torch.dtype) -> list[str]:
    """The backends of ``op`` that run on CPU tensors of all these dtypes here."""
    return [backend for backend in OPS[op].implementations if backend not in ON_GPU and takes(backend, *dtypes)]


def widest(backend: str) -> torch.dtype:
    return torch.float64 if takes(backend, torch.float64) else torch.float32


def call(op: str, backend: str, *args, **kwargs):
    """The op on the backend, on its device, with its inputs checked to be untouched; results on the CPU."""
    if backend in ON_GPU:
        args = tuple(x.cuda() if isinstance(x, torch.Tensor) else x for x in args)
        kwargs = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in tensors]
    result = getattr(ops, op)(*args, **kwargs, backend=backend)
    for x, copy in zip(tensors, before):
        assert torch.equal(x.isnan(), copy.isnan()), "an input was modified"
        assert torch.equal(x.nan_to_num(), copy.nan_to_num()), "an input was modified"
    return tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu()


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


INPUTS = ("centred", "off_centre", "large", "constant", "tiny_variance")


def make(kind: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """An input whose statistics are hard in a certain way."""
    x = randn(*shape, dtype=torch.float64, seed=seed)
    if kind == "off_centre":  # mean 1e3 standard deviations: E[x^2] - E[x]^2 would lose six digits
        x = 1e3 + x
    elif kind == "large":  # |x| > 256, whose square overflows float16
        x = x.sign() * (257 + 100 * x.abs())
    elif kind == "constant":  # no variance at all: eps alone is below the root
        x = torch.full_like(x, 0.7)
    elif kind == "tiny_variance":  # a variance below eps
        x = 1e-4 * x
    return x.to(dtype)


LAYOUTS = ("contiguous", "channels_last", "sliced")


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        wide = torch.full((x.shape[0], x.shape[1] + 2, *x.shape[2:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
        view = wide[:, 1:-1, ..., 1::2]
        view.copy_(x)
        return view
    return x.contiguous()
