"""GroupNorm with conditioning, concatenation and activation in one op."""

from __future__ import annotations

import torch

from ... import checks, layout
from ...dispatch import launchers, register, run, signing


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
    ``GN(z) = (z - mean_g) / sqrt(var_g + eps) * weight + bias``; mean and (biased) variance are over the C/num_groups channels of a
    group and all spatial positions of one sample.

    Args:
        x: (N, C1, *spatial), float64, float32, float16 or bfloat16, one to three spatial dimensions.
        num_groups: number of groups; divides C = C1 + C2.
        weight, bias: (C,) affine parameters, 1 and 0 if None; they and those below may have another of these dtypes, but skip.
        eps: added to the variance; not negative.
        scale, shift: (N, C) conditioning (FiLM), 0 if None.
        skip: (N, C2, *spatial), concatenated behind x on the channel axis.
        pre_bias: (C,), added to z before the statistics: the bias of the convolution that made x.
        activation: "silu", ``v * sigmoid(v)``, or None for the identity.
        backend: "auto" or a name of `ops.backends`.

    Returns: (N, C, *spatial) of x's dtype, channels innermost in memory if x's are, else contiguous. Statistics are float32 at least.

    Raises: ValueError for shapes, dtypes, devices or values other than these, and for a backend that cannot run the call; TypeError for
    arguments of other types.

    Source: Wu and He, Group Normalization (arXiv 1803.08494); conditioning as in Dhariwal and Nichol (arXiv 2105.05233).
    """
    key = None
    if (signature := signing(x)) is not None and type(num_groups) is int:
        key = (
            "group_norm_silu",
            backend,
            num_groups,
            eps,
            activation,
            signature(x),
            None if weight is None else signature(weight),
            None if bias is None else signature(bias),
            None if scale is None else signature(scale),
            None if shift is None else signature(shift),
            None if skip is None else signature(skip),
            None if pre_bias is None else signature(pre_bias),
        )
        try:
            return launchers[key](x, num_groups, weight, bias, eps, scale, shift, skip, pre_bias, activation)
        except KeyError:  # the first call of its kind
            pass
        except TypeError:  # no hash, which the checks refuse, or no memory
            key = None
    checks.floating("x", x)
    n, channels, *spatial = x.shape
    if not 1 <= len(spatial) <= 3:
        raise ValueError(f"x has {x.ndim} dimensions; expected (N, C, *spatial) with one to three spatial dimensions")
    device = x.device
    if skip is not None:
        checks.floating("skip", skip)
        if skip.dtype != x.dtype or skip.ndim != x.ndim or skip.shape[0] != n or list(skip.shape[2:]) != spatial:
            raise ValueError(
                f"skip is {skip.dtype} {tuple(skip.shape)}; expected x's dtype and, but for the channels, shape: {x.dtype} {tuple(x.shape)}"
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
    return run(
        "group_norm_silu", backend, x, num_groups, weight, bias, eps, scale, shift, skip, pre_bias, activation, key=key
    )


def _fake(x: torch.Tensor, *args: object, skip: torch.Tensor | None = None, **kwargs: object) -> torch.Tensor:
    return layout.empty(x, x.shape[1] + (0 if skip is None else skip.shape[1]), x.dtype)


register(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, Tensor? scale=None, "
    "Tensor? shift=None, Tensor? skip=None, Tensor? pre_bias=None, str? activation='silu', str backend='auto') -> Tensor",
    group_norm_silu,
    _fake,
)
