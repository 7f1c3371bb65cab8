"""Figures computed from tensors: retrieval, correlation, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F


def shrink(pictures: torch.Tensor) -> torch.Tensor:
    """4x4 means as vectors, (N, 3, H, W) -> (N, 3 * H/4 * W/4)."""
    return F.avg_pool2d(pictures, 4).flatten(1)


def nearest(queries: torch.Tensor, references: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k references nearest to each query, nearest first.

    Args:
        queries: (n, D).
        references: (m, D).
        k: how many; at most m are found.

    Returns:
        Distances ||q - r||_2 and indices, both (n, min(k, m)).
    """
    k = min(k, len(references))
    found = [torch.cdist(part, references).topk(k, largest=False) for part in queries.split(1000)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def density_and_coverage(real: torch.Tensor, samples: torch.Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage (arXiv 2002.09797), by the balls around real features that reach to their k-th neighbours.

    Args:
        real: features of N real pictures, (N, D).
        samples: features of M samples, (M, D).
        k: which neighbour; at most N - 1.

    Returns:
        1 / (k M) times the number of pairs of a ball and a sample in it, and the share of balls with a sample in them:
        about 1 and 1 - 2^-k for M = N samples of the same distribution.
    """
    k = min(k, len(real) - 1)
    radius = nearest(real, real, k + 1)[0][:, k]
    inside = torch.cdist(samples, real) < radius
    return float(inside.double().sum() / (k * len(samples))), float(inside.any(0).double().mean())


def hits(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Shares of rows whose first, and any, of the labels found (n, k) is the one wanted (n,)."""
    hit = found == wanted[:, None]
    return float(hit[:, 0].double().mean()), float(hit.any(1).double().mean())


def chance(labels: np.ndarray, wanted: np.ndarray) -> float:
    """Expected share of hits when each answer is a random element of ``labels``: sum_g p_labels(g) p_wanted(g)."""
    return float(sum((labels == g).mean() * (wanted == g).mean() for g in np.unique(wanted)))


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of (n,) and (n,)."""
    return float(scipy.stats.spearmanr(a.numpy(), b.numpy()).statistic)


def r_squared(predicted: torch.Tensor, true: torch.Tensor) -> float:
    """1 - sum (predicted - true)^2 / sum (true - mean true)^2: 0 is as good as the best constant, 1 is perfect."""
    return float(1 - (predicted - true).square().sum() / (true - true.mean()).square().sum())


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median wall clock of a call after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
