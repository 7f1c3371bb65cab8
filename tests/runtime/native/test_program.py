from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import nn

from coalescer_fast import ops
from coalescer_fast.models import CoalescerUNet
from coalescer_fast.models.unet import SelfAttention, TransformerBlock
from coalescer_fast.ops import native_library
from coalescer_fast.runtime.native.module import floats_of
from coalescer_fast.runtime.native.pack import Weights
from coalescer_fast.runtime.native.program import Layout, Program, ProgramCache, Ranges, compile_module
from coalescer_fast.runtime.native.record import MetaCopy, Recorder, record_module
from coalescer_fast.runtime.native.steps import Convolution, Gather, GroupNormSiLU, Pointwise, Step
from coalescer_fast.runtime.native.value import Range, Unsupported

from ...helpers.isa import EIGHT_BITS, available, using
from ...helpers.networks import seeded

pytestmark = pytest.mark.skipif(
    bool(native_library.unavailable()), reason=native_library.unavailable() or "the library is there"
)

DTYPES = {"avx512_bf16": ["float32", "bfloat16"]}
ABLE = [(isa, dtype) for isa in available() for dtype in DTYPES.get(isa, ["float32"])]
BEST = [dtype for isa, dtype in ABLE if isa == available()[-1]]
# 8 bits with bfloat16 between
needs_int8 = pytest.mark.skipif(
    torch.bfloat16 not in native_library.products(), reason="the processor does not multiply bfloat16"
)
# relative to the largest element, of sums in float32; weights and inputs are rounded to bfloat16 beforehand
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-6}


@pytest.fixture(params=ABLE, ids="-".join)
def able(request):
    best = native_library.isa()
    native_library.set_isa(request.param[0])
    yield getattr(torch, request.param[1])
    native_library.set_isa(best)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def program(
    network: nn.Module, *inputs: torch.Tensor, dtype: torch.dtype, threads: int = 2, call=None, **kwargs
) -> Program:
    def run(twin, recorder: Recorder):
        given = [recorder.input(x, image=x.ndim == 4) for x in inputs]
        results = (call or (lambda network, *args: network(*args)))(twin, *given)
        return results if isinstance(results, tuple) else (results,)

    made = Program(record_module(MetaCopy(network), run), Weights(dtype), threads, **kwargs)
    for mine, x in zip(made.inputs, inputs):
        mine.copy_(x)
    return made


def results(network: nn.Module, *inputs: torch.Tensor, **kwargs) -> list[torch.Tensor]:
    made = program(network, *inputs, **kwargs)
    made.run()
    return [y.clone() for y in made.outputs]


def rounded(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """With weights of convolutions that the dtype holds exactly."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data = module.weight.data.to(dtype).float()
    return network


def assert_near(y: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert y.dtype == torch.float32
    assert y.shape == exact.shape
    assert float((y.double() - exact).abs().max()) <= tolerance * float(exact.abs().max())


@pytest.mark.parametrize(
    ("n", "channels", "outputs", "height", "width", "kernel", "stride"),
    [
        (1, 4, 16, 8, 8, 3, 1),
        (2, 3, 5, 7, 5, 3, 1),
        (3, 17, 33, 1, 1, 3, 1),
        (1, 70, 130, 2, 3, 3, 1),
        (2, 32, 48, 9, 6, 3, 2),
        (1, 16, 20, 1, 1, 3, 2),
        (2, 33, 65, 5, 4, 1, 1),
        (1, 96, 96, 13, 11, 3, 1),
        (5, 8, 200, 12, 12, 3, 1),
        (1, 24, 7, 6, 6, 1, 2),
    ],
)
def test_convolution(able, n, channels, outputs, height, width, kernel, stride):
    network = rounded(seeded(nn.Conv2d(channels, outputs, kernel, stride, kernel // 2)), able)
    x = randn(n, channels, height, width).to(able).float()
    (y,) = results(network, x, dtype=able)
    assert_near(y, network.double()(x.double()), TOLERANCE[str(able).removeprefix("torch.")])


class Decoder(nn.Module):
    """Residual blocks with ReLUs, a shortcut, upsampling: all joins of a convolution."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(6, 24, 3, padding=1),
            nn.ReLU(),
            AutoencoderTinyBlock(24, 24, "relu"),
            AutoencoderTinyBlock(24, 18, "relu"),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(18, 12, 3, padding=1, bias=False),
        )

    def forward(self, x):
        return self.layers(x)


