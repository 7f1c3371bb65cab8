from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import coalescer_fast as cf
from coalescer_fast.ops import native_library
from coalescer_fast.ops.abi import cf_form
from coalescer_fast.runtime.native import forms
from coalescer_fast.runtime.native.module import runtime_of
from coalescer_fast.runtime.native.pack import Weights, kernel_order
from coalescer_fast.runtime.native.program import Program, compile_module
from coalescer_fast.runtime.native.record import MetaCopy, record_module
from coalescer_fast.runtime.native.steps import Convolution

from ...helpers.isa import available, using
from ...helpers.networks import seeded
from ...helpers.pipelines import tiny_pipeline

pytestmark = pytest.mark.skipif(
    bool(native_library.unavailable()), reason=native_library.unavailable() or "the library is there"
)

WINOGRAD = [cf_form.CF_WINOGRAD_2, cf_form.CF_WINOGRAD_4]
# The root of the mean squared error against float64, relative to that of the outputs. Inputs and weights are rounded to
# the dtype beforehand, and outputs are float32, so that of bfloat16 it is the error of the integers alone: that of
# rounding an output to bfloat16 would be 1.7e-3.
TOLERANCE = {
    (torch.float32, cf_form.CF_WINOGRAD_2): 2e-6,
    (torch.float32, cf_form.CF_WINOGRAD_4): 5e-6,
    (torch.bfloat16, cf_form.CF_WINOGRAD_2): 4e-4,
    (torch.bfloat16, cf_form.CF_WINOGRAD_4): 1.2e-3,
}


ABLE = [(isa, "float32") for isa in available()] + [("avx512_bf16", "bfloat16")] * ("avx512_bf16" in available())


@pytest.fixture(params=ABLE, ids="-".join)
def dtype(request):
    """One that is multiplied by an instruction set, which is in use."""
    isa, name = request.param
    with using(isa):
        yield getattr(torch, name)


