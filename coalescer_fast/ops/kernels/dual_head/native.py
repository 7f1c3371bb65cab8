"""dual_head in C++: see csrc/cpu/head.h."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import layout, native_library
from ...native_library import missing
from . import direction_dtype

_pack = struct.Struct("35q").pack  # cf_dual_head_args


def arrange(
    h: Tensor,
    direction_weight: Tensor,
    direction_bias: Tensor,
    distance_weight: Tensor,
    distance_bias: Tensor,
    sample: Tensor | None,
    anchor: Tensor | None,
) -> tuple[Any, ...]:
    """Features and taps with channels innermost; sample and anchor may have any strides."""
    vectors = direction_bias.contiguous(), distance_weight.contiguous(), distance_bias.contiguous()
    return _channels_innermost(h), _channels_innermost(direction_weight), *vectors, sample, anchor


def _channels_innermost(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def prepare(
    call: native_library.Call,
    h: Tensor,
    direction_weight: Tensor,
    direction_bias: Tensor,
    distance_weight: Tensor,
    distance_bias: Tensor,
    sample: Tensor | None,
    anchor: Tensor | None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    n, channels, height, width = h.shape
    latent = direction_weight.shape[0]
    shape = native_library.dtype(h), n, channels, latent, height, width
    dtypes = [native_library.dtype(v) for v in (direction_weight, direction_bias, distance_weight, distance_bias)]
    sample_layout, anchor_layout = _layout(sample), _layout(anchor)
    model = layout.empty(h, latent, direction_dtype(h, sample))
    direction_layout = _layout(model)
    size, strides, dtype, device = tuple(model.shape), model.stride(), model.dtype, model.device

    def launch(
        h: Tensor,
        direction_weight: Tensor,
        direction_bias: Tensor,
        distance_weight: Tensor,
        distance_bias: Tensor,
        sample: Tensor | None,
        anchor: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        direction = torch.empty_strided(size, strides, dtype=dtype, device=device)
        distance = torch.empty(n, dtype=torch.float32, device=device)
        call(
            _pack(
                h.data_ptr() or missing(h),
                *shape,
                direction_weight.data_ptr() or missing(direction_weight),
                dtypes[0],
                direction_bias.data_ptr() or missing(direction_bias),
                dtypes[1],
                distance_weight.data_ptr() or missing(distance_weight),
                dtypes[2],
                distance_bias.data_ptr() or missing(distance_bias),
                dtypes[3],
                0 if sample is None else sample.data_ptr() or missing(sample),
                *sample_layout,
                0 if anchor is None else anchor.data_ptr() or missing(anchor),
                *anchor_layout,
                direction.data_ptr(),
                *direction_layout,
                distance.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return direction, distance

    return launch


def _layout(x: Tensor | None) -> tuple[int, ...]:
    """cf_tensor4 without the address."""
    return (0,) * 5 if x is None else (native_library.DTYPES[x.dtype], *x.stride())


def in_layout_of_h(head: Callable[..., Any]) -> Callable[..., Any]:
    """``head``, whose direction has its channels innermost, with the direction in h's layout."""

    def dual_head(h: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        direction, distance = head(h, *others)
        return layout.arrange(direction, layout.is_channels_last(h)), distance

    dual_head.prepare = head.prepare  # type: ignore[attr-defined]
    return dual_head


dual_head = in_layout_of_h(native_library.implementation(native_library.on_cpu("cf_cpu_dual_head"), arrange, prepare))