def test_decoder(able):
    network, x = seeded(Decoder()), randn(3, 6, 5, 4)
    (y,) = results(network, x, dtype=able)
    assert_near(y, network.double()(x.double()), 2e-6 if able == torch.float32 else 0.02)


class Gated(nn.Module):
    """A linear layer or a 1x1 convolution, whose one half gates the other."""

    def __init__(self, product: nn.Module, function, gate_first: bool = False):
        super().__init__()
        self.product, self.function, self.gate_first = product, function, gate_first

    def forward(self, x):
        value, gate = self.product(x).chunk(2, 1 if x.ndim == 4 else -1)
        if self.gate_first:
            value, gate = gate, value
        return value * self.function(gate)


GATES = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("function", GATES)
@pytest.mark.parametrize(("channels", "outputs"), [(12, 1), (20, 7), (33, 16), (64, 24), (40, 100), (8, 161)])
def test_gated_product(able, channels, outputs, function):
    """All of it is one step, whose result is rounded once."""
    for image, bias, gate_first in [(False, True, False), (False, False, True), (True, True, True)]:
        product = nn.Conv2d(channels, 2 * outputs, 1, bias=bias) if image else nn.Linear(channels, 2 * outputs, bias)
        network = Gated(rounded(seeded(product), able), GATES[function], gate_first)
        x = randn(2, channels, 3, 5) if image else randn(2, 9, channels)
        x = (4 * x).to(able).float()
        x.view(-1)[0] = 0
        assert [type(step) for step in recorded_steps(network, x)] == [Convolution]
        (y,) = results(network, x, dtype=able)
        assert_near(y, copy.deepcopy(network).double()(x.double()), 5e-6)
        if not image:
            alone, one = results(network, x[1:], dtype=able, threads=1), results(network, x, dtype=able, threads=1)
            assert torch.equal(alone[0], y[1:])
            assert torch.equal(one[0], y)


def recorded_steps(network, x):
    return record_module(MetaCopy(network), lambda twin, recorder: [twin(recorder.input(x, image=x.ndim == 4))]).steps


def test_gate_of_what_is_not_finite(able):
    network = Gated(seeded(nn.Linear(8, 48)), F.gelu)
    x = randn(1, 5, 8)
    x[0, 1, 3], x[0, 2, 3], x[0, 3, 3] = float("nan"), float("inf"), -float("inf")
    (y,) = results(network, x, dtype=able)
    assert y[0, [0, 4]].isfinite().all()
    assert y[0, 1].isnan().all()
    exact = network(x)
    assert not y[0, 2:4][~exact[0, 2:4].isfinite()].isfinite().any()


class ReadTwice(nn.Module):
    """Gates that are no part of the product: somebody else reads it, or they are not its halves."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.product = kind, nn.Linear(16, 48)

    def forward(self, x):
        h = self.product(x)
        value, gate = h.chunk(2, -1)
        if self.kind == "read":
            return value * F.gelu(gate), h
        if self.kind == "added to":
            return (value * F.gelu(gate) + gate,)
        if self.kind == "a third":
            return (h[..., :16] * F.gelu(h[..., 16:32]),)
        return (value * F.gelu(value),)


@pytest.mark.parametrize("kind", ["read", "added to", "a third", "itself"])
def test_gates_that_stay(able, kind):
    network, x = rounded(seeded(ReadTwice(kind)), able), randn(2, 5, 16).to(able).float()
    found = results(network, x, dtype=able)
    for y, exact in zip(found, network.double()(x.double()), strict=True):
        assert_near(y, exact, 5e-6 if able == torch.float32 else 0.02)


class Attention(nn.Module):
    """With a mask, keys of another length, and heads that share rows."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.q, self.kv = heads, nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, x, tokens, mask):
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.kv(tokens).chunk(2, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
        return y.transpose(1, 2).flatten(2)


class Last(nn.Module):
    """A network, then a linear layer, whose result is float32."""

    def __init__(self, network: nn.Module, width: int):
        super().__init__()
        self.network, self.linear = network, nn.Linear(width, width)

    def forward(self, *inputs):
        return self.linear(self.network(*inputs))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("n", "length", "keys", "width", "heads"),
    [(2, 9, 9, 32, 2), (1, 1, 5, 8, 1), (3, 20, 33, 48, 4), (1, 64, 77, 40, 1)],
)
def test_attention(able, n, length, keys, width, heads, masked):
    network = seeded(Last(Attention(width, heads), width))
    x, tokens = randn(n, length, width), randn(n, keys, width, seed=1)
    mask = (torch.arange(keys) < torch.arange(1, n + 1)[:, None] * keys // n) if masked else None
    inputs = (x, tokens, mask) if masked else (x, tokens)
    call = None if masked else lambda network, x, tokens: network(x, tokens, None)
    (y,) = results(network, *inputs, dtype=able, call=call)
    assert_near(y, network.double()(x.double(), tokens.double(), mask), 5e-6 if able == torch.float32 else 0.02)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 24, 3, padding=1)
        self.attention = SelfAttention(24, 2, 4)
        self.block = TransformerBlock(24, 3, 20, 4)
        self.conv_out = nn.Conv2d(24, 4, 3, padding=1)

    def forward(self, x, k, v, mask):
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = "auto"
        return self.conv_out(self.block(self.attention(self.conv_in(x)), (k, v), mask))


