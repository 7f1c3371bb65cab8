from __future__ import annotations

import pytest
import torch

from coalescer_fast import ops

from ..helpers.drawn import given, settings, st
from ..helpers.numerics import DTYPES, LAYOUTS, able, arrange, call, make, widest
from ..helpers.rules.coalesce_step import MODES, OP, batch, check


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["centred", "off_centre", "constant", "tiny_variance"])
def test_inputs(backend, kind, dtype, mode):
    sample, _, distance = batch(dtype=dtype)
    check(backend, sample, make(kind, 3, 4, 6, 5, dtype=dtype, seed=1), distance, mode=mode)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_direction_in_unit_mode(backend, dtype):
    """|direction| > 256: its square would overflow float16."""
    sample, _, distance = batch(dtype=dtype)
    check(backend, sample, make("large", 3, 4, 6, 5, dtype=dtype, seed=1), distance)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.3, -1.0])
@pytest.mark.parametrize("mode", MODES)
def test_eta(backend, mode, eta):
    check(backend, *batch(), eta=eta, mode=mode)


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1, 1), (3, 5, 7), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_shapes(backend, mode, shape):
    check(backend, *batch(shape=shape), mode=mode)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_layouts(backend, mode, layout, other):
    sample, direction, distance = batch()
    check(backend, arrange(sample, layout), arrange(direction, other), distance.repeat_interleave(2)[::2], mode=mode)


@pytest.mark.parametrize("network", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_directions_of_another_dtype(backend, dtype, network):
    sample, direction, distance = batch()
    check(backend, sample.to(dtype), direction.to(network), distance.to(network))


def test_unit_step_goes_exactly_the_distance(backend):
    sample, direction, distance = batch(dtype=widest(backend))
    sample = torch.zeros_like(sample)  # nothing is lost in the difference
    moved = call(OP, backend, sample, direction, distance) - sample
    torch.testing.assert_close(moved.flatten(1).square().mean(1).sqrt(), distance)
    torch.testing.assert_close(call(OP, backend, sample, 7 * direction, distance) - sample, moved)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_direction_or_distance_leaves_the_sample(backend, dtype, mode):
    sample, direction, distance = batch(dtype=dtype)
    assert torch.equal(call(OP, backend, sample, torch.zeros_like(direction), distance, mode=mode), sample)
    assert torch.equal(call(OP, backend, sample, direction, torch.zeros_like(distance), mode=mode), sample)


@pytest.mark.parametrize("length", [1e-4, 1e-6, 1e-7, 1e-18, 1e-30, 1e-44])
def test_direction_near_zero_is_divided_by_eps_at_least(backend, length):
    """Down to squares that underflow float32, and to subnormal numbers."""
    sample, direction, distance = batch()
    check(backend, torch.zeros_like(sample), length * direction, distance)
    check(backend, torch.zeros_like(sample), length * direction, distance, eps=1e-3)


@pytest.mark.parametrize("length", [1e20, 1e30, 3e38])
def test_direction_whose_square_overflows_does_not_move_in_unit_mode(backend, length):
    sample, direction, distance = batch()
    huge = direction.clone()
    huge[1] = length * direction[1].sign()
    moved = call(OP, backend, sample, huge, distance)
    assert torch.equal(moved[1], sample[1])
    assert torch.equal(moved[::2], call(OP, backend, sample[::2], direction[::2], distance[::2]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["direction", "distance"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_sample(backend, dtype, where, value, mode):
    sample, direction, distance = batch(dtype=dtype)
    expected = call(OP, backend, sample, direction, distance, mode=mode)
    bad = {"direction": direction.clone(), "distance": distance.clone()}
    bad[where].view(3, -1)[1, -1] = value
    moved = call(OP, backend, sample, bad["direction"], bad["distance"], mode=mode)
    assert not moved[1].isfinite().all()
    assert torch.equal(moved[::2], expected[::2])


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch(backend, mode):
    assert call(OP, backend, *batch(0), mode=mode).shape == (0, 4, 6, 5)


def test_gradients_reach_every_input():
    inputs = [t.requires_grad_() for t in batch(2, dtype=torch.float64, shape=(2, 2, 2))]
    for mode in MODES:
        assert torch.autograd.gradcheck(lambda *t, mode=mode: ops.coalesce_step(*t, eta=0.5, mode=mode), inputs)


@given(
    n=st.integers(0, 4),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-9, 1e-3, 1.0, 1e3]),
    eta=st.floats(-2, 2),
    mode=st.sampled_from(MODES),
)
@settings(max_examples=80, deadline=None)
def test_any_call(n, shape, dtype, scale, eta, mode):
    sample, direction, distance = batch(n, dtype=dtype, shape=shape)
    for backend in able(OP, dtype):
        check(backend, sample, scale * direction, distance, eta=eta, mode=mode)


R = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample": R.long()}, ("sample", "torch.int64")),
        ({"direction": R.int()}, ("direction", "torch.int32")),
        ({"distance": torch.ones(2, dtype=torch.int64)}, ("distance", "torch.int64")),
        ({"direction": torch.zeros(1, 3, 4, 4)}, ("direction", "(1, 3, 4, 4)")),
        ({"direction": torch.zeros(2, 3, 4)}, ("direction", "(2, 3, 4)")),
        ({"distance": torch.ones(2, 1)}, ("distance", "(2, 1)")),
        ({"distance": torch.ones(())}, ("distance", "()")),
        ({"direction": R.to("meta")}, ("direction", "meta")),
        ({"distance": torch.ones(2, device="meta")}, ("distance", "meta")),
        ({"sample": torch.zeros(2), "direction": torch.zeros(2)}, ("sample", "1 dimensions")),
        (
            {"sample": torch.zeros(()), "direction": torch.zeros(()), "distance": torch.zeros(())},
            ("sample", "0 dimensions"),
        ),
        ({"mode": "long"}, ("mode", "'long'")),
        ({"eps": 0.0}, ("eps", "0.0")),
        ({"eps": -1e-6}, ("eps", "-1e-06")),
        ({"eps": float("nan")}, ("eps", "nan")),
        ({"backend": "fast"}, ("backend", "'fast'")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_name_the_argument_and_its_value(change, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        ops.coalesce_step(**{"sample": R, "direction": R, "distance": torch.ones(2), **change})
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
