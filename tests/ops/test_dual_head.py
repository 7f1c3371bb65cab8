from __future__ import annotations

import numpy as np
import pytest
import torch

from coalescer_fast import ops

from ..helpers.drawn import given, settings, st
from ..helpers.numerics import (
    DTYPES,
    INPUTS,
    LAYOUTS,
    able,
    arrange,
    call,
    make,
    randn,
)
from ..helpers.rules.dual_head import OP, check, parameters


@pytest.mark.parametrize("anchored", [False, True], ids=["plain", "anchored"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(backend, kind, dtype, anchored):
    h = make(kind, 2, 12, 6, 5, dtype=dtype)
    points = (randn(2, 4, 6, 5, dtype=dtype, seed=1), randn(2, 4, 6, 5, dtype=dtype, seed=2)) if anchored else ()
    check(backend, h, parameters(12, 4, dtype), *points)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 5), (8, 8)], ids=str)
def test_spatial_sizes(backend, size):
    check(backend, randn(2, 6, *size), parameters(6, 3), randn(2, 3, *size, seed=1), randn(2, 3, *size, seed=2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    h, sample, anchor = (arrange(randn(2, c, 6, 5, seed=seed), layout) for seed, c in enumerate((12, 4, 4)))
    check(backend, h, parameters(12, 4), sample, anchor)


@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_of_parameters_and_points(backend, dtype, other):
    h = randn(2, 12, 4, 5, dtype=dtype)
    check(
        backend,
        h,
        parameters(12, 4, other),
        randn(2, 4, 4, 5, dtype=other, seed=1),
        randn(2, 4, 4, 5, dtype=other, seed=2),
    )


def test_distance_weight_of_one_row_or_flat(backend):
    h, (weight, bias, row, offset) = randn(2, 6, 4, 4), parameters(6, 3)
    assert torch.equal(
        call(OP, backend, h, weight, bias, row, offset)[1], call(OP, backend, h, weight, bias, row[0], offset)[1]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_the_anchor_nothing_is_added_and_the_distance_is_zero(backend, dtype):
    h, heads = randn(2, 6, 4, 4, dtype=dtype), parameters(6, 3, dtype)
    point = randn(2, 3, 4, 4, dtype=dtype, seed=1)
    direction, distance = call(OP, backend, h, *heads, sample=point, anchor=point.clone())
    assert torch.equal(direction, call(OP, backend, h, *heads)[0])
    assert torch.equal(distance, torch.zeros_like(distance))


def test_a_breath_from_the_anchor(backend):
    """|p - R| below 1e-6 is not divided by: the way to the anchor shrinks instead of growing to a unit vector."""
    h, heads, point = randn(2, 6, 4, 4), parameters(6, 3), 1e-9 * randn(2, 3, 4, 4)
    direction, distance = check(backend, h, heads, point, point + 1e-8)
    assert (distance < 1e-7).all()
    # 1e-8 / 1e-6 is added to numbers of size 1, which round by half an ulp
    torch.testing.assert_close(
        direction - call(OP, backend, h, *heads)[0], torch.full_like(direction, 1e-2), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("logit", [-200.0, -30.0, 0.0, 30.0, 200.0])
def test_softplus_far_out(backend, logit):
    weight, bias, row, _ = parameters(6, 3)
    _, distance = call(OP, backend, torch.zeros(1, 6, 2, 2), weight, bias, row, torch.tensor([logit]))
    torch.testing.assert_close(
        distance, torch.tensor([np.log1p(np.exp(logit))], dtype=torch.float32), rtol=1e-6, atol=1e-38
    )


@pytest.mark.parametrize("where", ["sample", "anchor"])
def test_nan_in_a_point_reaches_its_sample_alone(backend, where):
    points = {"sample": randn(2, 3, 4, 5, seed=1), "anchor": randn(2, 3, 4, 5, seed=2)}
    points[where][1, 0, 0, 0] = torch.nan
    h = randn(2, 6, 4, 5)
    direction, distance = call(OP, backend, h, *parameters(6, 3), **points)
    assert direction[0].isfinite().all()
    assert direction[1].isnan().all()
    assert distance.isnan().tolist() == [False, True]


def test_empty_batch(backend):
    direction, distance = call(
        OP, backend, randn(0, 6, 4, 4), *parameters(6, 3), sample=randn(0, 3, 4, 4), anchor=randn(0, 3, 4, 4)
    )
    assert direction.shape == (0, 3, 4, 4)
    assert distance.shape == (0,)


def test_gradients_reach_every_input():
    inputs = [randn(2, 2, 2, 3, dtype=torch.float64), *parameters(2, 2, torch.float64)]
    inputs += [randn(2, 2, 2, 3, dtype=torch.float64, seed=seed) for seed in (1, 2)]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: ops.dual_head(*t[:5], sample=t[5], anchor=t[6]), inputs)


@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 12),
    latent=st.integers(1, 5),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    anchored=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_call(batch, channels, latent, size, dtype, layout, anchored):
    points = (
        [arrange(randn(batch, latent, *size, dtype=dtype, seed=seed), layout) for seed in (1, 2)] if anchored else ()
    )
    for backend in able(OP, dtype):
        check(
            backend,
            arrange(randn(batch, channels, *size, dtype=dtype), layout),
            parameters(channels, latent, dtype),
            *points,
        )


def arguments() -> dict[str, torch.Tensor]:
    names = ("direction_weight", "direction_bias", "distance_weight", "distance_bias")
    return {"h": torch.zeros(2, 6, 4, 4), **dict(zip(names, parameters(6, 3)))}


POINT = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"h": torch.zeros(2, 6, 4, 4, dtype=torch.int64)}, ("h", "torch.int64")),
        ({"h": torch.zeros(2, 6, 4)}, ("h", "3 dimensions")),
        ({"direction_weight": torch.zeros(3, 5, 3, 3)}, ("direction_weight", "(3, 5, 3, 3)")),
        ({"direction_weight": torch.zeros(())}, ("direction_weight", "()")),
        ({"direction_weight": torch.zeros(3, 6, 1, 1)}, ("direction_weight", "(3, 6, 1, 1)")),
        ({"direction_bias": torch.zeros(4)}, ("direction_bias", "(4,)")),
        ({"distance_weight": torch.zeros(5)}, ("distance_weight", "(5,)")),
        ({"distance_weight": torch.zeros(2, 3)}, ("distance_weight", "(2, 3)")),
        ({"distance_bias": torch.zeros(2)}, ("distance_bias", "(2,)")),
        ({"sample": POINT}, ("anchor", "missing")),
        ({"anchor": POINT}, ("sample", "missing")),
        ({"sample": POINT[:1], "anchor": POINT}, ("sample", "(1, 3, 4, 4)")),
        ({"sample": POINT, "anchor": POINT[:, :2]}, ("anchor", "(2, 2, 4, 4)")),
        ({"sample": POINT, "anchor": POINT.to("meta")}, ("anchor", "meta")),
        ({"direction_bias": torch.zeros(3, device="meta")}, ("direction_bias", "meta")),
        ({"backend": "fast"}, ("backend", "'fast'")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_name_the_argument_and_its_value(change, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        ops.dual_head(**{**arguments(), **change})
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
