from __future__ import annotations

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
from ..helpers.rules.group_norm_silu import OP, check


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(backend, kind, dtype):
    x = make(kind, 2, 12, 6, 5, dtype=dtype)
    check(backend, x, 4, randn(12, dtype=dtype, seed=1), randn(12, dtype=dtype, seed=2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_constant_input_gives_the_bias(backend, dtype):
    bias = randn(6, dtype=dtype)
    result = call(OP, backend, torch.full((2, 6, 3, 3), 2.0, dtype=dtype), 2, None, bias, activation=None)
    # x / sqrt(eps) = 632 and as much again are subtracted: each rounds by half an ulp of its size
    tolerance = 2 * 2 / 1e-5**0.5 * torch.finfo(dtype).eps
    torch.testing.assert_close(result, bias.view(1, 6, 1, 1).expand(2, 6, 3, 3), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("channels", "num_groups"),
    [(6, 2), (9, 3), (20, 2), (30, 3), (7, 1), (8, 1), (8, 8), (7, 7)],
    ids=[
        "3 a group",
        "3 a group, odd",
        "10 a group",
        "10 a group, odd",
        "one odd group",
        "one group",
        "C groups",
        "C odd groups",
    ],
)
def test_groups(backend, channels, num_groups, dtype):
    x = make("off_centre", 3, channels, 5, 3, dtype=dtype)
    check(backend, x, num_groups, randn(channels, dtype=dtype, seed=1), randn(channels, dtype=dtype, seed=2))


@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("spatial", [(1,), (7,), (64,), (1, 1), (5, 3), (17, 1), (8, 8), (1, 1, 1), (3, 4, 5)], ids=str)
def test_spatial_sizes(backend, spatial, num_groups):
    x = randn(2, 6, *spatial)
    check(
        backend, x, num_groups, randn(6, seed=1), randn(6, seed=2), scale=randn(2, 6, seed=3), shift=randn(2, 6, seed=4)
    )


def test_group_of_one_element_gives_the_bias(backend):
    bias = randn(4)
    result = call(OP, backend, randn(1, 4, 1, 1), 4, None, bias, activation=None)
    torch.testing.assert_close(result.view(-1), bias)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [(9,), (5, 6), (2, 3, 4)], ids=str)
def test_layouts(backend, layout, spatial):
    x = randn(2, 12, *spatial)
    contiguous = check(
        backend, x, 3, randn(12, seed=1), randn(12, seed=2), scale=randn(2, 12, seed=3), shift=randn(2, 12, seed=4)
    )
    arranged = check(
        backend,
        arrange(x, layout),
        3,
        randn(12, seed=1),
        randn(12, seed=2),
        scale=randn(2, 12, seed=3),
        shift=randn(2, 12, seed=4),
    )
    # another order of the same sums: a few ulps of float32, on outputs of size 10
    torch.testing.assert_close(arranged, contiguous, rtol=1e-5, atol=1e-5)


def test_channels_last_is_kept(backend):
    x, skip = (randn(2, 8, 6, 5, seed=seed).to(memory_format=torch.channels_last) for seed in (0, 1))
    for result in (
        call(OP, backend, x, 4),
        call(OP, backend, x, 4, skip=skip, pre_bias=randn(16), scale=randn(2, 16), shift=randn(2, 16)),
    ):
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("parameters", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_parameters_of_another_dtype(backend, dtype, parameters):
    x = randn(2, 12, 4, 5, dtype=dtype)
    weight, bias, pre_bias = (randn(12, dtype=parameters, seed=seed) for seed in (1, 2, 3))
    scale, shift = (randn(2, 12, dtype=parameters, seed=seed) for seed in (4, 5))
    check(backend, x, 3, weight, bias, scale=scale, shift=shift, pre_bias=pre_bias)


def test_the_reference_computes_in_the_wider_dtype():
    x, weight, bias = randn(2, 12, 4, 5, dtype=torch.float16), randn(12, seed=1), randn(12, seed=2)
    y = call(OP, "reference", x, 3, weight, bias)
    assert torch.equal(y, call(OP, "reference", x.float(), 3, weight, bias).half())
    assert not torch.equal(y, call(OP, "reference", x, 3, weight.half(), bias.half()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_skip_with_a_group_across_the_seam(backend, layout, dtype):
    x, skip = (
        arrange(randn(2, 5, 4, 3, dtype=dtype), layout),
        arrange(3 + randn(2, 7, 4, 3, dtype=dtype, seed=1), layout),
    )
    check(
        backend, x, 3, randn(12, dtype=dtype, seed=2), randn(12, dtype=dtype, seed=3), skip=skip
    )  # channels 4 to 7 are one group


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skip_channels", [0, 4])
def test_pre_bias_is_added_before_the_statistics(backend, skip_channels, dtype):
    skip = randn(2, skip_channels, 5, 5, dtype=dtype, seed=1) if skip_channels else None
    channels = 8 + skip_channels
    pre_bias = 2 * randn(channels, dtype=dtype, seed=2)
    check(backend, randn(2, 8, 5, 5, dtype=dtype), 2, randn(channels, dtype=dtype), skip=skip, pre_bias=pre_bias)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("given", ["scale", "shift", "both"])
def test_conditioning(backend, given, activation):
    conditioning = {"scale": randn(2, 6, seed=3), "shift": randn(2, 6, seed=4)}
    conditioning = conditioning if given == "both" else {given: conditioning[given]}
    check(backend, randn(2, 6, 4, 4), 2, randn(6, seed=1), randn(6, seed=2), **conditioning, activation=activation)


@pytest.mark.parametrize("rows", ["chunk", "expand", "transposed"])
def test_conditioning_with_any_strides(backend, rows):
    wide = randn(3, 24, seed=1)
    film = {
        "chunk": wide.chunk(2, 1),
        "expand": (wide[:1, :12].expand(3, 12), wide[1:2, 12:].expand(3, 12)),
        "transposed": (randn(12, 3, seed=2).t(), randn(12, 3, seed=3).t()),
    }[rows]
    check(backend, randn(3, 12, 4, 5), 4, scale=film[0], shift=film[1])


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.1])
def test_eps(backend, eps):
    check(backend, randn(2, 6, 4, 4), 2, eps=eps)


@pytest.mark.parametrize("skip", [0, 2])
def test_empty_batch(backend, skip):
    film = {"scale": randn(0, 6 + skip), "shift": randn(0, 6 + skip)}
    result = call(
        OP,
        backend,
        randn(0, 6, 4, 4),
        2,
        randn(6 + skip),
        randn(6 + skip),
        skip=randn(0, skip, 4, 4) if skip else None,
        **film,
    )
    assert result.shape == (0, 6 + skip, 4, 4)
    assert result.dtype == torch.float32


def test_samples_are_independent(backend):
    x = randn(3, 6, 4, 4)
    x[1] = torch.nan
    result = call(OP, backend, x, 2)
    assert result[1].isnan().all()
    torch.testing.assert_close(result[::2], call(OP, backend, x[::2].contiguous(), 2), rtol=0, atol=0)


def test_repeat_is_bit_identical(backend):
    x, weight = randn(2, 64, 16, 16), randn(64, seed=1)
    assert torch.equal(call(OP, backend, x, 8, weight), call(OP, backend, x, 8, weight))


def test_gradients_reach_every_input():
    x, skip = randn(2, 3, 2, 3, dtype=torch.float64), randn(2, 5, 2, 3, dtype=torch.float64, seed=1)
    weight, bias, pre_bias = (randn(8, dtype=torch.float64, seed=seed) for seed in (2, 3, 4))
    scale, shift = (randn(2, 8, dtype=torch.float64, seed=seed) for seed in (5, 6))
    inputs = [t.requires_grad_() for t in (x, weight, bias, scale, shift, skip, pre_bias)]
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, scale, shift, skip, pre_bias: ops.group_norm_silu(
            x, 2, weight, bias, scale=scale, shift=shift, skip=skip, pre_bias=pre_bias
        ),
        inputs,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", [("weight",), ("bias",), ("weight", "bias")], ids="-".join)
def test_gradients_of_the_parameters_alone(names, layout):
    """Where x needs none and has its channels innermost, torch's own backward pass crashes."""
    results = []
    for dtype in (torch.float32, torch.float64):
        parameters = {"weight": randn(12, dtype=dtype, seed=1), "bias": randn(12, dtype=dtype, seed=2)}
        wanted = [parameters[name].requires_grad_() for name in names]
        x = randn(2, 12, 4, 5, dtype=dtype) if dtype == torch.float64 else arrange(randn(2, 12, 4, 5), layout)
        results.append(torch.autograd.grad(ops.group_norm_silu(x, 3, **parameters).square().sum(), wanted))
    for one, truth in zip(*results):
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-5)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_call(data):
    draw = data.draw
    batch, groups = draw(st.integers(0, 3)), draw(st.integers(1, 5))
    channels = groups * draw(st.integers(1, 11))
    first = draw(st.integers(1, channels))
    spatial = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    seed = draw(st.integers(0, 99))

    def maybe(*shape):
        return randn(*shape, dtype=dtype, seed=seed + len(shape)) if draw(st.booleans()) else None

    x = arrange(randn(batch, first, *spatial, dtype=dtype, seed=seed), layout)
    skip = (
        arrange(randn(batch, channels - first, *spatial, dtype=dtype, seed=seed + 1), layout)
        if first < channels
        else None
    )
    kwargs = {"scale": maybe(batch, channels), "shift": maybe(batch, channels), "pre_bias": maybe(channels)}
    kwargs |= {"skip": skip, "activation": draw(st.sampled_from(["silu", None]))}
    weight, bias = maybe(channels), maybe(channels)
    for backend in able(OP, dtype):
        check(backend, x, groups, weight, bias, **kwargs)


X = torch.zeros(2, 8, 4, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.int64)}, ("x", "torch.int64")),
        ({"x": torch.zeros(2, 8)}, ("x", "2 dimensions")),
        ({"x": torch.zeros(1, 8, 1, 1, 1, 1)}, ("x", "6 dimensions")),
        ({"skip": torch.zeros(3, 8, 4, 4)}, ("skip", "(3, 8, 4, 4)")),
        ({"skip": torch.zeros(2, 8, 4, 5)}, ("skip", "(2, 8, 4, 5)")),
        ({"skip": torch.zeros(2, 8, 4)}, ("skip", "(2, 8, 4)")),
        ({"skip": X.half()}, ("skip", "torch.float16")),
        ({"num_groups": 0}, ("num_groups", "0")),
        ({"num_groups": -2}, ("num_groups", "-2")),
        ({"num_groups": 3}, ("num_groups", "3")),
        ({"eps": -1e-5}, ("eps", "-1e-05")),
        ({"eps": float("nan")}, ("eps", "nan")),
        ({"weight": torch.zeros(9)}, ("weight", "(9,)")),
        ({"bias": torch.zeros(2, 8)}, ("bias", "(2, 8)")),
        ({"pre_bias": torch.zeros(7)}, ("pre_bias", "(7,)")),
        ({"scale": torch.zeros(8)}, ("scale", "(8,)")),
        ({"shift": torch.zeros(1, 8)}, ("shift", "(1, 8)")),
        ({"weight": torch.zeros(8, device="meta")}, ("weight", "meta")),
        ({"skip": X.to("meta")}, ("skip", "meta")),
        ({"activation": "relu"}, ("activation", "'relu'")),
        ({"backend": "fast"}, ("backend", "'fast'")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_name_the_argument_and_its_value(change, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        ops.group_norm_silu(**{"x": X, "num_groups": 2, **change})
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