@pytest.fixture(params=WINOGRAD, ids=lambda form: form.name)
def form(request, monkeypatch):
    """The form that is the fastest one whatever the sizes."""
    monkeypatch.setattr(forms, "seconds", lambda form, *sizes: 0.0 if form == request.param else 1.0)
    return request.param


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def convolution(channels: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> nn.Conv2d:
    network = seeded(nn.Conv2d(channels, outputs, 3, padding=1, bias=bias))
    network.weight.data = network.weight.data.to(dtype).float()
    return network


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def error(network: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> float:
    x = x.to(dtype).float()
    (y,) = compile_module(network, [x], dtype)(x)
    exact = network.double()(x.double()).detach()
    network.float()
    assert y.shape == exact.shape
    return rms(y - exact) / rms(exact)


def forms_of(network: nn.Module, x: torch.Tensor, weights: Weights) -> list[cf_form]:
    recording = record_module(MetaCopy(network), lambda twin, recorder: [twin(recorder.given(x))])
    forms.choose_forms(recording, weights)
    return [step.form for step in recording.steps if isinstance(step, Convolution)]


# edges that are no multiple of a tile, fewer channels than a vector, several chunks of channels, several blocks
SIZES = [
    (1, 4, 16, 8, 8),
    (2, 3, 5, 7, 5),
    (3, 17, 33, 1, 1),
    (1, 70, 130, 2, 3),
    (1, 96, 96, 13, 11),
    (5, 8, 200, 12, 12),
    (1, 330, 24, 6, 9),
    (1, 650, 20, 4, 4),
    (2, 40, 72, 33, 30),
]


@pytest.mark.parametrize(("n", "channels", "outputs", "height", "width"), SIZES)
def test_sizes(dtype, form, n, channels, outputs, height, width):
    network = convolution(channels, outputs, dtype)
    assert error(network, randn(n, channels, height, width), dtype) <= TOLERANCE[dtype, form]


@pytest.mark.parametrize(
    "kind", ["off-centre", "an outlier", "outlying channels", "huge", "tiny", "constant", "sparse"]
)
def test_numbers(dtype, form, kind):
    x = randn(2, 64, 14, 13)
    if kind == "off-centre":
        x += 1000
    elif kind == "an outlier":
        x[0, 3, 5, 5] = 100
    elif kind == "outlying channels":
        x[:, ::16] *= 100
    elif kind == "huge":
        x *= 1e15
    elif kind == "tiny":
        x *= 1e-15
    elif kind == "constant":
        x = torch.full_like(x, 3)
    else:
        x *= randn(2, 64, 14, 13, seed=1) > 2
    assert error(convolution(64, 48, dtype, bias=False), x, dtype) <= TOLERANCE[dtype, form]


@pytest.mark.parametrize("factor", [10, 30, 100, 300, 1000])
def test_channels_of_small_numbers_and_large_weights(dtype, form, factor):
    network, x = convolution(128, 48, dtype, bias=False), randn(1, 128, 9, 10)
    network.weight.data[:, :64] *= factor
    network.weight.data[:, 5] = 0
    x[:, :64] /= factor
    network.weight.data = network.weight.data.to(dtype).float()
    assert error(network, x, dtype) <= TOLERANCE[dtype, form]


def test_channels_whose_weights_hardly_differ_are_left_as_they_are():
    """Balances are relative to a mean: no norm of an ordinary network lies at the edge of two powers of two."""
    if "avx512_bf16" not in available():
        pytest.skip("no images of bfloat16 are multiplied here")
    with using("avx512_bf16"):
        for channels in (16, 320):
            for scale in (0.7, 1.0, 1.4):
                weight = scale * randn(32, channels, 3, 3)
                balances = kernel_order(weight, torch.bfloat16, WINOGRAD[1])[-2 * channels :].view(torch.float32)
                assert (balances == 1 / 32).all()


@pytest.mark.parametrize("size", [1e-32, 1e-24, 1e-20, 1e18, 1e22, 1e30, 1e37])
@pytest.mark.parametrize("where", ["image", "weight"])
def test_the_range_of_bfloat16(form, where, size):
    if "avx512_bf16" not in available():
        pytest.skip("no images of bfloat16 are multiplied here")
    with using("avx512_bf16"):
        network, x = convolution(64, 48, torch.bfloat16, bias=False), randn(2, 64, 14, 13)
        if where == "image":
            x *= size
        else:
            network.weight.data = (min(size, 1e30) * network.weight.data).to(torch.bfloat16).float()
        assert error(network, x, torch.bfloat16) <= TOLERANCE[torch.bfloat16, form]


def test_zeros_are_exact(dtype, form):
    network = convolution(20, 17, dtype)
    x = torch.zeros(1, 20, 9, 9)
    (y,) = compile_module(network, [x], dtype)(x)
    assert torch.equal(y, network.bias.detach()[:, None, None].expand_as(y[0])[None])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["image", "weight"])
def test_not_finite_numbers_show(dtype, form, bad, where):
    network, x = convolution(40, 24, dtype), randn(2, 40, 9, 10)
    if where == "image":
        x[1, 33, 4, 5] = bad
    else:
        network.weight.data[7, 2, 1, 1] = bad
    (y,) = compile_module(network, [x], dtype)(x)
    exact = network(x)
    assert not y[~exact.isfinite()].isfinite().any()
    if where == "image":
        assert y[0].isfinite().all()


def test_bits_depend_on_an_image_alone(dtype, form):
    network, x = convolution(48, 80, dtype), randn(7, 48, 19, 18)
    (alone,) = compile_module(network, [x[3:4]], dtype)(x[3:4])
    (together,) = compile_module(network, [x], dtype)(x)
    assert torch.equal(alone[0], together[3])


@pytest.mark.parametrize("sides", [(6, 6), (40, 37)])
def test_bits_do_not_depend_on_threads(dtype, form, sides):
    network, x = convolution(48, 80, dtype), randn(2, 48, *sides)

    def run(threads: int) -> torch.Tensor:
        recording = record_module(MetaCopy(network), lambda twin, recorder: [twin(recorder.given(x))])
        made = Program(recording, Weights(dtype), threads)
        made.inputs[0].copy_(x)
        made.run()
        return made.outputs[0].clone()

    expected = run(1)
    for threads in (2, 3, 8):
        assert torch.equal(run(threads), expected)


class Block(nn.Module):
    """All that follows or precedes a convolution inside its step."""

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.one = nn.Conv2d(channels, outputs, 3, padding=1)
        self.two = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.one(x) + row[:, :, None, None])
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        return self.two(h) + h


