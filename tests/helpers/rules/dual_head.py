"""The rule that dual_head is held to: its formula in extended precision, and what plain torch makes of it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ..numerics import assert_accurate, call, exact, randn, statistics_eps

OP = "dual_head"


def formula(h, direction_weight, direction_bias, distance_weight, distance_bias, sample=None, anchor=None):
    """direction and distance in extended precision, and the size of the direction's largest sum of terms."""
    h, weight = exact(h), exact(direction_weight)
    height, width = h.shape[2:]
    padded = np.pad(h, ((0, 0), (0, 0), (1, 1), (1, 1)))
    bias = exact(direction_bias)[:, None, None]
    direction, size = np.zeros((len(h), len(weight), height, width), np.longdouble) + bias, 0 + np.abs(bias)
    for i in range(3):
        for j in range(3):
            window = padded[:, :, i : i + height, j : j + width]
            direction = direction + np.einsum("nchw,oc->nohw", window, weight[:, :, i, j])
            size = size + np.einsum("nchw,oc->nohw", np.abs(window), np.abs(weight[:, :, i, j]))
    distance = np.log1p(np.exp(h.mean((2, 3)) @ exact(distance_weight).reshape(-1) + exact(distance_bias)))
    if sample is not None:
        offset = exact(anchor) - exact(sample)
        length = np.sqrt((offset**2).mean((1, 2, 3)))
        along = offset / np.maximum(length, 1e-6)[:, None, None, None]
        direction, size, distance = direction + along, size + np.abs(along), distance * length
    return direction, distance, float(size.max(initial=0))


def plain(h, direction_weight, direction_bias, distance_weight, distance_bias, sample=None, anchor=None):
    """The op in torch's own functions: the heads in h's dtype, the anchor in float32 at least."""
    wide = torch.promote_types(h.dtype, torch.float32)
    direction = F.conv2d(h, direction_weight.to(h.dtype), direction_bias.to(h.dtype), padding=1)
    distance = F.softplus(
        F.linear(h.to(wide).mean((2, 3)), distance_weight.to(wide).view(1, -1), distance_bias.to(wide))
    )[:, 0]
    if sample is not None:
        offset = anchor.to(wide) - sample.to(wide)
        length = offset.pow(2).mean((1, 2, 3)).sqrt()
        direction = direction + offset / length.clamp_min(1e-6).view(-1, 1, 1, 1)
        distance = distance * length
    return direction, distance


def parameters(channels: int, latent: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Weights of the size that a trained network has: outputs are of size 1 for inputs of size 1."""
    width = (9 * channels) ** -0.5
    return (
        (width * randn(latent, channels, 3, 3, seed=11)).to(dtype),
        randn(latent, dtype=dtype, seed=12),
        (channels**-0.5 * randn(1, channels, seed=13)).to(dtype),
        randn(1, dtype=dtype, seed=14),
    )


def check(
    backend: str, h: torch.Tensor, heads: tuple[torch.Tensor, ...], sample=None, anchor=None
) -> tuple[torch.Tensor, torch.Tensor]:
    result = call(OP, backend, h, *heads, sample=sample, anchor=anchor)
    judge(result, h, *heads, sample=sample, anchor=anchor)
    return result


def judge(
    result: tuple[torch.Tensor, torch.Tensor], h: torch.Tensor, *heads: torch.Tensor, sample=None, anchor=None
) -> None:
    """Hold the result to the rule."""
    direction, distance = result
    truth_direction, truth_distance, size = formula(h, *heads, sample, anchor)
    plain_direction, plain_distance = plain(h, *heads, sample, anchor)
    wide = torch.promote_types(h.dtype, torch.float32)
    assert direction.dtype == (h.dtype if sample is None else torch.promote_types(h.dtype, sample.dtype))
    assert distance.dtype == wide
    # the sum of 9 C products rounds by its terms, not by its result, and 9 C times, at random: torch begins some with
    # the bias
    assert_accurate(
        "direction", direction, plain_direction, truth_direction, h.dtype, size * max(1.0, (9 * h.shape[1]) ** 0.5 / 4)
    )
    terms = (exact(h).mean((2, 3)) * exact(heads[2]).reshape(-1)).astype(float)
    size = float(np.abs(terms).sum(1).max(initial=1)) * float(truth_distance.max(initial=1))
    condition = float(np.abs(exact(h)).max(initial=0)) * statistics_eps(wide)
    assert_accurate("distance", distance, plain_distance, truth_distance, wide, size, condition)
