"""The native runtime under unusual uses: each gives the picture of the reference, or one sentence."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import os
import pickle
import re
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import coalescer_fast as cf
from coalescer_fast.models import CoalescerUNet
from coalescer_fast.ops import native_library
from coalescer_fast.runtime import base
from coalescer_fast.runtime.native import runtime

from ...helpers import processes
from ...helpers.isa import EIGHT_BITS, using
from ...helpers.networks import seeded

pytestmark = pytest.mark.skipif(
    bool(native_library.unavailable()), reason=native_library.unavailable() or "the library is there"
)

NAMES = ["octopus", "pizza", "rocket, 3d style", "owl", "ghost"]
NOISE = torch.randn(5, 16, 8, 8, generator=torch.Generator().manual_seed(5))
PRODUCTS = native_library.products()
DTYPES = [
    "float32",
    *(["bfloat16"] if torch.bfloat16 in PRODUCTS else []),
    *(["int8"] if torch.uint8 in PRODUCTS else []),
]
int8 = pytest.mark.skipif("int8" not in DTYPES, reason="the processor does not multiply 8-bit integers itself")


@pytest.fixture
def pipe():
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, n: int = 2, **kwargs) -> torch.Tensor:
    return pipe(NAMES[:n], latents=NOISE[:n], output_type="pt", **kwargs).images


def assert_as_the_reference(pipe, off: float = 2e-4) -> None:
    """The accelerated picture, of two calls, and the reference's."""
    first, second = draw(pipe), draw(pipe)
    recipe = pipe.recipe
    expected = draw(cf.restore(pipe))
    cf.accelerate(pipe, **recipe)
    assert float((first - expected).abs().max()) < off
    assert torch.equal(first, second)


# Weights of any strides and offsets


def flat(unet):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(unet.parameters()).detach(), unet.parameters())


def permuted(unet):
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):  # height, width, inputs, outputs in memory
            module.weight = nn.Parameter(module.weight.detach().permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1))


def transposed(unet):
    for module in unet.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())


def channels_last(unet):
    unet.to(memory_format=torch.channels_last)


def sliced(unet):
    for module in unet.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                wide = torch.full((*p.shape, 3), torch.nan)
                wide[..., 1] = p.detach()
                module._parameters[name] = nn.Parameter(wide[..., 1])


def negated(unet):
    for module in unet.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = nn.Parameter(torch._neg_view(-p.detach()))


@pytest.mark.parametrize("rearrange", [flat, permuted, transposed, channels_last, sliced, negated])
def test_weights_that_are_views(pipe, rearrange):
    expected = draw(pipe)
    rearrange(pipe.unet)
    rearrange(pipe.vae.decoder)
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-4)
    assert_as_the_reference(cf.accelerate(pipe, dtype="float32"))


def test_tied_weights(pipe):
    pipe.unet.mid[1].conv1.weight = pipe.unet.mid[0].conv1.weight
    pipe.unet.mid[1].conv2.weight = pipe.unet.mid[0].conv1.weight
    assert_as_the_reference(cf.accelerate(pipe, dtype="float32"))


# Inputs that no step reads


@pytest.mark.parametrize("anchor", ["mlp", None])
def test_a_network_that_does_not_read_its_token_rows(anchor, pipe):
    unet = seeded(
        CoalescerUNet(
            attention_levels=(), mid_attention=False, cross_attention_dim=128, anchor=anchor, anchor_hidden_dim=64
        )
    )
    pipe = cf.CoalescerPipeline(unet, pipe.scheduler, pipe.description_encoder, pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    cf.accelerate(pipe, dtype="float32")
    conditioning = pipe.runtime.condition(NAMES[:2], torch.device("cpu"))
    with torch.no_grad():
        expected = unet(NOISE[:2], unet.condition(*pipe.describe(NAMES[:2], torch.device("cpu"))), return_dict=False)
    for _ in range(3):
        for y, exact in zip(pipe.runtime.evaluate(NOISE[:2], conditioning), expected):
            torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


# What users attach


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_hooks_run_in_every_call(pipe, name):
    network = pipe.unet if name == "unet" else pipe.vae.decoder
    layer = pipe.unet.mid[0].conv2 if name == "unet" else pipe.vae.decoder.layers[0]
    cf.accelerate(pipe, dtype="float32")
    before = draw(pipe)
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, y: seen.append(y))
    draw(pipe)
    count = len(seen)
    assert count
    assert not any(y.is_meta for y in seen)
    draw(pipe)
    assert len(seen) == 2 * count
    assert "has a forward hook" in cf.explain(pipe)
    handle.remove()
    assert torch.equal(draw(pipe), before)
    with layer.register_forward_hook(lambda module, args, y: 0.5 * y):
        assert_as_the_reference(pipe)
        assert not torch.allclose(draw(pipe), before, atol=1e-3)
    assert network is (pipe.unet if name == "unet" else pipe.vae.decoder)


