from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from coalescer_fast.models.layers import Convolution, _are_products, of_halves
from coalescer_fast.ops import triton_launch
from coalescer_fast.ops.abi import cf_function
from coalescer_fast.ops.gate import FUSED, gated
from coalescer_fast.ops.kernels.gate.reference import FUNCTIONS

from ..helpers.numerics import randn

# |y - y_ref| / max(1, |y_ref|)
BUDGET = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def exact(x, value, gate, channels, function):
    x = x.double().cpu()
    return x[..., value : value + channels] * FUNCTIONS[function](x[..., gate : gate + channels])


def assert_near(y, expected):
    assert y.shape == expected.shape
    assert float(((y.double().cpu() - expected).abs() / expected.abs().clamp(min=1)).max()) < BUDGET[y.dtype]


@pytest.mark.skipif(not triton_launch.INTERPRETED, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("function", FUSED)
@pytest.mark.parametrize(
    ("shape", "value", "gate", "channels"),
    [((2, 3, 640), 0, 320, 320), ((5, 48), 24, 0, 24), ((1, 2, 3, 30), 7, 20, 9), ((3, 514), 1, 258, 256)],
)
def test_one_pass(monkeypatch, shape, value, gate, channels, function, dtype):
    x = 4 * randn(*shape, dtype=dtype)
    monkeypatch.setitem(FUNCTIONS, function, None)  # two passes would fail
    y = gated(x, value, gate, channels, function, "triton")
    monkeypatch.undo()
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_near(y, exact(x, value, gate, channels, function))


@pytest.mark.skipif(not triton_launch.INTERPRETED, reason="runs in Triton's interpreter")
def test_large_gates_and_no_rows():
    x = torch.tensor([[2.0, 2.0, 2.0, 2.0, -1e4, 1e4, -torch.inf, torch.nan]])
    for function in FUSED:
        y = gated(x, 0, 4, 4, function, "triton")
        assert y[0, :2].tolist() == [0, 2e4]
        assert torch.isnan(y[0, 3])
    assert gated(torch.empty(0, 8), 0, 4, 4, FUSED[0], "triton").shape == (0, 4)
    double = randn(3, 8).double()
    assert torch.equal(gated(double, 0, 4, 4, FUSED[0], "triton"), exact(double, 0, 4, 4, FUSED[0]))


@pytest.mark.skipif(not triton_launch.INTERPRETED, reason="runs in Triton's interpreter")
def test_what_torch_has_to_see_runs_in_torch():
    given = (0, 4, 4, cf_function.CF_GELU, "triton")
    x = randn(3, 8).requires_grad_()
    gated(x, *given).sum().backward()
    own = x.detach().clone().requires_grad_()
    gated(own, *given[:4], "reference").sum().backward()
    assert torch.equal(x.grad, own.grad)
    x, tangent = randn(3, 8), randn(3, 8, seed=1)
    found, expected = (
        torch.func.jvp(lambda x, backend=backend: gated(x, *given[:4], backend), (x,), (tangent,))
        for backend in ("triton", "reference")
    )
    assert all(map(torch.equal, found, expected))
    assert torch.equal(torch.vmap(lambda x: gated(x, *given))(x), gated(x, *given[:4], "reference"))
    assert_near(gated(torch._neg_view(x), *given), exact(-x, *given[:4]))
    with FakeTensorMode():
        assert gated(torch.empty(3, 8), *given).shape == (3, 4)
    with pytest.raises(RuntimeError):  # there are no 6 channels from 4 on
        gated(x, 0, 4, 6, cf_function.CF_GELU, "triton")


@pytest.mark.parametrize("function", cf_function)
def test_two_passes(function):
    x = randn(2, 3, 10)
    for given in (x, x.transpose(0, 1)):
        for backend in ("auto", "reference", "cpu", "cuda"):
            assert_near(gated(given, 1, 6, 4, function, backend), exact(given, 1, 6, 4, function))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("function", FUSED)
def test_gpu_one_pass(monkeypatch, function, dtype):
    x = 4 * randn(3, 7, 2 * 1280, dtype=dtype).cuda()
    expected = exact(x, 0, 1280, 1280, function)
    monkeypatch.setitem(FUNCTIONS, function, None)
    assert_near(gated(x, 0, 1280, 1280, function), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_two_halves(bias):
    for n, size in ((1, (1, 1)), (2, (3, 5))):
        layer = Convolution(10, 7, 1, bias=bias)
        x, skip = randn(n, 4, *size), randn(n, 6, *size, seed=1)
        for given in ((x, skip), [image.to(memory_format=torch.channels_last) for image in (x, skip)]):
            with torch.no_grad():
                y = of_halves(*given, layer.weight, layer.bias)
                torch.testing.assert_close(y, layer(*given))
                assert y.is_contiguous(memory_format=torch.channels_last)


def test_halves_that_are_no_products():
    layer = Convolution(10, 7, 1)
    x, skip = randn(2, 4, 3, 5), randn(2, 6, 3, 5, seed=1)
    assert _are_products(x, skip)
    assert of_halves(x[:0], skip[:0], layer.weight, layer.bias).shape == (0, 7, 3, 5)
    assert not _are_products(x, skip.transpose(2, 3))
    assert not _are_products(x[:1], skip)
    with torch.autocast("cpu", torch.bfloat16):
        assert not _are_products(x, skip)
