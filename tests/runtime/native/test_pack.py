from __future__ import annotations

import pytest
import torch

from coalescer_fast.ops import native_library
from coalescer_fast.runtime.native.pack import Weight, Weights, kernel_order
from coalescer_fast.runtime.native.value import Range

pytestmark = pytest.mark.skipif(
    bool(native_library.unavailable()), reason=native_library.unavailable() or "the library is there"
)

LANES = {torch.float32: 1, torch.bfloat16: 2, torch.uint8: 4}


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def plain_order(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What csrc/abi.h says of cf_convolution_args, in torch."""
    lanes, width = LANES[dtype], native_library.vector_width()
    outputs, channels, *kernel = weight.shape
    taps, vectors, units = kernel[0] * kernel[1], -(-outputs // width), -(-channels // lanes)
    rows = torch.zeros(vectors * width, taps, units * lanes, dtype=torch.int8 if dtype == torch.uint8 else dtype)
    rows[:outputs, :, :channels] = weight.permute(0, 2, 3, 1).reshape(outputs, taps, channels)
    blocks = -(-vectors // {16: 4, 8: 2, 4: 3}[width])
    least, larger = divmod(vectors, blocks)
    sizes = [least + (block < larger) for block in range(blocks)]
    parts = torch.split(rows.view(vectors, width, taps, units, lanes), sizes)
    return torch.cat([part.permute(2, 3, 0, 1, 4).reshape(-1) for part in parts])


def random(*shape: int) -> torch.Tensor:
    """Numbers of all magnitudes, subnormal ones and infinity among them, and many halfway between two bfloat16."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-45, 38, shape, generator=generator)
    halfway = (x.view(torch.int32) & ~0xFFFF | 0x8000).view(torch.float32)
    x = torch.where(torch.rand(shape, generator=generator) < 0.3, halfway, x)
    flat = x.view(-1)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.4028235e38, 1e-45, -1e-40, 1.0])
    flat[: len(special)] = special[: flat.numel()]
    return x


def assert_same_bytes(packed: torch.Tensor, expected: torch.Tensor) -> None:
    assert packed.dtype == expected.dtype
    assert packed.shape == expected.shape
    assert torch.equal(packed.view(torch.uint8), expected.view(torch.uint8))