def test_transformer(able):
    network = seeded(Transformer())
    x, rows, mask = randn(2, 4, 5, 3), randn(2, 11, 20, seed=1), torch.arange(11) < torch.tensor([[11], [4]])
    with torch.no_grad():
        k, v = (t.contiguous() for t in network.block.keys_values(rows))

        def run(twin, recorder):
            given = (
                recorder.input(x, image=True),
                recorder.input(k, rounded=True),
                recorder.input(v, rounded=True),
                recorder.input(mask),
            )
            return (twin(*given),)

        made = Program(record_module(MetaCopy(network), run), Weights(able), 2)
        for mine, t in zip(made.inputs, (x, k, v, mask)):
            mine.copy_(t)
        made.run()
        exact = network.double()(x.double(), k.double(), v.double(), mask)
    assert_near(made.outputs[0], exact, 1e-5 if able == torch.float32 else 0.04)


class Functions(nn.Module):
    """Clamped, then a convolution whose activation is added to, scaled and shifted."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        x = torch.tanh(x / 3) * 3
        return (F.silu(self.conv(x)) + x).mul(2).sub(1)


def test_functions(able):
    network, x = rounded(seeded(Functions()), able), 3 * randn(2, 6, 5, 7)
    (y,) = results(network, x, dtype=able)
    # the clamped image is rounded to the dtype, once
    assert_near(y, network.double()(x.double()), 3e-6 if able == torch.float32 else 0.01)


def test_scales_and_shifts_are_part_of_a_function(able):
    x = randn(2, 6, 5, 7)
    recording = record_module(MetaCopy(Functions()), lambda twin, recorder: [twin(recorder.input(x, image=True))])
    kinds = [type(step) for step in recording.steps]
    assert kinds == [Pointwise, Pointwise, Convolution, Pointwise, Pointwise]


@pytest.mark.parametrize("anchor", ["mlp", None])
@pytest.mark.parametrize("isa", available())
def test_conditioning(isa, anchor):
    """All of it in float32, a description alone as among others, an empty one among them."""
    network = seeded(
        CoalescerUNet(
            sample_size=4, latent_channels=6, anchor=anchor, anchor_hidden_dim=16, **SMALL, cross_attention_dim=9
        )
    )
    descriptions, rows = randn(3, 12, seed=3), randn(3, 7, 9, seed=4)
    descriptions[1] = 0

    def call(twin, *given):
        return tuple(twin.condition(*given).tensors())

    best = native_library.isa()
    native_library.set_isa(isa)
    try:
        made = results(network, descriptions, rows, dtype=torch.float32, call=call)
        alone = results(network, descriptions[1:2], rows[1:2], dtype=torch.float32, call=call, threads=1)
    finally:
        native_library.set_isa(best)
    assert all(torch.equal(y[1:2], one) for y, one in zip(made, alone))
    with torch.no_grad():
        for y, exact in zip(
            made, network.double().condition(descriptions.double(), rows.double()).tensors(), strict=True
        ):
            assert_near(y, exact, 1e-5)


SMALL = dict(
    block_out_channels=(24, 40), norm_num_groups=4, embedding_dim=20, description_dim=12, num_attention_heads=2
)


def evaluation(network: CoalescerUNet, n: int, side: int, **kwargs):
    """A program of the UNet, and what the network itself gives."""
    network.set_backend("reference")
    description, sample = randn(n, 12, seed=3), randn(n, network.config.latent_channels, side, side, seed=4)
    with torch.no_grad():
        conditioning = network.condition(description)
        film = [t for pair in conditioning.film for t in pair]
        anchor = [] if conditioning.anchor is None else [conditioning.anchor]

        def call(twin, sample, *given):
            twin.set_backend("auto")
            pairs = list(zip(given[: len(film) : 2], given[1 : len(film) : 2]))
            like = type(conditioning)(pairs, given[len(film)] if anchor else None, [])
            return twin(sample, like, return_dict=False)

        made = program(network, sample, *film, *anchor, call=call, **kwargs)
        made.run()
        return made, network(sample, conditioning, return_dict=False)


@pytest.mark.parametrize("anchor", ["mlp", None])
@pytest.mark.parametrize(("n", "side"), [(1, 8), (3, 4), (2, 2)])
def test_unet(able, anchor, n, side):
    network = seeded(CoalescerUNet(sample_size=side, latent_channels=6, anchor=anchor, anchor_hidden_dim=16, **SMALL))
    made, expected = evaluation(network, n, side, dtype=able)
    for y, exact in zip(made.outputs, expected):
        assert_near(y, exact.double(), 2e-5 if able == torch.float32 else 0.05)


def test_the_first_shortcut_without_a_change_of_channels_copies_the_concatenation():
    """cat([x, skip]) as the residual itself."""
    network = seeded(
        CoalescerUNet(sample_size=4, latent_channels=4, **{**SMALL, "block_out_channels": (16, 16)}, anchor=None)
    )
    made, expected = evaluation(network, 2, 4, dtype=torch.float32)
    assert_near(made.outputs[0], expected[0].double(), 2e-5)


@pytest.mark.parametrize("dtype", BEST)
def test_same_bits_whatever_the_threads_and_the_neighbours(dtype):
    network = seeded(CoalescerUNet(sample_size=8, latent_channels=6, anchor=None, **SMALL))
    reference = [y.clone() for y in evaluation(network, 5, 8, dtype=getattr(torch, dtype), threads=1)[0].outputs]
    for threads in (2, 3, 7, 16, 100):
        made = evaluation(network, 5, 8, dtype=getattr(torch, dtype), threads=threads)[0]
        for _ in range(3):
            made.run()
            assert all(torch.equal(a, b) for a, b in zip(made.outputs, reference))
    made = evaluation(network, 5, 8, dtype=getattr(torch, dtype))[0]
    made.inputs[0][1:] = float("nan")  # neighbours leave no trace
    made.run()
    assert torch.equal(made.outputs[0][0], reference[0][0])
    assert made.outputs[0][1:].isnan().all()


@pytest.mark.parametrize("dtype", BEST)
def test_a_sample_alone_has_the_bits_that_it_has_in_a_batch(dtype):
    network = seeded(nn.Sequential(Decoder(), nn.Conv2d(12, 40, 3, 2, 1), nn.Conv2d(40, 8, 1)))
    x = randn(9, 6, 8, 8)
    (together,) = results(network, x, dtype=getattr(torch, dtype))
    for i in (0, 4, 8):
        assert torch.equal(results(network, x[i : i + 1], dtype=getattr(torch, dtype))[0], together[i : i + 1])


def test_memory_is_used_again_and_not_poisoned():
    network = seeded(
        nn.Sequential(*[layer for _ in range(6) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())])
    )
    x = randn(2, 16, 8, 8)
    made = program(network, x, dtype=torch.float32)
    everything = (2 + 6 * (10 * 10) / (8 * 8)) * x.numel() * x.element_size()  # input, output, and images with borders
    assert made.memory.numel() < 0.6 * everything
    inputs = [t.clone() for t in made.inputs]
    for byte in (0, 255):  # what was in memory before the first step does not matter
        made.memory.fill_(byte)
        for mine, t in zip(made.inputs, inputs):
            mine.copy_(t)
        made.run()
        assert_near(made.outputs[0], network.double()(x.double()), 1e-5)
        network.float()


@pytest.fixture(params=EIGHT_BITS)
def floats(request):
    """The dtype of what is not in 8 bits, for every instruction set that multiplies these."""
    with using(request.param):
        yield floats_of(torch.int8)


def observed(network: nn.Module, *inputs: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> Ranges:
    """The ranges of what products read in 8 bits, of one call."""
    ranges: Ranges = {}
    observer = program(network, *inputs, dtype=dtype)
    assert observer.quantised == 0
    expected = [y.clone() for y in results(network, *inputs, dtype=dtype)]
    for mine, x in zip(observer.inputs, inputs):
        mine.copy_(x)
    observer.observe(ranges)
    assert all(map(torch.equal, observer.outputs, expected))  # whoever observes runs
    return ranges


class Normalised(nn.Module):
    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, channels), nn.Conv2d(channels, outputs, 3, padding=1)

    def forward(self, x):
        return self.conv(ops.group_norm_silu(x, 4, self.norm.weight, self.norm.bias))


def test_the_instruction_sets_that_multiply_eight_bits():
    for name in available():
        with using(name):
            assert (torch.uint8 in native_library.products()) == (name in EIGHT_BITS)
            assert native_library.largest_weight() == (127 if name in ("avx2_vnni", "avx512_bf16") else 64)


@pytest.mark.parametrize(("channels", "outputs", "height", "width"), [(16, 16, 8, 8), (20, 37, 5, 3), (64, 100, 1, 2)])
def test_eight_bits(floats, channels, outputs, height, width):
    network, x = seeded(Normalised(channels, outputs)), randn(3, channels, height, width)
    ranges = observed(network, x, dtype=floats)
    h = F.silu(F.group_norm(x.to(floats).float(), 4, network.norm.weight, network.norm.bias))
    (seen,) = ranges.values()
    torch.testing.assert_close(seen.high, h.amax((0, 2, 3)).clamp_min(0), rtol=0.01, atol=0.01)
    torch.testing.assert_close(seen.low, h.amin((0, 2, 3)).clamp_max(0), rtol=0.01, atol=0.01)
    (y,) = results(network, x, dtype=floats, ranges=ranges)
    # the same with the roundings made in float64
    step, zero = (t.double()[:, None, None] for t in seen.quantisation())
    q = ((h.double() / step).round() + zero).clamp(0, 255)
    weight = network.conv.weight.double() * step
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / native_library.largest_weight()
    exact = F.conv2d((q - zero) * 1.0, (weight / scale).round() * scale, network.conv.bias.double(), padding=1)
    assert float((y - exact).abs().mean()) < 2e-4 * float(exact.abs().max())  # a tie may round either way
    assert_near(y, network.double()(x.to(floats).double()), 0.02)


def test_every_sum_of_eight_bits_is_exact(floats):
    """The largest inputs with the largest weights, of one sign and of both, as integers would add them."""
    channels, outputs, largest = 64, 40, native_library.largest_weight()
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (outputs, channels, 3, 3), generator=generator) * 2 - 1
    signs[0], signs[1] = 1, -1
    network = Normalised(channels, outputs)
    network.conv.weight.data = (largest * signs).float()
    nn.init.zeros_(network.conv.bias)
    nn.init.zeros_(network.norm.weight)  # so that a channel is its bias everywhere
    codes = torch.randint(250, 256, (channels,), generator=generator)
    codes[0] = 255
    network.norm.bias.data = codes.float()
    ranges = {0: Range(torch.zeros(channels), torch.full((channels,), 255.0))}
    x = randn(1, channels, 5, 4)
    (y,) = results(network, x, dtype=floats, ranges=ranges)
    exact = F.conv2d(codes.double().view(1, -1, 1, 1).expand(1, -1, 5, 4), (largest * signs).double(), padding=1)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=0)


def test_range_covers_what_it_has_seen():
    rows = torch.cat([3 * randn(50, 8), 0.01 * randn(50, 8, seed=1)], 1)
    seen = Range(torch.zeros(16), torch.zeros(16))
    seen.extend(rows[:25])
    seen.extend(rows[25:])
    assert torch.equal(seen.high, rows.amax(0).clamp_min(0))
    step, zero = seen.quantisation()
    q = (rows / step).round() + zero
    assert q.min() >= 0
    assert q.max() <= 255
    assert ((q - zero) * step - rows).abs().max() <= step.max()


# Modules that are not ours


class TokenAttention(nn.Module):
    """Attention among the positions of an image, as a stranger would write it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(n, h * w, c)
        tokens = self.norm(rows)
        q, k, v = (
            layer(tokens).view(n, h * w, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=False)
        y = self.out(y.transpose(1, 2).reshape(n, h * w, c)) + rows
        return y.reshape(n, h, w, c).permute(0, 3, 1, 2)


def strangers() -> dict[str, tuple[nn.Module, list[torch.Tensor]]]:
    classic = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.GroupNorm(3, 24, affine=False),
        nn.Conv2d(24, 8, 1),
        nn.Tanh(),
    )
    attention = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), TokenAttention(32, 4), nn.Conv2d(32, 4, 1))
    perceptron = nn.Sequential(nn.Linear(10, 32), nn.SiLU(), nn.Linear(32, 6))
    return {
        "convolutions": (classic, [randn(2, 3, 9, 7)]),
        "attention": (attention, [randn(2, 4, 6, 5)]),
        "linear layers": (perceptron, [randn(5, 10)]),
    }


