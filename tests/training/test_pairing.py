from __future__ import annotations

import itertools

import pytest
import torch

from coalescer_fast.training import pairing


def group(n=6, d=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, 1, 1, generator=g), torch.randn(n, d, 1, 1, generator=g), torch.rand(n, generator=g)


def best_permutation(a, b):
    """The cheapest one-to-one assignment, by trying all."""
    cost = ((a[:, None] - b[None]) ** 2).flatten(2).sum(-1)
    rows = range(len(a))
    return min(itertools.permutations(rows), key=lambda p: sum(float(cost[i, p[i]]) for i in rows))


def test_mix():
    z, x, a = group()
    mixed = pairing.mix(z, x, a)
    for i in range(len(z)):
        torch.testing.assert_close(mixed[i], a[i] * z[i] + (1 - a[i]) * x[i])
    assert torch.equal(pairing.mix(z, x, torch.ones(6)), z)


def test_paired():
    source, close = pairing.paired(*group())
    assert source.tolist() == close.tolist() == list(range(6))


@pytest.mark.parametrize("seed", range(5))
def test_transport_is_the_cheapest_permutation(seed):
    z, x, a = group(seed=seed)
    source, close = pairing.transport(z, x, a)
    assert tuple(close.tolist()) == best_permutation(z, x)
    assert torch.equal(source, close)


@pytest.mark.parametrize("seed", range(5))
def test_output_transport_matches_where_the_network_lands(seed):
    z, x, a = group(seed=seed)
    endpoint = torch.randn(6, 3, 1, 1, generator=torch.Generator().manual_seed(100 + seed))
    source, close = pairing.output_transport(z, x, a, endpoint)
    assert tuple(close.tolist()) == best_permutation(endpoint, x)
    assert torch.equal(source, close)


def test_nearest_is_the_argmin_from_r():
    z, x, a = group()
    source, close = pairing.nearest(z, x, a)
    r = pairing.mix(z, x, a)
    for i in range(6):
        assert close[i] == min(range(6), key=lambda j: float(((r[i] - x[j]) ** 2).sum()))
    assert source.tolist() == list(range(6))


def test_nearest_of_k():
    z, x, _ = group(n=40)
    prior = torch.ones(40)
    generator = torch.Generator().manual_seed(0)
    everyone = pairing.nearest_of_k(z, x, prior, 40, generator)[1]
    assert torch.equal(everyone, pairing.nearest(z, x, prior)[1])
    assert (
        len(pairing.nearest_of_k(z, x, prior, 1, generator)[1].unique()) > 15
    )  # one random candidate: nobody wins all
    # where R is on the way to a picture, that picture is a candidate: right at it, it wins
    assert pairing.nearest_of_k(z, x, torch.zeros(40), 1, generator)[1].tolist() == list(range(40))


def test_nearest_has_hubs_and_transport_has_none():
    """In many dimensions the pictures near the prior's centre win most random points: the reason for balancing."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(200, 64, 1, 1, generator=g)
    x = torch.randn(200, 64, 1, 1, generator=g) * torch.linspace(0.3, 1.5, 200)[:, None, None, None]
    prior = torch.ones(200)
    # 200 winners drawn at random would be about 126 different ones, (1 - 1/e) 200
    assert len(pairing.nearest(z, x, prior)[1].unique()) < 63
    assert sorted(pairing.transport(z, x, prior)[1].tolist()) == list(range(200))
