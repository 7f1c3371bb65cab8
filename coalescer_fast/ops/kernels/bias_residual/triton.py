"""bias_residual in Triton: one pass over a matrix whose rows are contiguous."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import layout
from ...triton_launch import cdiv, configuration, launch


@triton.jit(do_not_specialize=["rows", "channels", "column_tiles"])
def bias_residual_kernel(
    x,
    bias,
    residual,
    y,
    rows,
    columns,
    channels,
    column_tiles,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = x + bias + residual on (rows, columns): (n, position) and channels if CHANNELS_LAST, else (n, channel) and
    positions."""
    program = tl.program_id(0)
    row = (program // column_tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = program % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    offset = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    z = tl.load(x + offset, mask=inside).to(tl.float32)
    if residual is not None:
        r = tl.load(residual + offset, mask=inside).to(tl.float32)
    if bias is not None:
        if CHANNELS_LAST:
            z += tl.load(bias + column, mask=column < columns).to(tl.float32)[None, :]
        else:
            z += tl.load(bias + row % channels).to(tl.float32)[:, None]
    if residual is not None:
        z += r
    tl.store(y + offset, z.to(y.dtype.element_ty), mask=inside)


def bias_residual(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    channels_last = layout.is_channels_last(x)
    x = layout.arrange(x, channels_last)
    residual = None if residual is None else layout.arrange(residual, channels_last)
    y = layout.empty(x, x.shape[1], x.dtype)
    if not x.numel():
        return y
    n, channels = x.shape[:2]
    positions = x.numel() // (n * channels)
    # a single position is both layouts at once, and the longer row serves better
    channels_last |= positions == 1
    rows, columns = (n * positions, channels) if channels_last else (n * channels, positions)
    options = configuration("bias_residual", "channels_last" if channels_last else "contiguous", "any")
    column_tiles = cdiv(columns, options["BLOCK_C"])
    programs = cdiv(rows, options["BLOCK_R"]) * column_tiles
    bias = None if bias is None else bias.contiguous()
    launch(
        bias_residual_kernel,
        programs,
        x.device,
        x,
        bias,
        residual,
        y,
        rows,
        columns,
        channels,
        column_tiles,
        channels_last,
        **options,
    )
    return y