@pytest.mark.parametrize("name", strangers())
def test_compile_module(able, name):
    module, inputs = strangers()[name]
    seeded(module)
    before = {key: (value.data_ptr(), value._version) for key, value in module.state_dict().items()}
    made = compile_module(module, inputs, able)
    expected = copy.deepcopy(module).double()(*(x.double() for x in inputs))
    for _ in range(2):
        (y,) = made(*inputs)
        assert_near(y, expected, 1e-5 if able == torch.float32 else 0.03)
    assert before == {key: (value.data_ptr(), value._version) for key, value in module.state_dict().items()}


def test_a_group_norm_and_a_silu_are_one_step():
    x = randn(2, 3, 9, 7)
    steps = record_module(
        MetaCopy(strangers()["convolutions"][0]), lambda twin, r: [twin(r.input(x, image=True))]
    ).steps
    assert [type(step) for step in steps] == [
        *(Convolution, GroupNormSiLU, Convolution, GroupNormSiLU, Convolution, Pointwise)
    ]
    assert [step.silu for step in steps if isinstance(step, GroupNormSiLU)] == [True, False]


def test_programs_share_packed_weights():
    module, weights = seeded(nn.Conv2d(4, 8, 3, padding=1)), Weights(torch.float32)
    for n in (1, 3):
        x = randn(n, 4, 5, 5)
        (y,) = compile_module(module, [x], weights=weights)(x)
        torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-5)
    assert len(weights._floats) == 1


