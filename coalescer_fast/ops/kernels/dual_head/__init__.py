"""The two heads of a coalescer: target direction and target distance."""

from __future__ import annotations

import torch

from ... import checks, layout
from ...dispatch import launchers, register, run, signing


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

    ``direction = conv3x3(h)`` (zero padding 1) and ``distance = softplus(w . mean_HW(h) + b)``. With the sample R and its anchor p,
    the heads are residual: ``direction += (p - R) / max(|p - R|, 1e-6)`` and ``distance *= |p - R|``, where
    ``|x| = ||x||_2 / sqrt(Cz H W)`` of one sample; norms and distance are computed in float32 at least.

    Args:
        h: (N, C, H, W) features, float64, float32, float16 or bfloat16.
        direction_weight, direction_bias: (Cz, C, 3, 3) and (Cz,).
        distance_weight, distance_bias: (C,) or (1, C), and (1,).
        sample, anchor: (N, Cz, H, W), both or neither.
        backend: "auto" or a name of `ops.backends`.

    Returns: direction (N, Cz, H, W) of h's dtype, or the wider of it and sample's, channels innermost in memory if h's are, else
    contiguous; distance (N,), float32 (float64 for float64 h).

    Raises: ValueError for other shapes, dtypes or devices, one of sample and anchor alone, and a backend that cannot run the call;
    TypeError for what is no tensor.
    """
    key = None
    if (signature := signing(h)) is not None:
        key = (
            "dual_head",
            backend,
            signature(h),
            signature(direction_weight),
            signature(direction_bias),
            signature(distance_weight),
            signature(distance_bias),
            signature(sample),
            signature(anchor),
        )
        try:
            return launchers[key](h, direction_weight, direction_bias, distance_weight, distance_bias, sample, anchor)
        except KeyError:  # the first call of its kind
            pass
        except TypeError:  # no hash, which the checks refuse, or no memory
            key = None
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
    return run(
        "dual_head",
        backend,
        h,
        direction_weight,
        direction_bias,
        distance_weight,
        distance_bias,
        sample,
        anchor,
        key=key,
    )


def direction_dtype(h: torch.Tensor, sample: torch.Tensor | None) -> torch.dtype:
    return h.dtype if sample is None else torch.promote_types(h.dtype, sample.dtype)


def _fake(
    h: torch.Tensor, direction_weight: torch.Tensor, *args: object, sample: torch.Tensor | None = None, **kwargs: object
) -> tuple[torch.Tensor, torch.Tensor]:
    direction = layout.empty(h, direction_weight.shape[0], direction_dtype(h, sample))
    return direction, h.new_empty(h.shape[0], dtype=torch.promote_types(h.dtype, torch.float32))


register(
    "dual_head(Tensor h, Tensor direction_weight, Tensor direction_bias, Tensor distance_weight, Tensor distance_bias, *, "
    "Tensor? sample=None, Tensor? anchor=None, str backend='auto') -> (Tensor, Tensor)",
    dual_head,
    _fake,
)
