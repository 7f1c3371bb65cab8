"""How the close picture of a random point R is found, in a group of n noises and n pictures that all fit a description.

Every function takes noise z (n, ...), latents x (n, ...) of the group's pictures and radii a (n,) in [0, 1], where
a = 1 is the prior and R = a z + (1 - a) x lies between noise and picture. It returns (source, close), two (n,) tensors
of indices into the pictures: R is mixed from ``x[source]``, and its close picture is ``x[close]``.

The text that the method comes from says "vector search" and leaves the rest open: the pairings here are a
reconstruction.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment

Pairs = tuple[torch.Tensor, torch.Tensor]


def mix(noise: torch.Tensor, picture: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """R = a z + (1 - a) x."""
    a = radius.view(-1, *[1] * (noise.ndim - 1))
    return a * noise + (1 - a) * picture


def squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a_i - b_j|^2, summed over all elements; (n, ...), (m, ...) -> (n, m)."""
    return torch.cdist(a.flatten(1).float(), b.flatten(1).float()).square()


def assign(cost: torch.Tensor) -> torch.Tensor:
    """The one-to-one assignment of rows to columns with the smallest total cost (n, n); the column of each row."""
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def paired(noise: torch.Tensor, pictures: torch.Tensor, radius: torch.Tensor) -> Pairs:
    """No search: the i-th noise is paired with the i-th picture, that is at random."""
    index = torch.arange(len(noise), dtype=torch.int64)
    return index, index


def nearest(noise: torch.Tensor, pictures: torch.Tensor, radius: torch.Tensor) -> Pairs:
    """The literal search: the picture nearest to R itself. Collapses onto hubs."""
    source = torch.arange(len(noise), dtype=torch.int64)
    return source, squared_distances(mix(noise, pictures, radius), pictures).argmin(1)


def nearest_of_k(
    noise: torch.Tensor, pictures: torch.Tensor, radius: torch.Tensor, k: int, generator: torch.Generator
) -> Pairs:
    """As `nearest`, among k random pictures and, where R is not pure noise, the one that it was mixed from."""
    source = torch.arange(len(noise), dtype=torch.int64)
    cost = squared_distances(mix(noise, pictures, radius), pictures)
    n = len(noise)
    candidate = torch.rand(n, n, dtype=torch.float32, generator=generator).argsort(1) < min(k, n)
    candidate |= torch.eye(n, dtype=torch.bool) & (radius < 1)[:, None]
    return source, cost.masked_fill(~candidate, torch.inf).argmin(1)


def transport(noise: torch.Tensor, pictures: torch.Tensor, radius: torch.Tensor) -> Pairs:
    """Balanced search in noise space: the one-to-one assignment with the smallest total |z_i - x_j|^2."""
    close = assign(squared_distances(noise, pictures))
    return close, close


def output_transport(
    noise: torch.Tensor, pictures: torch.Tensor, radius: torch.Tensor, endpoint: torch.Tensor
) -> Pairs:
    """Balanced search in output space: the assignment with the smallest total |endpoint_i - x_j|^2.

    ``endpoint`` (n, ...) is where the averaged network lands from each z in one step.
    """
    close = assign(squared_distances(endpoint, pictures))
    return close, close
