"""The step ATTENTION alone, against float64: lengths around the sizes of blocks, masks, biases, hard numbers.

What networks do with it is in test_program.py and test_diffusers_networks.py.
"""

import ctypes
import math

import pytest
import torch

from coalescer_fast.ops import native_library
from coalescer_fast.ops.abi import cf_heads, cf_program_args, cf_step
from coalescer_fast.runtime.native.pack import CODES
from coalescer_fast.runtime.native.steps import Attention, cf_attention_args

NAN, INF = math.nan, math.inf


def dtypes():
    """Those that the instruction set in use multiplies."""
    return [each for each in native_library.products() if each != torch.uint8]


def heads_of(t):
    return cf_heads(data=t.data_ptr(), sample=t.stride(0), head_stride=t.stride(1), row=t.stride(2))


def attend(q, k, v, bias=None, mask=None, scale=None, threads=1):
    """y (n, heads, length, width) of the step; q, k and v (n, heads, length, width), the mask (n, k_length)."""
    n, heads, length, width = q.shape
    y = torch.full((n, length, heads, width), NAN, dtype=q.dtype)
    mask = None if mask is None else mask.contiguous()
    arguments = cf_attention_args(
        q=heads_of(q),
        k=heads_of(k),
        v=heads_of(v),
        bias=None if bias is None else heads_of(bias),
        mask=None if mask is None else mask.data_ptr(),
        y=y.data_ptr(),
        dtype=CODES[q.dtype],
        n=n,
        heads=heads,
        length=length,
        k_length=k.shape[2],
        width=width,
        scale=width**-0.5 if scale is None else scale,
        quantisation=None,
    )
    step = cf_step(kind=Attention.number, args=ctypes.addressof(arguments))
    program = cf_program_args.pack(steps=ctypes.addressof(step), count=1, threads=threads)
    native_library.function("cf_cpu_run")(program)
    return y.transpose(1, 2)


