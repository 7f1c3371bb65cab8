"""dual_head in Triton: an implicit GEMM that also pools, then one program a sample for the distance and the way to the
anchor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import layout
from ...triton_launch import MOST_POSITIONS, cdiv, configuration, launch
from . import direction_dtype


@triton.jit(do_not_specialize=["channel_tiles", "tiles"])
def heads_kernel(
    h,
    direction_weight,
    direction_bias,
    distance_weight,
    direction,
    partials,
    height,
    width,
    channels,
    latent,
    channel_stride,
    position_stride,
    channel_tiles,
    tiles,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """direction = conv3x3(h) and, of every tile of positions, sum(h * distance_weight); h (N, H, W, C),
    direction_weight (Cz, 3, 3, C)."""
    program = tl.program_id(0)
    channel_tile = program % channel_tiles
    tile = program // channel_tiles % tiles
    n = (program // channel_tiles // tiles).to(tl.int64)
    positions = height * width
    first = tile * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    o = channel_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    h += (n * positions + first) * channels

    # a tap outside the image is 0: the mask of each position's nine neighbours
    row, column = (first + p) // width, (first + p) % width
    chunks = tl.cdiv(channels, BLOCK_K)
    total = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    for i in range(9 * chunks):
        tap = i // chunks
        start = i % chunks * BLOCK_K
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        known = start + k < channels
        neighbour = (p + (down * width + right)) * channels
        a = tl.load(h + neighbour[:, None] + (start + k)[None, :], mask=inside[:, None] & known[None, :], other=0)
        filter = (o * 9 + tap) * channels
        b = tl.load(
            direction_weight + filter[None, :] + (start + k)[:, None],
            mask=known[:, None] & (o < latent)[None, :],
            other=0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    total += tl.load(direction_bias + o, mask=o < latent, other=0).to(tl.float32)[None, :]
    exists = first + p < positions
    out = o.to(tl.int64)[None, :] * channel_stride + ((first + p).to(tl.int64) * position_stride)[:, None]
    direction += n * latent * positions
    tl.store(direction + out, total.to(direction.dtype.element_ty), mask=exists[:, None] & (o < latent)[None, :])

    if channel_tile == 0:
        pooled = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
        for start in range(0, channels, BLOCK_K):
            known = start + k < channels
            a = tl.load(
                h + (p * channels)[:, None] + (start + k)[None, :], mask=exists[:, None] & known[None, :], other=0
            )
            b = tl.load(distance_weight + start + k, mask=known, other=0)
            pooled += a.to(tl.float32) * b.to(tl.float32)[None, :]
        tl.store(partials + n * tiles + tile, tl.sum(pooled))


@triton.jit
def softplus(z):
    """log(1 + exp(z)) = max(z, 0) + log1p(t), t = exp(-|z|), with log1p(t) = 2 atanh(s), s = t / (2 + t) <= 1/3; z in
    float64."""
    t = tl.exp(-tl.abs(z))
    s = t / (2 + t)
    q = s * s
    series = 1 / 17.0
    for odd in tl.static_range(15, 0, -2):
        series = series * q + 1.0 / odd
    return tl.where(z > 0, z, 0.0) + 2 * s * series


@triton.jit(do_not_specialize=["tiles", "sample_row", "anchor_row"])
def finish_kernel(
    partials,
    distance_bias,
    distance,
    unanchored,
    sample,
    anchor,
    direction,
    tiles,
    positions,
    latent,
    channel_stride,
    position_stride,
    sample_row,
    sample_channel,
    sample_position,
    anchor_row,
    anchor_channel,
    anchor_position,
    BLOCK: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """distance = softplus(sum(partials) / HW + b), of one sample.

    With an anchor, direction = unanchored + (p - R) / max(|p - R|, 1e-6) and distance *= |p - R|.
    """
    BLOCK_P: tl.constexpr = BLOCK // BLOCK_O
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    terms = tl.zeros([BLOCK], tl.float64)  # of one number a sample, float64 costs nothing
    for start in range(0, tiles, BLOCK):
        terms += tl.load(partials + n * tiles + start + i, mask=start + i < tiles, other=0).to(tl.float64)
    result = softplus(tl.sum(terms) / positions + tl.load(distance_bias).to(tl.float64))
    if sample is not None:
        o = tl.arange(0, BLOCK_O).to(tl.int64)[None, :]
        p = tl.arange(0, BLOCK_P).to(tl.int64)[:, None]
        sample += n * sample_row
        anchor += n * anchor_row
        squares = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
        for c in range(0, latent, BLOCK_O):
            for start in range(0, positions, BLOCK_P):
                inside = (start + p < positions) & (c + o < latent)
                to = tl.load(
                    anchor + (c + o) * anchor_channel + (start + p) * anchor_position, mask=inside, other=0
                ).to(tl.float32)
                at = tl.load(
                    sample + (c + o) * sample_channel + (start + p) * sample_position, mask=inside, other=0
                ).to(tl.float32)
                squares += (to - at) * (to - at)
        # Triton takes a size of 1 for a constant, which has no .to; the product may have more than 32 bits
        length = tl.sqrt_rn(tl.div_rn(tl.sum(squares), positions * 1.0 * latent))
        result *= length
        divisor = tl.where(length < 1e-6, 1e-6, length)  # NaN is kept
        for c in range(0, latent, BLOCK_O):
            for start in range(0, positions, BLOCK_P):
                inside = (start + p < positions) & (c + o < latent)
                to = tl.load(
                    anchor + (c + o) * anchor_channel + (start + p) * anchor_position, mask=inside, other=0
                ).to(tl.float32)
                at = tl.load(
                    sample + (c + o) * sample_channel + (start + p) * sample_position, mask=inside, other=0
                ).to(tl.float32)
                place = n * latent * positions + (c + o) * channel_stride + (start + p) * position_stride
                way = tl.load(unanchored + place, mask=inside, other=0) + (to - at) / divisor
                tl.store(direction + place, way.to(direction.dtype.element_ty), mask=inside)
    tl.store(distance + n, result.to(tl.float32))


def strides(point: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """point (N, C, H, W), or a copy if its positions are not evenly spaced, and the strides of its rows, channels and
    positions."""
    row, channel, down, right = point.stride()
    height, width = point.shape[2:]
    if height == 1:
        return point, row, channel, right
    if width > 1 and down != width * right:
        return strides(point.contiguous())
    return point, row, channel, right if width > 1 else down


def dual_head(
    h: torch.Tensor,
    direction_weight: torch.Tensor,
    direction_bias: torch.Tensor,
    distance_weight: torch.Tensor,
    distance_bias: torch.Tensor,
    sample: torch.Tensor | None,
    anchor: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    n, channels, height, width = h.shape
    latent = direction_weight.shape[0]
    positions = height * width
    if direction_weight.numel() > MOST_POSITIONS:
        raise ValueError(
            f"direction_weight has {direction_weight.numel()} elements; expected {MOST_POSITIONS} at most on triton, "
            "whose indices of it have 32 bits"
        )
    channels_last = layout.is_channels_last(h)
    direction = layout.empty(h, latent, direction_dtype(h, sample))
    distance = torch.empty(n, dtype=torch.float32, device=h.device)
    if not n:
        return direction, distance
    channel_stride, position_stride = (1, latent) if channels_last else (positions, 1)
    unanchored = direction if sample is None else torch.empty(direction.numel(), dtype=torch.float32, device=h.device)
    h = layout.arrange(h, True)
    direction_weight = direction_weight.to(h.dtype).contiguous(memory_format=torch.channels_last)
    padded = 1 << (latent - 1).bit_length()
    block_o = min(64, max(16, padded))  # 16 is the narrowest product

    size = "small" if positions <= 256 else "large"
    options = configuration("dual_head.heads", "float32" if h.dtype == torch.float32 else "half", size)
    channel_tiles, tiles = cdiv(latent, block_o), cdiv(positions, options["BLOCK_P"])
    partials = torch.empty(n * tiles, dtype=torch.float32, device=h.device)
    launch(
        heads_kernel,
        n * tiles * channel_tiles,
        h.device,
        h,
        direction_weight,
        direction_bias.contiguous(),
        distance_weight.contiguous(),
        unanchored,
        partials,
        height,
        width,
        channels,
        latent,
        channel_stride,
        position_stride,
        channel_tiles,
        tiles,
        BLOCK_O=block_o,
        **options,
    )

    sample, *sample_strides = (None, 0, 0, 0) if sample is None else strides(sample)
    anchor, *anchor_strides = (None, 0, 0, 0) if anchor is None else strides(anchor)
    launch(
        finish_kernel,
        n,
        h.device,
        partials,
        distance_bias,
        distance,
        unanchored,
        sample,
        anchor,
        direction,
        tiles,
        positions,
        latent,
        channel_stride,
        position_stride,
        *sample_strides,
        *anchor_strides,
        BLOCK_O=min(64, padded),
        **configuration("dual_head.finish", "any", "any"),
    )
    return direction, distance
