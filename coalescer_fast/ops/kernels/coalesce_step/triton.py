"""coalesce_step in Triton: one program a sample, and one pass over it where it fits the program's registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import layout
from ...triton_launch import configuration, launch


@triton.jit
def coalesce_step_kernel(
    sample, direction, distance, moved, distance_stride, size, eta, eps, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """moved = R + eta * distance * direction (/ max(|direction|, eps) if UNIT), of one sample of ``size`` elements."""
    n = tl.program_id(0).to(tl.int64)
    sample += n * size
    direction += n * size
    moved += n * size
    offset = tl.arange(0, BLOCK)
    v = tl.load(direction + offset, mask=offset < size, other=0).to(tl.float32)
    r = tl.load(sample + offset, mask=offset < size, other=0).to(tl.float32)
    length = eta * tl.load(distance + n * distance_stride).to(tl.float32)
    if UNIT:
        squares = v * v
        for start in range(BLOCK, size, BLOCK):
            w = tl.load(direction + start + offset, mask=start + offset < size, other=0).to(tl.float32)
            squares += w * w
        rms = tl.sqrt(tl.sum(squares) / size)
        length /= tl.where(rms < eps, eps, rms)  # NaN is kept
    tl.store(moved + offset, (r + length * v).to(moved.dtype.element_ty), mask=offset < size)
    for start in range(BLOCK, size, BLOCK):
        inside = start + offset < size
        v = tl.load(direction + start + offset, mask=inside).to(tl.float32)
        r = tl.load(sample + start + offset, mask=inside).to(tl.float32)
        tl.store(moved + start + offset, (r + length * v).to(moved.dtype.element_ty), mask=inside)


def coalesce_step(
    sample: torch.Tensor, direction: torch.Tensor, distance: torch.Tensor, eta: float, mode: str, eps: float
) -> torch.Tensor:
    channels_last = layout.is_channels_last(sample)
    sample, direction = layout.arrange(sample, channels_last), layout.arrange(direction, channels_last)
    moved = layout.empty(sample, sample.shape[1], sample.dtype)
    if not moved.numel():
        return moved
    n = sample.shape[0]
    size = sample.numel() // n
    options = configuration("coalesce_step", "any", "small" if size <= 1024 else "medium" if size <= 4096 else "large")
    launch(
        coalesce_step_kernel,
        n,
        sample.device,
        sample,
        direction,
        distance,
        moved,
        distance.stride(0),
        size,
        float(eta),
        float(eps),
        mode == "unit",
        **options,
    )
    return moved
