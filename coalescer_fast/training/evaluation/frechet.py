"""The Fréchet distance between samples and real pictures, in the features of a classifier."""

from __future__ import annotations

import torch


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Fréchet distance between normal distributions that are fitted to two sets of features.

        |mu_a - mu_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2))

    with means mu and unbiased covariances A, B in float64 (Heusel et al., arXiv 1706.08500, in other features).

    Args:
        a: (n, D).
        b: (m, D).
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # the trace of a root is the sum of the roots of the eigenvalues
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
