"""The sampler's update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import checks, layout, op
from ...dispatch import run


def _fake(sample: Tensor, *args: object, **kwargs: object) -> Tensor:
    return layout.empty(sample, sample.shape[1], sample.dtype)


def _example(tensor: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "sample": tensor(2, 3, 4, 5),
        "direction": tensor(2, 3, 4, 5),
        "distance": tensor(2).abs(),
        "eta": 0.5,
        "mode": "unit",
    }


@op.declare(fake=_fake, example=_example, reference=".reference", cpu=".native", triton=".triton", cuda=".cuda")
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
    ``|x| = ||x||_2 / sqrt(numel(x))`` of one sample. Computed in float32 (float64 if sample is), rounded once to
    sample's dtype. A zero direction leaves R where it is. A direction or distance that is not finite makes its own
    sample not finite, and no other. A finite direction whose square overflows float32 has infinite length and does not
    move R in mode ``unit``.

    Args:
        sample: R, (N, ...), float64, float32, float16 or bfloat16.
        direction: of sample's shape, any of these dtypes.
        distance: (N,), any of these dtypes.
        eta: share of the distance to go, finite.
        mode: "unit" or "raw".
        eps: smallest length to divide by; above 0.
        backend: "auto" or a name of `ops.backends`.

    Returns:
        The new R, of sample's shape and dtype, channels innermost in memory if sample's are, else contiguous.

    Raises:
        ValueError: other shapes, dtypes, devices or values than these, or a backend that cannot run the call.
        TypeError: an argument of another type.
    """
    checks.floating("sample", sample)
    if sample.ndim < 2:
        raise ValueError(f"sample has {sample.ndim} dimensions; expected (N, ...) with at least one more")
    checks.tensor("direction", direction, sample.shape, sample.device, optional=False)
    checks.tensor("distance", distance, sample.shape[:1], sample.device, optional=False)
    checks.choice("mode", mode, ("unit", "raw"))
    eta, eps = checks.number("eta", eta), checks.number("eps", eps)
    if not eps > 0:
        raise ValueError(f"eps is {eps}; expected a number above 0")
    y: Tensor = run("coalesce_step", backend, sample, direction, distance, eta, mode, eps)
    return y