def test_a_module_that_does_what_no_step_does():
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Softmax2d(), nn.Conv2d(3, 3, 1))
    with pytest.raises(Unsupported, match=r"^there is no step for aten\._softmax\.default$"):
        compile_module(module, [randn(1, 3, 4, 4)])


def test_several_inputs_and_outputs():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Conv2d(3, 5, 1)

        def forward(self, rows, image):
            return {"rows": self.first(rows), "image": self.second(image)}

    module, rows, image = seeded(Module()), randn(2, 7, 6), randn(2, 3, 4, 4)
    results = compile_module(module, [rows, image])(rows, image)
    for y, expected in zip(results, module(rows, image).values(), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_cache_keeps_the_programs_that_were_used_last(monkeypatch):
    module = seeded(nn.Linear(4, 4))
    programs = [compile_module(module, [randn(n, 4)]) for n in (1, 2, 3, 4)]
    monkeypatch.setattr("coalescer_fast.runtime.native.program.MOST_PROGRAMS", 3)
    cache = ProgramCache()
    for n, each in enumerate(programs[:3]):
        cache.add(n, each)
    assert cache.get(0) is programs[0]
    cache.add(3, programs[3])
    assert [cache.get(n) for n in range(4)] == [programs[0], None, programs[2], programs[3]]
    monkeypatch.setattr("coalescer_fast.runtime.native.program.MOST_BYTES", 0)
    cache.add(1, programs[1])
    assert [cache.get(n) for n in range(4)] == [None, programs[1], None, None]


def test_a_profile_has_a_row_for_every_step():
    network = seeded(nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Conv2d(16, 8, 1)))
    made = program(network, x := randn(2, 4, 6, 5), dtype=torch.float32)
    made.run()
    expected = [y.clone() for y in made.outputs]
    steps = made.profile(rounds=3)
    kinds = ["gather", "convolution 3x3", "group_norm_silu", "convolution 1x1"]
    assert [step.kind for step, _ in steps] == kinds
    assert all(seconds > 0 for _, seconds in steps)
    by_kind = {step.kind: step for step, _ in steps}
    first, last = by_kind["convolution 3x3"], by_kind["convolution 1x1"]
    assert (first.shape, first.flop, first.form) == ("2x6x5, 4 -> 16", 2 * 60 * 9 * 4 * 16, "direct")
    assert (last.shape, last.flop) == ("2x6x5, 16 -> 8", 2 * 60 * 16 * 8)
    assert last.bytes == 4 * (60 * 16 + 60 * 8 + 16 * 8)
    assert by_kind["group_norm_silu"].flop == 0
    # its runs are those of the program
    for y in made.outputs:
        y.fill_(float("nan"))
    made.profile(rounds=1)
    assert all(torch.equal(y, e) for y, e in zip(made.outputs, expected))
    assert torch.equal(made(x)[0], expected[0])