SHAPES = [
    (1, 1, 1, 1),
    (1, 3, 3, 3),
    (16, 4, 1, 1),
    (17, 5, 3, 3),
    (63, 7, 1, 1),
    (64, 130, 3, 3),
    (65, 33, 3, 3),
    (130, 64, 3, 3),
    (193, 700, 1, 1),
    (300, 3, 1, 1),
    (40, 50, 5, 5),
    (24, 6, 1, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_floats(isa, threads, shape, dtype, source):
    weight = random(*shape).to(source)
    assert_same_bytes(kernel_order(weight, dtype), plain_order(weight, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_whole_numbers(isa, threads, shape, source):
    most = native_library.largest_weight()
    weight = torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(1)).to(source)
    assert_same_bytes(kernel_order(weight, torch.uint8), plain_order(weight, torch.uint8))


VIEWS = {
    "channels last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "turned": lambda w: w.transpose(2, 3),
    "reversed": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "with an offset": lambda w: w[3:, 5:],
    "every other": lambda w: w[::2, ::3],
    "expanded": lambda w: w[:, :1].expand(-1, 9, -1, -1),
    "of a larger kernel": lambda w: w[:, :, 1:, :2],
    "not aligned": lambda w: torch.cat([w.flatten(), w.flatten()])[1 : 1 + w.numel()].view(w.shape),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_views(isa, view, dtype, source):
    weight = view(random(70, 29, 3, 3).to(source))
    assert_same_bytes(kernel_order(weight, dtype), plain_order(weight.contiguous(), dtype))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_stays_nan(isa, source):
    weight = torch.full((20, 6, 1, 1), float("nan")).to(source)
    weight.view(torch.int16)[0] |= 1  # whatever bits say so
    for dtype in (torch.float32, torch.bfloat16):
        packed, expected = kernel_order(weight, dtype), plain_order(weight, dtype)
        assert torch.equal(packed.isnan(), expected.isnan())


def test_every_bfloat16_between_two_floats_is_rounded_as_torch_does(isa):
    """All upper halves, with lower halves at and beside the middle."""
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        weight = (upper | lower).view(torch.float32)
        weight = weight[~weight.isnan()].view(-1, 2, 1, 1)
        assert_same_bytes(kernel_order(weight, torch.bfloat16), plain_order(weight, torch.bfloat16))


def named(weight: torch.Tensor) -> Weight:
    """As a parameter of a module."""
    return Weight("weight", tuple(weight.shape), weight.stride(), 0, lambda name: weight)


def plain_quantise(weight: torch.Tensor, of: Range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The formulas of `Weights.quantise`, in torch."""
    step, zero = of.quantisation()
    stepped = weight.float() * step[:, None, None]
    scale = stepped.abs().amax((1, 2, 3)).clamp_min(1e-30) / native_library.largest_weight()
    whole = (stepped / scale[:, None, None, None]).round()
    zeros = (whole.double().sum((2, 3)) * zero.double()).sum(1)
    return plain_order(whole, torch.uint8), scale, (-scale * zeros).float()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_quantise(isa, threads, shape, source):
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator).to(source)
    weight[-1] = 0  # an output without weights
    of = Range(-3 * torch.rand(shape[1], generator=generator), 2 * torch.rand(shape[1], generator=generator))
    for view in (weight, weight.contiguous(memory_format=torch.channels_last)):
        quantised = Weights(torch.bfloat16).quantise(named(view), of)
        for got, expected in zip(quantised, plain_quantise(weight, of), strict=True):
            assert_same_bytes(got, expected)


def test_quantise_rounds_halves_to_even(isa):
    """With the largest weight that there is, and one step, weights are their own whole numbers."""
    most = native_library.largest_weight()
    numbers = torch.arange(-2 * most, 2 * most + 1, dtype=torch.float32) / 2
    weight = numbers.reshape(1, -1, 1, 1)
    of = Range(torch.zeros(weight.shape[1]), torch.full((weight.shape[1],), 255.0))
    packed, scale, _ = Weights(torch.bfloat16).quantise(named(weight), of)
    assert scale.tolist() == [1.0]
    assert_same_bytes(packed, plain_order(numbers.round().view(weight.shape), torch.uint8))
    assert packed.count_nonzero() == numbers.round().count_nonzero() > 0


def test_weights_are_left_as_they_are(isa):
    weight = random(70, 29, 3, 3)
    before = weight.clone()
    for dtype in (torch.float32, torch.bfloat16):
        kernel_order(weight, dtype)
    assert torch.equal(weight.view(torch.int32), before.view(torch.int32))


def test_no_weights_are_refused():
    with pytest.raises(RuntimeError, match="cf_cpu_pack reports an argument that it does not take"):
        kernel_order(torch.empty(0, 4, 1, 1), torch.float32)


@pytest.mark.parametrize("channels", [1, 3, 8, 13, 32, 37])
def test_values_and_gates_by_turns(isa, channels):
    """Half a vector of values, then their gates, with zeros for channels that there are not."""
    own, half = torch.randn(2 * channels, 6, 1, 1), native_library.vector_width() // 2
    for firsts in ((0, channels), (channels, 0)):
        weight = Weight("w", tuple(own.shape), own.stride(), 0, lambda name: own, firsts)
        found = weight.tensor()
        assert found.shape[0] == -(-channels // half) * half * 2
        for row in range(found.shape[0]):
            turn, lane = divmod(row, half)
            channel = turn // 2 * half + lane
            expected = own[firsts[turn % 2] + channel] if channel < channels else torch.zeros_like(own[0])
            assert torch.equal(found[row], expected)
        assert weight.key != Weight("w", tuple(own.shape), own.stride(), 0, lambda name: own).key