def test_lora_is_followed_in_all_that_is_done_to_it(pipe):
    peft = pytest.importorskip("peft")
    cf.accelerate(pipe, dtype="float32")
    plain = draw(pipe)
    targets = r".*(conv1|conv2|shortcut|direction_head|distance_head|to_qkv|film|linear_in)"
    torch.manual_seed(0)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), pipe.unet)
    for parameter in pipe.unet.parameters():
        if parameter.shape[0] == 2 or parameter.shape[1:2] == (2,):
            parameter.data *= 0.1
    with_adapter = draw(pipe)
    assert not torch.allclose(with_adapter, plain, atol=1e-2)
    assert_as_the_reference(pipe, 1e-3)
    layers = [module for module in pipe.unet.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.scale_layer(0.5)
    halved = draw(pipe)
    assert not torch.allclose(halved, with_adapter, atol=1e-3)
    assert_as_the_reference(pipe, 1e-3)
    for layer in layers:
        layer.enable_adapters(False)
    torch.testing.assert_close(draw(pipe), plain, rtol=0, atol=2e-4)
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    torch.testing.assert_close(draw(pipe), halved, rtol=0, atol=2e-3)
    assert_as_the_reference(pipe, 1e-3)


def averaged(pipe):
    from diffusers.training_utils import EMAModel

    average = EMAModel(p + 0.003 for p in pipe.unet.parameters())
    average.copy_to(pipe.unet.parameters())


CHANGES = {
    "EMA": averaged,
    ".data": lambda pipe: pipe.unet.mid[0].conv2.weight.data.mul_(3),
    "eps": lambda pipe: setattr(pipe.unet.norm_out, "eps", 0.3),
    "num_heads": lambda pipe: [setattr(m, "num_heads", 1) for m in pipe.unet.modules() if hasattr(m, "num_heads")],
    "an activation": lambda pipe: pipe.unet.embedding.__setitem__(1, nn.Tanh()),
    "a layer": lambda pipe: setattr(
        pipe.unet, "conv_in", copy.deepcopy(pipe.unet.conv_in).requires_grad_(False).apply(doubled)
    ),
    "a patched forward": lambda pipe: setattr(pipe.unet.norm_out, "forward", lambda x: x.relu()),
    "another network": lambda pipe: setattr(pipe, "unet", copy.deepcopy(pipe.unet).apply(doubled)),
    "another decoder": lambda pipe: setattr(pipe.vae, "decoder", copy.deepcopy(pipe.vae.decoder).apply(doubled)),
    "the encoder": lambda pipe: pipe.description_encoder.table.data.neg_(),
}


def doubled(module):
    if getattr(module, "bias", None) is not None:
        module.bias.data *= 2


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_takes_effect_in_the_next_call(pipe, change):
    cf.accelerate(pipe, dtype="float32")
    before = draw(pipe)
    CHANGES[change](pipe)
    assert not torch.allclose(draw(pipe), before, atol=1e-3)
    assert_as_the_reference(pipe, 1e-3)


def test_refresh_takes_over_what_no_call_can_see(pipe):
    cf.accelerate(pipe, dtype="float32")
    before = draw(pipe)
    weight = pipe.unet.mid[0].conv1.weight
    weight.data.view(-1)[2:3] += 30
    assert torch.equal(draw(pipe), before)  # as the docs say
    assert cf.refresh(pipe) is pipe
    assert not torch.equal(draw(pipe), before)
    assert_as_the_reference(pipe, 1e-3)
    with pytest.raises(ValueError, match="not accelerated"):
        cf.refresh(cf.restore(pipe))


class Gained(nn.Module):
    """A layer of a user's, with state that nothing can watch."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.state = layer, {"gains": [1.0, [0]]}

    def forward(self, x):
        self.state["gains"][1][0] += 1  # at every call
        return self.layer(x) * self.state["gains"][0]


def test_layers_of_users_own_classes_are_run_as_they_are(pipe):
    pipe.unet.conv_in = Gained(pipe.unet.conv_in)
    cf.accelerate(pipe, dtype="float32")
    assert "conv_in is a tests.runtime.native.test_runtime.Gained" in cf.explain(pipe)
    before = draw(pipe)
    calls = pipe.unet.conv_in.state["gains"][1][0]
    assert torch.equal(draw(pipe), before)
    assert pipe.unet.conv_in.state["gains"][1][0] > calls
    pipe.unet.conv_in.state["gains"][0] = 2.0
    assert not torch.allclose(draw(pipe), before, atol=1e-3)
    assert_as_the_reference(pipe)


@pytest.mark.parametrize("whose", ["vae", "pipe", "subclass"])
def test_another_way_to_decode_is_taken(pipe, whose):
    cf.accelerate(pipe, dtype="float32")
    before = draw(pipe)
    if whose == "vae":
        decode = pipe.vae.decode
        pipe.vae.decode = lambda x, **kwargs: type(y := decode(x))(sample=0.5 * y.sample)
    elif whose == "pipe":
        decode = pipe.decode
        pipe.decode = lambda x: 0.5 * decode(x)
    else:

        class Darker(type(pipe.vae)):
            def decode(self, x, *args, **kwargs):
                y = super().decode(x)
                return type(y)(sample=0.5 * y.sample)

        pipe.vae.__class__ = Darker
    assert not torch.allclose(draw(pipe), before, atol=1e-2)
    assert "decode of" in cf.explain(pipe)
    assert_as_the_reference(pipe)


@pytest.mark.parametrize("backend", ["cpu", "compile"])
def test_hooks_of_all_modules(pipe, backend):
    cf.accelerate(pipe, backend=backend, dtype="float32")
    before = draw(pipe) if backend == "cpu" else None
    handle = register_module_forward_hook(lambda module, args, y: 1.5 * y if isinstance(module, nn.Linear) else None)
    try:
        if backend == "compile":
            with pytest.raises(
                ValueError, match="backend 'compile' cannot run the pipeline: there are hooks of all modules"
            ):
                draw(pipe)
            return
        assert not torch.allclose(draw(pipe), before, atol=1e-3)
        assert "there are hooks of all modules" in cf.explain(pipe)
        assert_as_the_reference(pipe)
    finally:
        handle.remove()
    assert torch.equal(draw(pipe), before)


def test_training_mode_is_taken(pipe):
    pipe.unet.conv_in = nn.Sequential(pipe.unet.conv_in, nn.Dropout(0.5)).eval()
    cf.accelerate(pipe, dtype="float32")
    before = draw(pipe)
    pipe.unet.train()
    assert not torch.equal(draw(pipe), draw(pipe))
    assert "conv_in.1 is in training mode" in cf.explain(pipe)
    pipe.unet.eval()
    assert torch.equal(draw(pipe), before)


def test_another_encoder_has_another_empty_description(pipe):
    cf.accelerate(pipe, dtype="float32")
    draw(pipe)

    class Loud(type(pipe.description_encoder)):
        def forward(self, descriptions):
            return super().forward(descriptions) + 1.0

    pipe.description_encoder.__class__ = Loud
    assert_as_the_reference(pipe, 1e-3)


@pytest.mark.parametrize("interrupted", ["Watch", "Weights"])
def test_an_interrupted_refresh_is_done_again(pipe, interrupted, monkeypatch):
    cf.accelerate(pipe, dtype="float32")
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.5)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(base if interrupted == "Watch" else runtime, interrupted, interrupt)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe)
    assert_as_the_reference(pipe)


def test_numbers_that_are_not_finite_are_refused(pipe):
    pipe.vae.decoder.layers[0].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"^vae\.decoder\.layers\.0\.bias holds a number that is not finite"):
        cf.accelerate(pipe)
    pipe.vae.decoder.layers[0].bias.data[0] = 0
    cf.accelerate(pipe)
    draw(pipe)
    with torch.no_grad():
        pipe.unet.conv_in.weight[0] = torch.inf
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^unet\.conv_in\.weight holds a number that is not finite"):
            draw(pipe)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_pipelines_of_other_dtypes(pipe, dtype):
    expected = draw(pipe)
    for network in (pipe.unet, pipe.vae):
        network.to(dtype)
    first, second = draw(cf.accelerate(pipe, dtype="float32")), draw(pipe)
    assert torch.equal(first, second)
    assert float((first - expected).abs().mean()) < (1e-5 if dtype == torch.float64 else 0.01)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_under_another_default_dtype(dtype, default):
    def picture():
        pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
        pipe.set_progress_bar_config(disable=True)
        return draw(cf.accelerate(pipe, dtype=dtype))

    expected = picture()
    torch.set_default_dtype(default)
    try:
        assert torch.equal(picture(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# The bits of a picture


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_that_a_picture_has_alone(pipe, dtype):
    cf.accelerate(pipe, dtype=dtype)
    alone = torch.cat([pipe(NAMES[i], latents=NOISE[i : i + 1], output_type="pt").images for i in range(5)])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(draw(pipe, 5), alone)
            order = [3, 1, 4]
            some = pipe([NAMES[i] for i in order], latents=NOISE[order], output_type="pt").images
            assert torch.equal(some, alone[order])
            accelerated = copy.deepcopy(pipe)  # int8 finds its ranges anew
            assert torch.equal(draw(accelerated, 5), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quality_and_auto_are_those_that_a_picture_has_alone(pipe, dtype):
    cf.accelerate(pipe, dtype=dtype)
    distances = pipe(NAMES[:5], latents=NOISE[:5], return_trace=True).trace[0].distance
    pipe.scheduler.register_to_config(arrival_distance=float(distances.median()))  # between those of the pictures
    for steps in (2, "auto"):
        call = {"num_inference_steps": steps, "output_type": "pt"}
        together = pipe(NAMES[:5], latents=NOISE[:5], **call)
        for i in range(5):
            alone = pipe(NAMES[i], latents=NOISE[i : i + 1], **call)
            assert alone.quality == together.quality[i : i + 1]
            assert alone.num_evaluations == together.num_evaluations[i : i + 1]
            assert torch.equal(alone.images[0], together.images[i])
            if steps == "auto":
                plain = pipe(
                    NAMES[i],
                    latents=NOISE[i : i + 1],
                    num_inference_steps=alone.num_evaluations[0] - 1,
                    output_type="pt",
                )
                assert torch.equal(plain.images, alone.images)
                assert plain.quality == alone.quality
    assert len({*together.num_evaluations}) > 1


def draw_alone(dtype: str, threads: int) -> bytes:
    """The fourth of five pictures, in a process of its own."""
    torch.set_num_threads(threads)
    pipe = cf.accelerate(cf.CoalescerPipeline.from_pretrained("emoji-64"), dtype=dtype)
    noise = torch.randn(5, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    return pipe("owl", latents=noise[3:4], output_type="pt").images.numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_another_process(pipe, dtype):
    threads = 3 - torch.get_num_threads()
    other = processes.call(draw_alone, dtype, max(1, threads))
    assert draw(cf.accelerate(pipe, dtype=dtype), 5)[3].numpy().tobytes() == other


# Copies, forks, modes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_accelerated_in_the_same_way(pipe, how, dtype):
    expected = draw(cf.accelerate(pipe, dtype=dtype))
    if how == "deepcopy":
        other = copy.deepcopy(pipe)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(pipe))
    else:
        file = io.BytesIO()
        torch.save(pipe, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other.runtime.name == pipe.runtime.name
    assert other.runtime.pipe is other
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    assert torch.equal(draw(other), expected)
    assert not torch.equal(draw(pipe), expected)
    assert copy.deepcopy(cf.restore(pipe)).runtime.name == "reference"


def test_a_copy_that_cannot_be_accelerated_draws_by_the_reference(pipe, monkeypatch, caplog):
    data = pickle.dumps(cf.accelerate(pipe, dtype="float32"))
    reference = draw(cf.restore(pipe))

    def fail(*args, **kwargs):
        raise ValueError("planted")

    monkeypatch.setattr("coalescer_fast.acceleration.accelerate", fail)
    other = pickle.loads(data)
    assert caplog.messages == ["a copy of an accelerated pipeline draws by the reference here: planted"]
    assert torch.equal(draw(other), reference)


def _spawned(pipe, queue) -> None:
    queue.put(draw(pipe).numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(pipe, method):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cf.accelerate(pipe)
        expected = draw(pipe)
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        with pipe.runtime.lock:  # as if another thread held it when the process forked
            child = context.Process(target=_spawned, args=(pipe, queue))
            child.start()
        try:
            assert torch.equal(torch.from_numpy(queue.get(timeout=100)), expected)
        finally:
            child.join(10)
            child.kill()
        assert child.exitcode == 0
        assert torch.equal(draw(pipe), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("order", ["load", "accelerate", "warmup", "call"])
def test_inference_mode_and_outside_in_any_order(pipe, order):
    expected = draw(cf.accelerate(pipe))
    modes = {"load": 0, "accelerate": 1, "warmup": 2, "call": 3}

    def mode(step: str):
        return torch.inference_mode(modes[step] <= modes[order])

    with mode("load"):
        other = cf.CoalescerPipeline.from_pretrained("emoji-64")
        other.set_progress_bar_config(disable=True)
    with mode("accelerate"):
        cf.accelerate(other)
    with mode("warmup"):
        cf.warmup(other, batch_sizes=(2,))
    with mode("call"):
        assert torch.equal(draw(other), expected)
    for enabled in (False, True, False):
        with torch.inference_mode(enabled):
            assert torch.equal(draw(other), expected)
            assert torch.equal(draw(other, 3)[:2], expected)


def test_a_dropped_pipeline_is_gone_at_once():
    gc.collect()
    gc.disable()
    try:
        pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
        pipe.set_progress_bar_config(disable=True)
        draw(cf.accelerate(pipe))
        program = next(iter(pipe.runtime.programs.programs.values()))
        alive = [weakref.ref(each) for each in (pipe, pipe.runtime, pipe.unet, program)]
        del pipe, program
        assert [each() for each in alive] == [None] * 4
    finally:
        gc.enable()


def test_restore_beside_calls(pipe):
    """A call that has begun goes on with the runtime that it began with."""
    accelerated, reference = draw(cf.accelerate(pipe)), draw(cf.restore(pipe))
    stop, wrong = threading.Event(), []

    def toggle():
        while not stop.is_set():
            cf.accelerate(pipe)
            cf.restore(pipe)

    thread = threading.Thread(target=toggle)
    thread.start()
    try:
        for _ in range(20):
            y = draw(pipe)
            wrong += [] if torch.equal(y, accelerated) or torch.equal(y, reference) else [y]
    finally:
        stop.set()
        thread.join()
    assert not wrong


# int8


@int8
def test_another_size_than_calibrated_finds_its_own_ranges(pipe):
    torch.manual_seed(0)
    unet = CoalescerUNet(block_out_channels=(32, 32), norm_num_groups=4, embedding_dim=32, num_attention_heads=2)
    pipe = cf.CoalescerPipeline(seeded(unet), pipe.scheduler, pipe.description_encoder, pipe.vae)
    cf.accelerate(pipe, dtype="int8")
    for size in (8, 16, 4):
        noise = torch.randn(2, 16, size, size, generator=torch.Generator().manual_seed(1))
        conditioning = pipe.runtime.condition(NAMES[:2], torch.device("cpu"))
        with torch.no_grad():
            expected, _ = unet(noise, conditioning, return_dict=False)
            direction, _ = pipe.runtime.evaluate(noise, conditioning)
        assert float((direction - expected).norm() / expected.norm()) < 0.03, size
    assert sorted(pipe.runtime.ranges) == [(4, 4), (8, 8), (16, 16)]
    assert len({len(each) for each in pipe.runtime.ranges.values()}) == 1


@pytest.mark.parametrize("isa", EIGHT_BITS)
def test_int8_of_every_instruction_set(pipe, isa):
    with using(isa):
        cf.accelerate(pipe, dtype="int8")
        assert pipe.runtime.precision == "int8"
        assert pipe.runtime.dtype == (torch.bfloat16 if isa == "avx512_bf16" else torch.float32)
        result = cf.verify(pipe, 2)
        assert re.search(rf"{pipe.runtime.dtype}, \d+ of \d+ products in int8", cf.explain(pipe))
        assert result.passed, str(result)
        assert draw(pipe, 3)[0].equal(draw(pipe, 1)[0])


@int8
def test_a_calibration_that_is_interrupted_leaves_nothing(pipe, monkeypatch):
    expected = draw(cf.accelerate(pipe, dtype="int8"))
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1)  # a change of nothing, but a change
    with_styles, calls = pipe.with_styles, []

    def interrupted(prompts, noise):
        calls.append(prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return with_styles(prompts, noise)

    monkeypatch.setattr(pipe, "with_styles", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe)
    monkeypatch.undo()
    assert torch.equal(draw(pipe), expected)


@int8
def test_int8_of_a_network_without_a_program(pipe):
    reference = draw(pipe)
    with pipe.unet.mid[0].conv1.register_forward_hook(lambda *args: None):
        cf.accelerate(pipe, dtype="int8")
        assert "mid.0.conv1 has a forward hook" in cf.explain(pipe)
        torch.testing.assert_close(draw(pipe), reference, rtol=0, atol=0.05)


def test_explain_says_what_runs_on_the_reference(pipe, monkeypatch):
    monkeypatch.setattr(native_library, "unavailable", lambda: "not here")
    rows = runtime.NativeRuntime(pipe, torch.float32).explain()
    assert {part.name: part.runs_on for part in rows}["conditioning"] == "reference"