def test_what_is_joined(dtype, form):
    network, x, row = seeded(Block(20, 33)), randn(2, 20, 7, 6), randn(2, 33)
    (y,) = compile_module(network, [x, row], dtype)(x, row)
    exact = network.double()(x.double(), row.double()).detach()
    # of bfloat16, images between the two are rounded
    assert rms(y - exact) / rms(exact) <= (8e-3 if dtype == torch.bfloat16 else 5e-6)


class Doubled(nn.Module):
    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.before = nn.Conv2d(channels, channels, 1)
        self.after = nn.Conv2d(channels, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(F.interpolate(self.before(x), scale_factor=2.0, mode="nearest"))


@pytest.mark.parametrize("sides", [(1, 1), (5, 7), (8, 4)])
def test_a_nearest_upsampling_is_read_in_place(dtype, form, sides):
    network, x = seeded(Doubled(12, 20)), randn(2, 12, *sides)
    recording = record_module(MetaCopy(network), lambda twin, recorder: [twin(recorder.given(x))])
    forms.choose_forms(recording, Weights(dtype))
    assert [type(step) for step in recording.steps] == [Convolution, Convolution]
    (y,) = compile_module(network, [x], dtype)(x)
    exact = network.double()(x.double()).detach()
    assert rms(y - exact) / rms(exact) <= (6e-3 if dtype == torch.bfloat16 else 5e-6)


def test_an_upsampling_that_others_read_stays(form):
    class Both(Doubled):
        def forward(self, x):
            h = F.interpolate(self.before(x), scale_factor=2.0, mode="nearest")
            return self.after(h) + h

    network, x = seeded(Both(12, 12)), randn(1, 12, 5, 4)
    (y,) = compile_module(network, [x])(x)
    torch.testing.assert_close(y, network(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "a part"])
@pytest.mark.parametrize("of", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_weights_do_not_depend_on_their_layout(dtype, form, layout, of):
    weight = randn(37, 22, 3, 3).to(torch.bfloat16).to(of)
    expected = kernel_order(weight.float(), dtype, form)
    if layout == "channels_last":
        weight = weight.contiguous(memory_format=torch.channels_last)
    elif layout == "a part":
        weight = torch.cat([torch.zeros_like(weight), weight], 1)[:, 22:]
    assert torch.equal(kernel_order(weight, dtype, form), expected)


# The choice


def network_of_two() -> nn.Module:
    return seeded(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 128, 3, padding=1)))


def test_the_fastest_form_within_the_memory(monkeypatch):
    x = randn(1, 64, 16, 16)
    speeds = {cf_form.CF_DIRECT: 4.0, cf_form.CF_WINOGRAD_2: 2.0, cf_form.CF_WINOGRAD_4: 1.0}
    monkeypatch.setattr(forms, "seconds", lambda form, dtype, positions, channels, outputs: speeds[form] * outputs)

    def chosen(memory: int | None) -> list[cf_form]:
        return forms_of(network_of_two(), x, Weights(torch.float32, memory))

    small, large = 64 * 64 * 4, 64 * 128 * 4  # bytes of weights for each tap
    assert chosen(None) == [cf_form.CF_WINOGRAD_4] * 2
    assert chosen(0) == [cf_form.CF_DIRECT] * 2
    # a byte of F(2x2) saves more than one of F(4x4)
    assert chosen(7 * (small + large)) == [cf_form.CF_WINOGRAD_2] * 2
    assert chosen(7 * (small + large) + 20 * small) == [cf_form.CF_WINOGRAD_4, cf_form.CF_WINOGRAD_2]
    assert chosen(27 * (small + large) - 1) != [cf_form.CF_WINOGRAD_4] * 2


def test_the_choice_does_not_depend_on_the_batch():
    weights = Weights(torch.float32)
    for sides in (4, 16, 64):
        one, many = (forms_of(network_of_two(), randn(n, 64, sides, sides), weights) for n in (1, 16))
        assert one == many


