"""GroupNorm with conditioning, concatenation and activation in one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import checks, layout, op
from ...dispatch import run


def _fake(x: Tensor, *args: object, skip: Tensor | None = None, **kwargs: object) -> Tensor:
    return layout.empty(x, x.shape[1] + (0 if skip is None else skip.shape[1]), x.dtype)


def _example(tensor: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "x": tensor(2, 6, 4, 5),
        "num_groups": 3,
        "weight": tensor(12),
        "bias": tensor(12),
        "scale": tensor(2, 12),
        "shift": tensor(2, 12),
        "skip": tensor(2, 6, 4, 5),
        "pre_bias": tensor(12),
    }


@op.declare(fake=_fake, example=_example, reference=".reference", cpu=".native", triton=".triton", cuda=".cuda")
def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    pre_bias: torch.Tensor | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> torch.Tensor:
    r"""Group normalisation, conditioned and activated.

    ``y = act(GN(z) * (1 + scale) + shift)`` with ``z = cat([x, skip], 1) + pre_bias`` and
    ``GN(z) = (z - mean_g) / sqrt(var_g + eps) * weight + bias``. Mean and (biased) variance are over the C/num_groups
    channels of a group and all spatial positions of one sample.

    Args:
        x: (N, C1, *spatial), float64, float32, float16 or bfloat16, one to three spatial dimensions.
        num_groups: number of groups; divides C = C1 + C2.
        weight: (C,), 1 if None; it and the parameters below may have another of these dtypes than x.
        bias: (C,), 0 if None.
        eps: added to the variance; not negative.
        scale: (N, C) conditioning (FiLM), 0 if None.
        shift: (N, C) conditioning, 0 if None.
        skip: (N, C2, *spatial) of x's dtype, concatenated behind x on the channel axis.
        pre_bias: (C,), added to z before the statistics: the bias of the convolution that made x.
        activation: "silu", ``v * sigmoid(v)``, or None for the identity.
        backend: "auto" or a name of `ops.backends`.

    Returns:
        (N, C, *spatial) of x's dtype, channels innermost in memory if x's are, else contiguous. Statistics are computed
        in float32 at least.

    Raises:
        ValueError: other shapes, dtypes, devices or values than these, or a backend that cannot run the call.
        TypeError: an argument of another type.

    Source:
        Wu and He, Group Normalization (arXiv 1803.08494); conditioning as in Dhariwal and Nichol (arXiv 2105.05233).
    """
    checks.floating("x", x)
    n, channels, *spatial = x.shape
    if not 1 <= len(spatial) <= 3:
        raise ValueError(f"x has {x.ndim} dimensions; expected (N, C, *spatial) with one to three spatial dimensions")
    device = x.device
    if skip is not None:
        checks.floating("skip", skip)
        if skip.dtype != x.dtype or skip.ndim != x.ndim or skip.shape[0] != n or list(skip.shape[2:]) != spatial:
            raise ValueError(
                f"skip is {skip.dtype} {tuple(skip.shape)}; "
                f"expected x's dtype and, but for the channels, shape: {x.dtype} {tuple(x.shape)}"
            )
        checks.tensor("skip", skip, skip.shape, device)
        channels += skip.shape[1]
    num_groups = checks.integer("num_groups", num_groups)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}; expected a divisor of the {channels} channels")
    eps = checks.number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; expected a number not below 0")
    per_channel, per_sample = (channels,), (n, channels)
    checks.tensor("weight", weight, per_channel, device)
    checks.tensor("bias", bias, per_channel, device)
    checks.tensor("pre_bias", pre_bias, per_channel, device)
    checks.tensor("scale", scale, per_sample, device)
    checks.tensor("shift", shift, per_sample, device)
    checks.choice("activation", activation, ("silu", None))
    y: Tensor = run(
        "group_norm_silu", backend, x, num_groups, weight, bias, eps, scale, shift, skip, pre_bias, activation
    )
    return y
