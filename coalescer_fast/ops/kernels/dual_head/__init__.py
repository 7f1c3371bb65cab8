"""The two heads of a coalescer: target direction and target distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import checks, layout, op
from ...dispatch import run


def direction_dtype(h: Tensor, sample: Tensor | None) -> torch.dtype:
    """The wider of h's and sample's."""
    return h.dtype if sample is None else torch.promote_types(h.dtype, sample.dtype)


def _fake(
    h: Tensor, direction_weight: Tensor, *args: object, sample: Tensor | None = None, **kwargs: object
) -> tuple[Tensor, Tensor]:
    direction = layout.empty(h, direction_weight.shape[0], direction_dtype(h, sample))
    return direction, h.new_empty(h.shape[0], dtype=torch.promote_types(h.dtype, torch.float32))


def _example(tensor: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "h": tensor(2, 6, 4, 5),
        "direction_weight": tensor(3, 6, 3, 3),
        "direction_bias": tensor(3),
        "distance_weight": tensor(1, 6),
        "distance_bias": tensor(1),
        "sample": tensor(2, 3, 4, 5),
        "anchor": tensor(2, 3, 4, 5),
    }


@op.declare(fake=_fake, example=_example, reference=".reference", cpu=".native", triton=".triton", cuda=".cuda")
def dual_head(
    h: torch.Tensor,
    direction_weight: torch.Tensor,
    direction_bias: torch.Tensor,
    distance_weight: torch.Tensor,
    distance_bias: torch.Tensor,
    *,
    sample: torch.Tensor | None = None,
    anchor: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Direction field and distance from one feature map.

    ``direction = conv3x3(h)`` (zero padding 1) and ``distance = softplus(w . mean_HW(h) + b)``. With the sample R and
    its anchor p, the heads are residual: ``direction += (p - R) / max(|p - R|, 1e-6)`` and ``distance *= |p - R|``,
    where ``|x| = ||x||_2 / sqrt(Cz H W)`` of one sample. Norms and distance are computed in float32 at least.

    Args:
        h: (N, C, H, W) features, float64, float32, float16 or bfloat16.
        direction_weight: (Cz, C, 3, 3).
        direction_bias: (Cz,).
        distance_weight: (C,) or (1, C).
        distance_bias: (1,).
        sample: R, (N, Cz, H, W); with anchor, or not at all.
        anchor: p, of sample's shape.
        backend: "auto" or a name of `ops.backends`.

    Returns:
        direction: (N, Cz, H, W) of h's dtype, or the wider of it and sample's, channels innermost in memory if h's are,
            else contiguous.
        distance: (N,), float32 (float64 for float64 h).

    Raises:
        ValueError: other shapes, dtypes or devices than these, one of sample and anchor alone, or a backend that cannot
            run the call.
        TypeError: an argument is no tensor.
    """
    checks.floating("h", h)
    checks.floating("direction_weight", direction_weight)
    checks.floating("distance_weight", distance_weight)
    if h.ndim != 4:
        raise ValueError(f"h has {h.ndim} dimensions; expected (N, C, H, W)")
    n, channels, height, width = h.shape
    latent, device = direction_weight.shape[0] if direction_weight.ndim else 0, h.device
    checks.tensor("direction_weight", direction_weight, (latent, channels, 3, 3), device)
    checks.tensor("direction_bias", direction_bias, (latent,), device, optional=False)
    if distance_weight.shape not in ((channels,), (1, channels)):
        raise ValueError(
            f"distance_weight has shape {tuple(distance_weight.shape)}; expected ({channels},) or (1, {channels})"
        )
    checks.tensor("distance_weight", distance_weight, distance_weight.shape, device)
    checks.tensor("distance_bias", distance_bias, (1,), device, optional=False)
    if (sample is None) != (anchor is None):
        raise ValueError(
            f"{'sample' if sample is None else 'anchor'} is missing; give both sample and anchor, or neither"
        )
    checks.tensor("sample", sample, (n, latent, height, width), device)
    checks.tensor("anchor", anchor, (n, latent, height, width), device)
    heads = direction_weight, direction_bias, distance_weight, distance_bias
    result: tuple[Tensor, Tensor] = run("dual_head", backend, h, *heads, sample, anchor)
    return result