def exact(q, k, v, bias=None, mask=None, scale=None):
    """The same in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -INF)
    return scores.softmax(-1) @ v


def tensors(n, heads, length, keys, width, dtype, scale=1.0):
    """q, k and v whose heads lie beside each other in every row."""
    generator = torch.Generator().manual_seed(length + 31 * keys + 997 * width)

    def drawn(rows, factor):
        rows = torch.randn(n, rows, heads, width, generator=generator, dtype=torch.float32)
        return (factor * rows).to(dtype).transpose(1, 2)

    return drawn(length, scale), drawn(keys, 1), drawn(keys, 1)


def assert_near(y, expected, dtype, name=""):
    """In proportion to the size of the values, which the weights of the softmax share among them."""
    error = float((y.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3))
    assert error <= (0.012 if dtype == torch.bfloat16 else 4e-6), (name, error)


@pytest.mark.parametrize("width", [2, 40, 64, 80, 160])
@pytest.mark.parametrize("keys", [1, 5, 77, 130, 575, 576, 577, 1000])
def test_lengths_and_widths(isa, keys, width):
    for dtype in dtypes():
        q, k, v = tensors(2, 2, 13, keys, width, dtype)
        assert_near(attend(q, k, v), exact(q, k, v), dtype)


def test_many_positions(isa):
    for dtype in dtypes():
        q, k, v = tensors(1, 1, 4097, 4097, 40, dtype)
        some = torch.tensor([0, 1, 95, 96, 97, 2048, 4096])
        assert_near(attend(q, k, v, threads=2)[:, :, some], exact(q[:, :, some], k, v), dtype)


@pytest.mark.parametrize("keys", [5, 77, 1500])
def test_masks_and_biases(isa, keys):
    for dtype in dtypes():
        q, k, v = tensors(3, 2, 11, keys, 32, dtype)
        mask = torch.rand(3, keys, generator=torch.Generator().manual_seed(1), dtype=torch.float32) < 0.5
        mask[:, 0] = True
        mask[1, : keys - 1], mask[1, keys - 1] = False, True  # the last block alone
        mask[2, 1:] = False  # the first block alone
        bias = torch.randn(1, 2, 11, keys, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
        wide = bias.expand(3, -1, -1, -1)
        assert_near(attend(q, k, v, mask=mask), exact(q, k, v, mask=mask), dtype, "mask")
        assert_near(attend(q, k, v, bias=wide), exact(q, k, v, wide), dtype, "bias")
        assert_near(attend(q, k, v, wide, mask), exact(q, k, v, wide, mask), dtype, "both")


@pytest.mark.parametrize("keys", [7, 700])
def test_rows_without_keys_are_zero(isa, keys):
    for dtype in dtypes():
        q, k, v = tensors(2, 2, 9, keys, 32, dtype)
        mask = torch.ones(2, keys, dtype=torch.bool)
        mask[1] = False
        y = attend(q, k, v, mask=mask)
        assert torch.equal(y[1], torch.zeros_like(y[1]))
        assert_near(y[:1], exact(q[:1], k[:1], v[:1]), dtype)
        bias = torch.zeros(2, 2, 9, keys, dtype=torch.float32)
        bias[:, :, 3] = -INF
        assert torch.equal(attend(q, k, v, bias)[:, :, 3], torch.zeros_like(y[:, :, 3]))


@pytest.mark.parametrize("keys", [7, 700])
@pytest.mark.parametrize("lowest", [-1e4, torch.finfo(torch.float32).min])
def test_biases_that_stand_for_masks(isa, keys, lowest):
    """The lowest number for all keys of a row leaves them alike, as it does in PyTorch."""
    for dtype in dtypes():
        q, k, v = tensors(1, 2, 9, keys, 32, dtype)
        bias = torch.zeros(1, 2, 9, keys, dtype=torch.float32)
        bias[..., : keys // 2] = lowest
        assert_near(attend(q, k, v, bias), exact(q, k, v, bias), dtype)
        bias[:] = torch.finfo(torch.float32).min
        assert_near(attend(q, k, v, bias), v.double().mean(2, keepdim=True).expand(q.shape), dtype)


@pytest.mark.parametrize("keys", [7, 700])
@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
def test_scores_of_any_size(isa, keys, scale):
    """One key has nearly all the weight, wherever it is, or all have the same."""
    for dtype in dtypes():
        q, k, v = tensors(1, 2, 14, keys, 32, dtype)
        y, expected = attend(q, k, v, scale=scale), exact(q, k, v, scale=scale)
        scores = (q.double() @ k.double().transpose(-1, -2) * scale).sort(-1).values
        clear = scores[..., -1] - scores[..., -2] > 20 if scale else torch.ones_like(scores[..., 0], dtype=torch.bool)
        assert clear.float().mean() > 0.9
        assert_near(y[clear], expected[clear], dtype)


@pytest.mark.parametrize("rising", [True, False])
def test_the_largest_score_may_come_at_any_time(isa, rising):
    for dtype in dtypes():
        q, k, v = tensors(1, 1, 8, 2000, 16, dtype)
        order = (q[:, :, :1].double() @ k.double().transpose(-1, -2)).flatten().argsort(descending=not rising)
        k, v = k[:, :, order].clone(), v[:, :, order].clone()
        for scale in (0.25, 3.0):
            assert_near(attend(q, k, v, scale=scale), exact(q, k, v, scale=scale), dtype)


@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("key", [0, 300, 699])
def test_what_is_not_finite_stays_so(isa, number, key):
    for dtype in dtypes():
        q, k, v = tensors(1, 2, 9, 700, 32, dtype)
        wrong = v.clone()
        wrong[0, 0, key, 5] = number
        y = attend(q, k, wrong)
        assert not y[0, 0, :, 5].isfinite().any()
        assert y[0, 1].isfinite().all()
        assert y[0, 0, :, :5].isfinite().all()
        wrong = k.clone()
        wrong[0, 0, key] = number
        y = attend(q, wrong, v)  # products of both signs give NaN
        assert y[0, 0].isnan().all()
        assert y[0, 1].isfinite().all()
        wrong = q.clone()
        wrong[0, 0, 4] = number
        y = attend(wrong, k, v)
        assert y[0, 0, 4].isnan().all()
        assert y[0, 0, torch.arange(9) != 4].isfinite().all()
        mask = torch.ones(1, 700, dtype=torch.bool)
        mask[0, key] = False
        wrong = k.clone()
        wrong[0, 0, key] = number
        assert torch.equal(attend(q, wrong, v, mask=mask), attend(q, k, v, mask=mask))  # a masked key does not matter


def test_bits_depend_on_the_row_and_its_keys_alone(isa):
    for dtype in dtypes():
        q, k, v = tensors(3, 3, 211, 601, 40, dtype)
        y = attend(q, k, v)
        assert torch.equal(y, attend(q, k, v, threads=2))
        assert torch.equal(y, attend(q, k, v, threads=5))
        assert torch.equal(y[1:2], attend(q[1:2], k[1:2], v[1:2]))
        assert torch.equal(y[:, 2:], attend(q[:, 2:], k[:, 2:], v[:, 2:]))
        assert torch.equal(y[:, :, 100:107], attend(q[:, :, 100:107], k, v))
