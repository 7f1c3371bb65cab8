"""The sampler's update."""

from __future__ import annotations

import torch

from ... import checks, layout
from ...dispatch import launchers, register, run, signing


def coalesce_step(
    sample: torch.Tensor,
    direction: torch.Tensor,
    distance: torch.Tensor,
    *,
    eta: float = 1.0,
    mode: str = "unit",
    eps: float = 1e-6,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Move R along the target direction by the target distance.

    ``unit``: ``R + eta * distance * direction / max(|direction|, eps)``; ``raw``: ``R + eta * distance * direction``;
    ``|x| = ||x||_2 / sqrt(numel(x))`` of one sample. Computed in float32 (float64 if sample is), rounded once to sample's dtype.
    A zero direction leaves R where it is. What is not finite in a sample's direction or distance makes that sample not finite, and
    no other; a finite direction whose square overflows float32 has infinite length and does not move R in mode ``unit``.

    Args:
        sample: R, (N, ...), float64, float32, float16 or bfloat16.
        direction: of sample's shape, any of these dtypes.
        distance: (N,), any of these dtypes.
        eta: share of the distance to go, finite.
        mode: "unit" or "raw".
        eps: smallest length to divide by; above 0.
        backend: "auto" or a name of `ops.backends`.

    Returns: the new R, of sample's shape and dtype, channels innermost in memory if sample's are, else contiguous.

    Raises: ValueError for other shapes, dtypes, devices or values, and for a backend that cannot run the call; TypeError for arguments of
    other types.
    """
    key = None
    if (signature := signing(sample)) is not None:
        key = ("coalesce_step", backend, signature(sample), signature(direction), signature(distance), eta, mode, eps)
        try:
            return launchers[key](sample, direction, distance, eta, mode, eps)
        except KeyError:  # the first call of its kind
            pass
        except TypeError:  # no hash, which the checks refuse, or no memory
            key = None
    checks.floating("sample", sample)
    if sample.ndim < 2:
        raise ValueError(f"sample has {sample.ndim} dimensions; expected (N, ...) with at least one more")
    checks.tensor("direction", direction, sample.shape, sample.device, optional=False)
    checks.tensor("distance", distance, sample.shape[:1], sample.device, optional=False)
    checks.choice("mode", mode, ("unit", "raw"))
    eta, eps = checks.number("eta", eta), checks.number("eps", eps)
    if not eps > 0:
        raise ValueError(f"eps is {eps}; expected a number above 0")
    return run("coalesce_step", backend, sample, direction, distance, eta, mode, eps, key=key)


def _fake(sample: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return layout.empty(sample, sample.shape[1], sample.dtype)


register(
    "coalesce_step(Tensor sample, Tensor direction, Tensor distance, *, float eta=1.0, str mode='unit', float eps=1e-06, "
    "str backend='auto') -> Tensor",
    coalesce_step,
    _fake,
)
