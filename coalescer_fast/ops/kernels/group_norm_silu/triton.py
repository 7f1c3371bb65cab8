"""group_norm_silu in Triton: statistics of every channel, then the normalisation, both in tiles [BLOCK_R positions,
BLOCK_C channels].

The statistics of one sample are split over its positions, so that a batch of one fills the device. Each program leaves
for its part and each of its channels the mean and the sum of squared deviations M2 in a slot of its own (no atomics:
bit-identical on repeat); the second kernel merges them by

    mean = sum_i n_i mean_i / n,  M2 = sum_i M2_i + n_i (mean_i - mean)^2                         (Chan, Golub and
    LeVeque 1983)

first over the splits, then over the channels of a group. Everything is relative to K_c, the mean of the channel's first
eight elements, so that nothing is lost where the mean is large against the standard deviation.

The workspace is (N, 2 splits + 1, C) in float32: the means of x - K_c, the M2, and K_c.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import layout
from ...triton_launch import cdiv, configuration, launch, multiprocessors

# more would make the second kernel's merge as long as its work
MOST_SPLITS = 64
# channels that are merged at a time
BLOCK_W = 64


@triton.jit
def load_tile(
    x, skip, n, row, r, c, spatial, channels1, channels2, CHANNELS_LAST: tl.constexpr, HAS_SKIP: tl.constexpr
):
    """cat([x, skip], 1)[n, c, row + r] in float32, 0 outside; r is (R, 1) and c (1, C)."""
    inside = (row + r < spatial) & (c < channels1)
    if CHANNELS_LAST:
        z = tl.load(x + (n * spatial + row) * channels1 + (r * channels1 + c), mask=inside, other=0)
    else:
        z = tl.load(x + (n * channels1 * spatial + row) + (c.to(tl.int64) * spatial + r), mask=inside, other=0)
    if HAS_SKIP:
        d = c - channels1
        behind = (row + r < spatial) & (d >= 0) & (d < channels2)
        if CHANNELS_LAST:
            s = tl.load(skip + (n * spatial + row) * channels2 + (r * channels2 + d), mask=behind, other=0)
        else:
            s = tl.load(skip + (n * channels2 * spatial + row) + (d.to(tl.int64) * spatial + r), mask=behind, other=0)
        z = tl.where(c < channels1, z, s)
    return z.to(tl.float32)


@triton.jit(do_not_specialize=["splits", "blocks_per_split", "channel_tiles"])
def statistics_kernel(
    x,
    skip,
    workspace,
    spatial,
    channels1,
    channels2,
    splits,
    blocks_per_split,
    channel_tiles,
    CHANNELS_LAST: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and M2 of x - K_c over one split of one sample; every element of the tile is first a running mean of its own
    (Welford)."""
    program = tl.program_id(0)
    split = program // channel_tiles % splits
    n = (program // channel_tiles // splits).to(tl.int64)
    c = program % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    first = split * blocks_per_split
    blocks = tl.minimum(blocks_per_split, tl.cdiv(spatial, BLOCK_R) - first)

    few = load_tile(
        x, skip, n, 0, tl.arange(0, 8)[:, None], c[None, :], spatial, channels1, channels2, CHANNELS_LAST, HAS_SKIP
    )
    k = (tl.sum(few, 0) / tl.minimum(spatial, 8))[None, :]
    mean = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i in range(blocks):
        row = (first + i) * BLOCK_R
        z = load_tile(x, skip, n, row, r[:, None], c[None, :], spatial, channels1, channels2, CHANNELS_LAST, HAS_SKIP)
        difference = tl.where((row + r < spatial)[:, None], z - k - mean, 0.0)
        step = difference * (1.0 / (i + 1))
        mean += step
        m2 += difference * (difference - step)

    # all rows of the tile have seen `blocks` elements, but for those that the last block lacks
    count = tl.where((first + blocks - 1) * BLOCK_R + r < spatial, blocks, blocks - 1).to(tl.float32)[:, None]
    total = tl.minimum(blocks * BLOCK_R, spatial - first * BLOCK_R).to(tl.float32)
    channel_mean = tl.sum(mean * count, 0) / total
    deviation = mean - channel_mean[None, :]
    channel_m2 = tl.sum(m2 + count * deviation * deviation, 0)

    channels = channels1 + channels2
    workspace += n * (2 * splits + 1) * channels
    tl.store(workspace + split * channels + c, channel_mean, mask=c < channels)
    tl.store(workspace + (splits + split) * channels + c, channel_m2, mask=c < channels)
    if split == 0:
        tl.store(workspace + 2 * splits * channels + c, tl.sum(k, 0), mask=c < channels)


@triton.jit
def group_statistics(
    workspace,
    pre_bias,
    groups,
    begin,
    end,
    spatial,
    channels,
    channels_per_group,
    splits,
    rows_per_split,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Mean, less K and pre_bias of the group's first channel, and variance of each of ``groups`` (G,): their channels
    are begin to end."""
    s = tl.arange(0, BLOCK_S)[:, None]
    count = tl.maximum(tl.minimum(spatial - s * rows_per_split, rows_per_split), 0).to(tl.float32)
    positions = spatial * 1.0  # Triton takes a size of 1 for a constant, which has no .to
    merged = tl.zeros([BLOCK_G], tl.float32)  # channels so far
    mean = tl.zeros([BLOCK_G], tl.float32)
    m2 = tl.zeros([BLOCK_G], tl.float32)
    for start in range(begin, end, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        inside = (s < splits) & (w < end)[None, :]
        means = tl.load(workspace + s * channels + w[None, :], mask=inside, other=0)
        m2s = tl.load(workspace + (splits + s) * channels + w[None, :], mask=inside, other=0)
        channel_mean = tl.sum(means * count, 0) / positions
        deviation = means - channel_mean[None, :]
        channel_m2 = tl.sum(m2s + count * deviation * deviation, 0)

        group = w // channels_per_group
        leader = group * channels_per_group
        k = workspace + 2 * splits * channels
        channel_mean += tl.load(k + w, mask=w < end, other=0) - tl.load(k + leader, mask=w < end, other=0)
        if pre_bias is not None:
            own = tl.load(pre_bias + w, mask=w < end, other=0).to(tl.float32)
            channel_mean += own - tl.load(pre_bias + leader, mask=w < end, other=0).to(tl.float32)

        belongs = (groups[:, None] == group[None, :]) & (w < end)[None, :]
        more = tl.sum(belongs.to(tl.float32), 1)
        mean_more = tl.sum(tl.where(belongs, channel_mean[None, :], 0.0), 1) / tl.maximum(more, 1.0)
        deviation = channel_mean[None, :] - mean_more[:, None]
        m2_more = tl.sum(tl.where(belongs, channel_m2[None, :] + positions * deviation * deviation, 0.0), 1)
        total = tl.maximum(merged + more, 1.0)
        difference = mean_more - mean
        m2 += m2_more + difference * difference * (positions * merged * more / total)
        mean += difference * (more / total)
        merged += more
    return mean, m2 / (channels_per_group * positions)


@triton.jit(
    do_not_specialize=["channels_per_group", "splits", "rows_per_split", "chunks", "blocks_per_chunk", "channel_tiles"]
)
def apply_kernel(
    x,
    skip,
    y,
    workspace,
    weight,
    bias,
    scale,
    shift,
    pre_bias,
    scale_stride,
    shift_stride,
    eps,
    spatial,
    channels1,
    channels2,
    channels_per_group,
    splits,
    rows_per_split,
    chunks,
    blocks_per_chunk,
    channel_tiles,
    CHANNELS_LAST: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = act((x - high) * a + (b - low * a)) with the group's mean = high + low, high being its nearest float32.

    a = rstd * weight * (1 + scale), b = bias * (1 + scale) + shift.
    """
    # backwards: what the statistics read last is still in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = program // channel_tiles % chunks
    n = (program // channel_tiles // chunks).to(tl.int64)
    channels = channels1 + channels2
    first_channel = program % channel_tiles * BLOCK_C
    c = first_channel + tl.arange(0, BLOCK_C)
    known = c < channels
    workspace += n * (2 * splits + 1) * channels

    first_group = first_channel // channels_per_group
    last_group = (tl.minimum(first_channel + BLOCK_C, channels) - 1) // channels_per_group
    groups = first_group + tl.arange(0, BLOCK_G)
    begin, end = first_group * channels_per_group, (last_group + 1) * channels_per_group
    group_mean, variance = group_statistics(
        workspace,
        pre_bias,
        groups,
        begin,
        end,
        spatial,
        channels,
        channels_per_group,
        splits,
        rows_per_split,
        BLOCK_G,
        BLOCK_S,
        BLOCK_W,
    )
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))  # rsqrt is off by two ulps on a GPU

    group = c // channels_per_group
    belongs = groups[:, None] == group[None, :]
    low = tl.sum(tl.where(belongs, group_mean[:, None], 0.0), 0)
    a = tl.sum(tl.where(belongs, rstd[:, None], 0.0), 0)
    leader = group * channels_per_group
    high = tl.load(workspace + 2 * splits * channels + leader, mask=known, other=0)
    if pre_bias is not None:
        low += tl.load(pre_bias + leader, mask=known, other=0).to(tl.float32) - tl.load(
            pre_bias + c, mask=known, other=0
        ).to(tl.float32)
    # the same sum, high rounded and low what is lost by that (Knuth): relative to K of the group's first channel, low
    # could be large
    rounded = high + low
    part = rounded - high
    low = (high - (rounded - part)) + (low - part)
    high = rounded
    b = tl.zeros([BLOCK_C], tl.float32)
    if weight is not None:
        a *= tl.load(weight + c, mask=known, other=0).to(tl.float32)
    if bias is not None:
        b += tl.load(bias + c, mask=known, other=0).to(tl.float32)
    if scale is not None:
        factor = 1 + tl.load(scale + n * scale_stride + c, mask=known, other=0).to(tl.float32)
        a *= factor
        b *= factor
    if shift is not None:
        b += tl.load(shift + n * shift_stride + c, mask=known, other=0).to(tl.float32)
    b -= low * a

    r = tl.arange(0, BLOCK_R)[:, None]
    c = c[None, :]
    first = chunk * blocks_per_chunk
    for i in range(tl.minimum(blocks_per_chunk, tl.cdiv(spatial, BLOCK_R) - first)):
        row = (first + i) * BLOCK_R
        z = load_tile(x, skip, n, row, r, c, spatial, channels1, channels2, CHANNELS_LAST, HAS_SKIP)
        v = (z - high[None, :]) * a[None, :] + b[None, :]
        if SILU:
            v = v / (1 + tl.exp(-v))
        if CHANNELS_LAST:
            out = y + (n * spatial + row) * channels + (r * channels + c)
        else:
            out = y + (n * channels * spatial + row) + (c.to(tl.int64) * spatial + r)
        tl.store(out, v.to(y.dtype.element_ty), mask=(row + r < spatial) & (c < channels))


def parts(blocks: int, wanted: int) -> tuple[int, int]:
    """Cut ``blocks`` into at most ``wanted`` parts, none of them empty: how many, and how many blocks each but the last
    has."""
    each = cdiv(blocks, max(1, min(blocks, wanted)))
    return cdiv(blocks, each), each


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    skip: torch.Tensor | None,
    pre_bias: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    channels_last = layout.is_channels_last(x)
    x = layout.arrange(x, channels_last)
    skip = None if skip is None else layout.arrange(skip, channels_last)
    n, channels1 = x.shape[:2]
    channels2 = 0 if skip is None else skip.shape[1]
    channels = channels1 + channels2
    y = layout.empty(x, channels, x.dtype)
    if not y.numel():
        return y
    spatial = y.numel() // (n * channels)
    channels_per_group = channels // num_groups
    weight, bias, pre_bias, scale, shift = (
        None if v is None else v if v.stride(-1) == 1 else v.contiguous()
        for v in (weight, bias, pre_bias, scale, shift)
    )
    kind = ("channels_last" if channels_last else "contiguous", "small" if spatial <= 256 else "large")
    fill = 2 * multiprocessors(x.device)

    options = configuration("group_norm_silu.statistics", *kind)
    channel_tiles = cdiv(channels, options["BLOCK_C"])
    splits, blocks = parts(cdiv(spatial, options["BLOCK_R"]), min(MOST_SPLITS, cdiv(fill, n * channel_tiles)))
    rows_per_split = blocks * options["BLOCK_R"]
    workspace = torch.empty(n * (2 * splits + 1) * channels, dtype=torch.float32, device=x.device)
    launch(
        statistics_kernel,
        n * splits * channel_tiles,
        x.device,
        x,
        skip,
        workspace,
        spatial,
        channels1,
        channels2,
        splits,
        blocks,
        channel_tiles,
        channels_last,
        skip is not None,
        **options,
    )

    options = configuration("group_norm_silu.apply", *kind)
    block_c = options["BLOCK_C"]
    channel_tiles = cdiv(channels, block_c)
    chunks, blocks = parts(cdiv(spatial, options["BLOCK_R"]), cdiv(fill, n * channel_tiles))
    # few values, for each is a compilation: of the groups that a tile touches, and of the splits
    block_g = 16 if (block_c - 2) // channels_per_group + 2 <= 16 else block_c
    block_s = 1 if splits == 1 else 8 if splits <= 8 else MOST_SPLITS
    launch(
        apply_kernel,
        n * chunks * channel_tiles,
        x.device,
        x,
        skip,
        y,
        workspace,
        weight,
        bias,
        scale,
        shift,
        pre_bias,
        0 if scale is None else scale.stride(0),
        0 if shift is None else shift.stride(0),
        float(eps),
        spatial,
        channels1,
        channels2,
        channels_per_group,
        splits,
        rows_per_split,
        chunks,
        blocks,
        channel_tiles,
        channels_last,
        skip is not None,
        activation == "silu",
        block_g,
        block_s,
        BLOCK_W,
        **options,
    )
    return y
