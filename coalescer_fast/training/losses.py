"""Losses of a coalescer, from the outputs of the heads at R and the latent of the close picture.

Lengths are RMS: |x| = ||x||_2 / sqrt(C H W). `EPS` smooths both the unit vector near the target, n = e / sqrt(|e|^2 +
EPS^2) with e = close - R, and the root of the direction loss, whose gradient would be infinite at 0.
"""

from __future__ import annotations

import torch

EPS = 0.05
DIRECTION_LOSSES = ("sqrt", "mse", "distance_marching")


def mean_square(x: torch.Tensor) -> torch.Tensor:
    """|x|^2 of each sample, (N, ...) -> (N,)."""
    return x.flatten(1).square().mean(1)


def target_direction(sample: torch.Tensor, close: torch.Tensor) -> torch.Tensor:
    """n, the smoothed unit vector from R to the close picture."""
    offset = close - sample
    return offset / _like((mean_square(offset) + EPS**2).sqrt(), offset)


def distance_loss(distance: torch.Tensor, sample: torch.Tensor, close: torch.Tensor) -> torch.Tensor:
    """(distance - |close - R|)^2, the seed's; (N,)."""
    return (distance - mean_square(close - sample).sqrt()).square()


def sqrt_direction_loss(direction: torch.Tensor, sample: torch.Tensor, close: torch.Tensor) -> torch.Tensor:
    """sqrt(|direction - n|), the seed's, smoothed to (|direction - n|^2 + EPS^2)^(1/4); (N,)."""
    return (mean_square(direction - target_direction(sample, close)) + EPS**2).pow(0.25)


def mse_direction_loss(direction: torch.Tensor, sample: torch.Tensor, close: torch.Tensor) -> torch.Tensor:
    """|direction - n|^2; (N,)."""
    return mean_square(direction - target_direction(sample, close))


def distance_marching_loss(
    direction: torch.Tensor,
    distance: torch.Tensor,
    sample: torch.Tensor,
    close: torch.Tensor,
    eikonal_weight: float = 30.0,
) -> torch.Tensor:
    """|R + distance * direction - close|^2 / (|close - R|^2 + EPS^2) + eikonal_weight * |direction - n|^2; (N,).

    The one-step loss and the directional Eikonal loss of Distance Marching (arXiv 2602.02928), for a direction that
    points to the data.
    """
    landing = sample + _like(distance, sample) * direction
    one_step = mean_square(landing - close) / (mean_square(close - sample) + EPS**2)
    return one_step + eikonal_weight * mse_direction_loss(direction, sample, close)


def coalescer_loss(
    direction: torch.Tensor,
    distance: torch.Tensor,
    sample: torch.Tensor,
    close: torch.Tensor,
    direction_loss: str = "sqrt",
) -> tuple[torch.Tensor, dict[str, float]]:
    """The training loss.

    Args:
        direction: (N, C, H, W), of the network at R.
        distance: (N,), of the network at R.
        sample: R, (N, C, H, W).
        close: latents of the close pictures, (N, C, H, W).
        direction_loss: one of `DIRECTION_LOSSES`.

    Returns:
        The mean over the batch, and its parts for the progress bar.
    """
    if direction_loss == "distance_marching":
        value = distance_marching_loss(direction, distance, sample, close).mean()
        return value, {}
    if direction_loss not in DIRECTION_LOSSES:
        raise ValueError(f"direction loss {direction_loss!r} is unknown: use {', '.join(DIRECTION_LOSSES)}")
    along = {"sqrt": sqrt_direction_loss, "mse": mse_direction_loss}[direction_loss](direction, sample, close).mean()
    far = distance_loss(distance, sample, close).mean()
    return far + along, {"distance": float(far.detach()), "direction": float(along.detach())}


def _like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))