def test_small_images_are_direct():
    assert forms_of(network_of_two(), randn(1, 64, 1, 1), Weights(torch.float32)) == [cf_form.CF_DIRECT] * 2


@pytest.mark.parametrize("name", available()[1:])
def test_every_instruction_set_was_measured(name):
    for dtype in ("float32", *(["bfloat16"] if name == "avx512_bf16" else [])):
        assert set(forms.speeds(name, dtype)) == set(cf_form)
        assert all(speed.gflops > 0 for speeds in forms.speeds(name, dtype).values() for speed in speeds)


def test_a_stride_or_another_kernel_is_direct(form):
    network = seeded(nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1)))
    assert forms_of(network, randn(1, 8, 8, 8), Weights(torch.float32)) == [cf_form.CF_DIRECT] * 2


@pytest.mark.parametrize("first", [4, 16])
@pytest.mark.parametrize("name", ["float32", "int8"])
def test_freed_weights_stay_in_the_form_that_they_were_packed_in(monkeypatch, first, name):
    """Images of another size would have another form."""

    def seconds(form: cf_form, dtype: str, positions: int, channels: int, outputs: int) -> float:
        return float(form != (cf_form.CF_WINOGRAD_4 if positions > 100 else cf_form.CF_DIRECT))

    monkeypatch.setattr(forms, "seconds", seconds)
    layers = [nn.Conv2d(8, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1)]
    module = seeded(nn.Sequential(*layers))
    images = {sides: randn(1, 8, sides, sides) for sides in (4, 16)}
    with torch.no_grad():
        expected = {sides: module(x) for sides, x in images.items()}
        given = {"inputs": [(x,) for x in images.values()]} if name == "int8" else {}
        cf.accelerate(module, dtype=name, keep_weights=False, **given)
        for sides in (first, 20 - first):
            y = module(images[sides])
            assert not runtime_of(module).refused
            assert rms(y - expected[sides]) / rms(expected[sides]) < (0.03 if name == "int8" else 5e-6)
    assert runtime_of(module).freed


def test_the_memory_is_given_to_accelerate_and_shown_by_explain(form):
    def described(**given: int) -> str:
        module, x = (
            seeded(nn.Sequential(nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1))),
            randn(1, 8, 8, 8),
        )
        cf.accelerate(module, dtype="float32", **given)
        with torch.no_grad():
            module(x)
        return cf.explain(module)

    points, name = (form + 2) ** 2, f"F({int(form)}x{int(form)})"
    size = (8 + 64) * 64 * 4 * points
    words = f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"
    assert f"2 of 2 3x3 convolutions by Winograd (2 {name}; weights {words}) " in described()
    some = described(winograd_memory=(points - 9) * 64 * 8 * 4)
    assert f"1 of 2 3x3 convolutions by Winograd (1 {name}; weights {8 * 64 * 4 * points >> 10} KiB), " in some
    assert "), 1 direct (1 by the memory limit) " in some
    assert ", 2 3x3 convolutions direct (2 by the memory limit) " in described(winograd_memory=0)


def test_explain_says_why_convolutions_are_direct(monkeypatch):
    monkeypatch.setattr(
        forms, "seconds", lambda form, dtype, positions, *sizes: float((form == cf_form.CF_DIRECT) == (positions > 16))
    )
    layers = [
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 1),
    ]
    module = cf.accelerate(seeded(nn.Sequential(*layers)), dtype="float32")
    with torch.no_grad():
        module(randn(1, 8, 8, 8))
    assert "1 of 3 3x3 convolutions by Winograd (1 F(" in cf.explain(module)
    assert "), 2 direct (1 by measured speed, 1 strided) " in cf.explain(module)


@pytest.mark.parametrize("wrong", [-1, 1e9, "1GB", True])
def test_a_limit_that_is_no_number_of_bytes(wrong):
    for x in (nn.Linear(2, 2), tiny_pipeline()):
        with pytest.raises(ValueError, match="winograd_memory is") as caught:
            cf.accelerate(x, winograd_memory=wrong)
        assert str(caught.value) == f"winograd_memory is {wrong!r}; expected a whole number of bytes, 0 or more"
