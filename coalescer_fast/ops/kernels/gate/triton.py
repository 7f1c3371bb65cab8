"""A gated activation in Triton: one pass over a matrix whose rows are contiguous."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...abi import cf_function
from ...triton_launch import cdiv, configuration, launch


@triton.jit(do_not_specialize=["rows", "column_tiles"])
def gate_kernel(
    x,
    y,
    rows,
    stride,
    value,
    gate,
    channels,
    column_tiles,
    FUNCTION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y[r, c] = x[r, value + c] f(x[r, gate + c])."""
    program = tl.program_id(0)
    row = (program // column_tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = program % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < channels)[None, :]
    offset = row[:, None] * stride + column[None, :]
    v = tl.load(x + value + offset, mask=inside).to(tl.float32)
    g = tl.load(x + gate + offset, mask=inside).to(tl.float32)
    if FUNCTION == 1:  # SiLU
        f = g / (1 + tl.exp(-g))
    elif FUNCTION == 4:  # GELU
        f = 0.5 * g * (1 + tl.erf(g * 0.7071067811865476))
    else:  # GELU by tanh, 2 sigmoid(2 z) - 1
        f = g / (1 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
    tl.store(y + row[:, None] * channels + column[None, :], (v * f).to(y.dtype.element_ty), mask=inside)


def gate(x: torch.Tensor, value: int, gate: int, channels: int, function: cf_function) -> torch.Tensor:
    """As `gated`, of contiguous rows."""
    y = x.new_empty(*x.shape[:-1], channels)
    if y.numel():
        options, rows = configuration("gate", "rows", "any"), y.numel() // channels
        column_tiles = cdiv(channels, options["BLOCK_C"])
        programs = cdiv(rows, options["BLOCK_R"]) * column_tiles
        args = x, y, rows, x.shape[-1], value, gate, channels, column_tiles, int(function)
        launch(gate_kernel, programs, x.device, *args, **options)
    return y