# 8 bits


def steps_in_8_bits(network: nn.Module, ranges: Ranges, *inputs: torch.Tensor) -> list[Step]:
    """The steps of a program that multiplies in 8 bits, with the dtypes of their values."""
    recording = record_module(MetaCopy(network), lambda twin, recorder: _all(twin(*map(recorder.input, inputs))))
    for step in recording.steps:
        if isinstance(step, Convolution):
            step.range = ranges.get(step.weight.key)
    return Layout(recording, torch.bfloat16).steps


def _all(results):
    return results if isinstance(results, tuple) else (results,)


class Written(nn.Module):
    """Linear layers that read what one kind of step writes."""

    def __init__(self, writer: str, channels: int = 48):
        super().__init__()
        self.writer, self.norm = writer, nn.LayerNorm(channels)
        self.wide = nn.Linear(channels, 2 * channels)
        self.products = nn.ModuleList(nn.Linear(channels, outputs) for outputs in (16, 33, 100))

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        if self.writer == "layer_norm":
            return self.norm(x)
        if self.writer == "gate":
            return x * F.gelu(self.norm(x))
        if self.writer == "gated product":
            value, gate = self.wide(x).chunk(2, -1)
            return value * F.gelu(gate)
        heads = self.norm(x).unflatten(-1, (3, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.hidden(x)
        return tuple(product(h) for product in self.products)


def in_8_bits(h: torch.Tensor, product: nn.Linear, range: Range) -> torch.Tensor:
    """A linear layer with the roundings of 8 bits made in float64."""
    step, zero = (t.double() for t in range.quantisation())
    q = ((h.double() / step).round() + zero).clamp(0, 255)
    weight = product.weight.double() * step
    scale = weight.abs().amax(1, keepdim=True) / 127
    return F.linear(q - zero, (weight / scale).round() * scale, product.bias.double())


@needs_int8
@pytest.mark.parametrize("writer", ["layer_norm", "gate", "attention", "gated product"])
def test_what_products_alone_read_is_quantised_once_where_it_is_written(writer):
    network, x = rounded(seeded(Written(writer)), torch.bfloat16), randn(2, 7, 48).bfloat16().float()
    ranges = observed(network, x)
    assert len(ranges) == 3
    (seen,) = {id(each): each for each in ranges.values()}.values()
    steps = steps_in_8_bits(network, ranges, x)
    assert [step.name.lower() for step in steps if step.y.dtype == torch.uint8] == [
        "convolution" if writer == "gated product" else writer
    ]
    assert not any(isinstance(step, Gather) and step.y.dtype == torch.uint8 for step in steps)
    found = results(network, x, dtype=torch.bfloat16, ranges=ranges)
    for y, product in zip(found, network.products):
        exact = in_8_bits(network.hidden(x), product, seen)
        # bfloat16 before it decides another way now and then
        assert float((y - exact).abs().mean()) < 2e-3 * float(exact.abs().max())
    alone = results(network, x[1:], dtype=torch.bfloat16, ranges=ranges, threads=1)
    assert all(torch.equal(y[1:], one) for y, one in zip(found, alone))


class Read(nn.Module):
    """A normalised image that a product reads, and another step."""

    def __init__(self, outputs: int, stride: int):
        super().__init__()
        self.before, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.product = nn.Conv2d(16, outputs, 2 * stride - 1, stride, padding=stride - 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.norm(self.before(x))
        return self.product(h), torch.tanh(h)


@needs_int8
@pytest.mark.parametrize(("outputs", "stride", "copied"), [(256, 1, False), (32, 2, True)])
def test_what_others_read_too_is_copied_in_8_bits_for_a_3x3_convolution(outputs, stride, copied):
    network, x = rounded(seeded(Read(outputs, stride)), torch.bfloat16), randn(2, 16, 8, 6).bfloat16().float()
    ranges = observed(network, x)
    assert len(ranges) == copied
    y, other = results(network, x, dtype=torch.bfloat16, ranges=ranges)
    wide, same = results(network, x, dtype=torch.bfloat16)
    assert torch.equal(other, same)
    assert torch.equal(y, wide) != copied
    assert_near(y, network(x)[0].double(), 0.02)
    if not copied:
        return
    (seen,) = ranges.values()
    step, zero = (t.double()[:, None, None] for t in seen.quantisation())
    h = network.norm(network.before(x).bfloat16().float()).bfloat16().double()
    q = ((h / step).round() + zero).clamp(0, 255)
    weight = network.product.weight.double() * step
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    exact = F.conv2d(
        q - zero, (weight / scale).round() * scale, network.product.bias.double(), stride, padding=stride - 1
    )
    assert float((y - exact).abs().mean()) < 1e-3 * float(exact.abs().max())


class Kept(nn.Module):
    """Products that stay in floating point, and one that does not."""

    def __init__(self):
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(32), nn.Linear(32, 300), nn.Linear(32, 12)
        self.of_input, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.vector = nn.Linear(32, 32)
        self.image_norm, self.up = nn.GroupNorm(4, 32), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x, context, row, image) -> tuple[torch.Tensor, ...]:
        h = self.norm(x)
        heads = [t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (h, self.key(context), self.value(context))]
        attended = self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return (
            self.wide(self.norm(h)),
            self.narrow(self.norm(attended)),
            self.of_input(x),
            self.vector(self.norm(row)),
            self.up(F.interpolate(self.image_norm(image), scale_factor=2.0)),
        )


@needs_int8
def test_what_stays_in_floating_point():
    network, given = seeded(Kept()), (randn(2, 8, 32), randn(2, 5, 32), randn(2, 32), randn(2, 32, 4, 4))
    ranges = observed(network, *given)
    assert {key[0] for key in ranges} == {"wide.weight"}
    made = program(network, *given, dtype=torch.bfloat16, ranges=ranges)
    assert (made.quantised, made.products) == (1, 8)


@needs_int8
def test_a_layer_that_is_used_twice_has_one_range():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.product = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x):
            return self.product(self.first(x)), self.product(self.second(x))

    network, x = seeded(Twice()), randn(2, 9, 16).bfloat16().float()
    with torch.no_grad():
        network.second.weight[:8] *= 4
        network.second.weight[8:] /= 4
        (seen,) = observed(network, x).values()
        both = torch.cat([network.first(x), network.second(x)]).flatten(0, 1)
    torch.testing.assert_close(seen.high, both.amax(0), rtol=0.01, atol=0.01)
    torch.testing.assert_close(seen.low, both.amin(0), rtol=0.01, atol=0.01)


@needs_int8
def test_zero_and_what_lies_beyond_the_range_seen():
    seen = Range(torch.tensor([-1.0, 0.0, -0.1]), torch.tensor([3.0, 0.5, 0.1]))
    step, zero = seen.quantisation()
    for x in (seen.low, seen.high, torch.zeros(3)):
        q = (x / step).round() + zero
        assert ((q >= 0) & (q <= 255)).all()
        assert ((q.clamp(0, 255) - zero) * step - x).abs().max() <= 0.51 * step.max()
    # the narrower a channel's range, the more there is beside it
    q = (3 * torch.tensor([0, 0, 0.1]) / step).round() + zero
    assert q[2] < 255
