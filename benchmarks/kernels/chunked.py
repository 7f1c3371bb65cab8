"""GroupNorm and SiLU by two Triton kernels over chunks of each group, as SGLang does for diffusion models: a rival.

The scheme, written anew: contiguous images, where a group of a sample is one span of memory. The first kernel leaves
the sums of x and x^2 of each chunk of a group; the second adds a group's up and normalises one chunk. What our op adds
to that (bias, concatenation, scale and shift) is done as users of such a kernel would: by torch before it, and by
folding weight, bias, scale and shift into one factor and one offset for each channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import peers

BLOCK = 2048  # elements that a program holds at a time
CHUNK = 4 * BLOCK  # elements of a chunk, at least
MOST_CHUNKS = 256  # of a group, which the second kernel adds up


@triton.jit
def sums_kernel(x, sums, size, chunk, chunks, BLOCK: tl.constexpr):
    """Sums of x and x^2 of one chunk; sums is (N G, chunks, 2)."""
    program = tl.program_id(0)
    group = (program // chunks).to(tl.int64)
    begin = program % chunks * chunk
    end = tl.minimum(begin + chunk, size)
    total = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z = tl.load(x + group * size + i, mask=i < end, other=0).to(tl.float32)
        total += z
        squares += z * z
    tl.store(sums + program * 2, tl.sum(total, 0))
    tl.store(sums + program * 2 + 1, tl.sum(squares, 0))


@triton.jit
def normalise_kernel(
    x,
    y,
    sums,
    factor,
    offset,
    factor_stride,
    eps,
    size,
    spatial,
    channels,
    groups,
    chunk,
    chunks,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """y = act((x - mean) * rstd * factor + offset) of one chunk; factor and offset are (N or 1, C) in float32."""
    program = tl.program_id(0)
    group = (program // chunks).to(tl.int64)
    n = group // groups
    first_channel = group % groups * (channels // groups)
    k = tl.arange(0, BLOCK_CHUNKS)
    mean = tl.sum(tl.load(sums + (group * chunks + k) * 2, mask=k < chunks, other=0), 0) / size
    square = tl.sum(tl.load(sums + (group * chunks + k) * 2 + 1, mask=k < chunks, other=0), 0) / size
    rstd = 1 / tl.sqrt(tl.maximum(square - mean * mean, 0.0) + eps)
    begin = program % chunks * chunk
    end = tl.minimum(begin + chunk, size)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < end
        channel = n * factor_stride + first_channel + i // spatial
        a = tl.load(factor + channel, mask=inside, other=0)
        b = tl.load(offset + channel, mask=inside, other=0)
        v = (tl.load(x + group * size + i, mask=inside, other=0).to(tl.float32) - mean) * (rstd * a) + b
        if SILU:
            v = v / (1 + tl.exp(-v))
        tl.store(y + group * size + i, v.to(y.dtype.element_ty), mask=inside)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    pre_bias: Tensor | None = None,
) -> Tensor:
    """The arguments of the op, its images contiguous."""
    z = peers.joined(x, skip, pre_bias)
    n, channels = z.shape[:2]
    spatial = z[0, 0].numel()
    size = channels // num_groups * spatial
    factor, offset = weight.float()[None], bias.float()[None]
    if scale is not None and shift is not None:
        factor = factor * (1 + scale.float())
        offset = torch.addcmul(shift.float(), offset, 1 + scale.float())
    chunk = max(CHUNK, triton.cdiv(triton.cdiv(size, MOST_CHUNKS), BLOCK) * BLOCK)
    chunks = triton.cdiv(size, chunk)
    sums = torch.empty(n * num_groups * chunks * 2, dtype=torch.float32, device=z.device)
    y = torch.empty_like(z)
    grid = (n * num_groups * chunks,)
    sums_kernel[grid](z, sums, size, chunk, chunks, BLOCK, num_warps=8)
    normalise_kernel[grid](
        z,
        y,
        sums,
        factor.contiguous(),
        offset.contiguous(),
        channels if len(factor) > 1 else 0,
        eps,
        size,
        spatial,
        channels,
        num_groups,
        chunk,
        chunks,
        activation == "silu",
        BLOCK,
        triton.next_power_of_2(chunks),
        num_warps=8,
    )
    return y
