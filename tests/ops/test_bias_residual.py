from __future__ import annotations

import pytest
import torch

from coalescer_fast import ops

from ..helpers.drawn import given, settings, st
from ..helpers.numerics import DTYPES, INPUTS, LAYOUTS, able, arrange, call, make, randn
from ..helpers.rules.bias_residual import OP, check


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(backend, kind, dtype):
    x, residual = make(kind, 2, 6, 5, 3, dtype=dtype), make(kind, 2, 6, 5, 3, dtype=dtype, seed=1)
    check(backend, x, randn(6, dtype=dtype, seed=2), residual)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("spatial", [(7,), (1, 1), (4, 5), (2, 3, 4)], ids=str)
def test_layouts(backend, spatial, layout, other):
    check(
        backend, arrange(randn(2, 6, *spatial), layout), randn(6, seed=1), arrange(randn(2, 6, *spatial, seed=2), other)
    )


def test_channels_last_is_kept(backend):
    x, residual = (randn(2, 8, 6, 5, seed=seed).to(memory_format=torch.channels_last) for seed in (0, 1))
    for args in ((x,), (x, randn(8)), (x, None, residual), (x, randn(8), residual)):
        assert call(OP, backend, *args).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameter", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bias_of_another_dtype(backend, parameter, dtype):
    check(
        backend,
        randn(2, 6, 4, 5, dtype=dtype),
        randn(6, dtype=parameter, seed=1),
        randn(2, 6, 4, 5, dtype=dtype, seed=2),
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
def test_result_is_a_new_tensor(backend, residual, bias):
    x = randn(2, 6, 4, 4)
    result = call(OP, backend, x, randn(6) if bias else None, randn(2, 6, 4, 4, seed=1) if residual else None)
    assert result.data_ptr() != x.data_ptr()
    assert torch.equal(call(OP, backend, x), x)


def test_no_space_and_empty_batch(backend):
    check(backend, randn(3, 6), randn(6, seed=1), randn(3, 6, seed=2))
    assert check(backend, randn(0, 6, 4, 4), randn(6, seed=1), randn(0, 6, 4, 4)).shape == (0, 6, 4, 4)


def test_gradients_reach_every_input():
    inputs = [randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3, 2, 2), (3,), (2, 3, 2, 2))]
    assert torch.autograd.gradcheck(ops.bias_residual, inputs)


@given(
    shape=st.lists(st.integers(0, 5), min_size=2, max_size=5),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    bias=st.booleans(),
    residual=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_call(shape, dtype, layout, bias, residual):
    x = randn(*shape, dtype=dtype)
    for backend in able(OP, dtype):
        check(
            backend,
            arrange(x, layout) if len(shape) > 2 else x,
            randn(shape[1], dtype=dtype, seed=1) if bias else None,
            randn(*shape, dtype=dtype, seed=2) if residual else None,
        )


X = torch.zeros(2, 8, 4, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": X.long()}, ("x", "torch.int64")),
        ({"x": torch.zeros(8)}, ("x", "1 dimensions")),
        ({"bias": torch.zeros(4)}, ("bias", "(4,)")),
        ({"bias": torch.zeros(1, 8)}, ("bias", "(1, 8)")),
        ({"bias": torch.zeros(8, device="meta")}, ("bias", "meta")),
        ({"residual": torch.zeros(1, 8, 4, 4)}, ("residual", "(1, 8, 4, 4)")),
        ({"residual": X.double()}, ("residual", "torch.float64")),
        ({"residual": X.to("meta")}, ("residual", "meta")),
        ({"backend": "fast"}, ("backend", "'fast'")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_name_the_argument_and_its_value(change, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        ops.bias_residual(**{"x": X, **change})
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
