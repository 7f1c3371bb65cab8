from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import coalescer_fast as cf
from coalescer_fast import acceleration
from coalescer_fast.models import CoalescerUNet
from coalescer_fast.models.unet import Conditioning
from coalescer_fast.runtime import base
from coalescer_fast.runtime.engines import per_shape
from coalescer_fast.runtime.engines.per_shape import Evaluation, PerShapeRuntime, traceable
from coalescer_fast.runtime.native.module import native_bfloat16

PROMPTS = ["octopus", "pizza"]


def load():
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt=PROMPTS, **kwargs) -> torch.Tensor:
    return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="pt", **kwargs).images


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Decibels, a picture."""
    return -10 * (a - b).square().mean((1, 2, 3)).log10()


def plain(module, args, dtype, folder):
    """Prepares nothing: what is tested is what stands around it."""
    return lambda rest: lambda x: module(x, *rest)


@pytest.fixture
def pipe():
    """Accelerated by `plain`: its results are the reference's, to the bit."""
    pipe = load()
    pipe.runtime = PerShapeRuntime(pipe, "plain", plain, torch.float32)
    pipe.runtime.backend = "reference"
    return pipe


def test_what_is_prepared_is_the_reference(pipe):
    accelerated = [draw(pipe), draw(pipe, guidance_scale=1.0, num_inference_steps=1)]
    cf.restore(pipe)
    expected = [draw(pipe), draw(pipe, guidance_scale=1.0, num_inference_steps=1)]
    assert all(torch.equal(y, e) for y, e in zip(accelerated, expected))


def test_changed_weights_take_effect(pipe, change_weights):
    before = draw(pipe)
    change_weights(pipe)
    after = draw(pipe)
    assert not torch.equal(after, before)
    assert torch.equal(after, draw(cf.restore(pipe)))


def test_networks_of_the_last_sizes_are_kept_and_nothing_of_a_call(pipe, monkeypatch):
    monkeypatch.setattr(per_shape, "LIMIT", 4)
    for n in range(1, 6):
        draw(pipe, num_images_per_prompt=n)
    assert [key[:2] for key in pipe.runtime.networks] == [
        (part, (2 * n, 16, 8, 8)) for n in (4, 5) for part in ("UNet", "decoder")
    ]
    gc.collect()
    assert not pipe.runtime.bound
    before = base.count
    draw(pipe, num_images_per_prompt=4)
    assert base.count == before
    draw(pipe)
    assert base.count == before + 2


def test_a_conditioning_serves_several_sizes_and_inference_mode():
    torch.manual_seed(0)
    small = dict(
        block_out_channels=(8, 8), norm_num_groups=4, embedding_dim=8, attention_levels=(1,), num_attention_heads=2
    )
    whole = load()
    pipe = cf.CoalescerPipeline(CoalescerUNet(**small), whole.scheduler, whole.description_encoder, whole.vae)
    runtime = PerShapeRuntime(pipe, "plain", plain, torch.float32)
    with torch.inference_mode():
        conditioning = runtime.condition(PROMPTS, runtime.device)
        for sample in (torch.randn(2, 16, 8, 8), torch.randn(2, 16, 4, 8).to(memory_format=torch.channels_last)):
            for y, expected in zip(runtime.evaluate(sample, conditioning), pipe.evaluate(sample, conditioning)):
                assert torch.equal(y, expected)
    assert len(runtime.bound) == 2


def test_what_cannot_be_prepared_is_one_sentence(pipe):
    def fail(*args):
        raise RuntimeError("no compiler\nwas found\n\nTraceback, and much more")

    pipe.runtime.prepare = fail
    with pytest.raises(ValueError, match=r"^backend 'plain' cannot prepare the networks: no compiler was found$"):
        draw(pipe)


def test_cross_attention_and_its_mask_as_plain_tensors():
    torch.manual_seed(0)
    unet = CoalescerUNet(4, 3, (8, 8), 1, 4, (1,), True, 2, 6, 5, 16).eval()
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.2)
    rows, mask = torch.randn(2, 4, 6), torch.tensor([[True, True, False, False], [True] * 4])
    with torch.no_grad():
        conditioning = unet.condition(torch.randn(2, 5), rows, mask)
        assert isinstance(conditioning, Conditioning)
        evaluation, sample = Evaluation(unet, conditioning), torch.randn(2, 3, 4, 4)
        found = evaluation(sample, *evaluation.flatten(conditioning, torch.float32))
        assert all(torch.equal(y, e) for y, e in zip(found, unet(sample, conditioning, return_dict=False)))


def inference_mode(on: bool):
    return torch.inference_mode() if on else nullcontext()


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_inference_mode_in_any_order(loaded, accelerated, first):
    with inference_mode(loaded):
        pipe = load()
    expected = draw(pipe)
    with inference_mode(accelerated):
        pipe.runtime = PerShapeRuntime(pipe, "plain", plain, torch.float32)
        pipe.runtime.backend = "reference"
    for mode in (first, not first):
        with inference_mode(mode):
            assert torch.equal(draw(pipe), expected)


def test_a_dropped_pipeline_is_freed_at_once(pipe):
    whole = load()
    whole.runtime = PerShapeRuntime(whole, "plain", plain, torch.float32)
    draw(whole)
    seen = [weakref.ref(each) for each in (whole, whole.runtime, whole.unet)]
    gc.disable()
    try:
        del whole
        assert [each() for each in seen] == [None] * 3
    finally:
        gc.enable()


def _child(pipe, queue) -> None:
    try:
        draw(pipe)
    except ValueError as error:
        queue.put(str(error))
    pipe.runtime = PerShapeRuntime(pipe, "plain", plain, torch.float32)
    queue.put(draw(pipe).shape)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_what_was_prepared_before_a_fork_is_refused_after_it(pipe):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with pipe.runtime.lock:  # as if another thread held it
        child = context.Process(target=_child, args=(pipe, queue))
        child.start()
    try:
        assert (
            queue.get(timeout=60)
            == "backend 'plain' was prepared before a fork, and its threads are not here: accelerate again"
        )
        assert queue.get(timeout=60) == (2, 3, 64, 64)
    finally:
        child.join(10)
        child.kill()
    draw(pipe)


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
def test_what_no_prepared_network_would_call_is_refused_and_may_go_again(pipe, how):
    expected = draw(pipe)
    layer = pipe.vae.decoder.layers[0]
    if how == "forward":
        layer.forward = lambda x: torch.zeros_like(x)
    else:
        register = layer.register_forward_hook if how == "hook" else layer.register_forward_pre_hook
        handle = register(lambda *args: None)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^backend 'plain' cannot run .*decoder: .*layers\.0.*remove it, or .*restore.*$"
        ):
            draw(pipe)
    if how == "forward":
        del layer.forward
    else:
        handle.remove()
    assert torch.equal(draw(pipe), expected)


def change_activation(pipe):
    pipe.vae.decoder.layers[1] = nn.LeakyReLU(0.3)


def change_eps(pipe):
    pipe.unet.norm_out.eps = 0.5


def change_heads(pipe):
    next(m for m in pipe.unet.modules() if hasattr(m, "num_heads")).num_heads = 1


@pytest.mark.parametrize("change", [change_activation, change_eps, change_heads])
def test_changed_layers_take_effect(pipe, change):
    before = draw(pipe)
    change(pipe)
    after = draw(pipe)
    assert not torch.equal(after, before)
    assert torch.equal(after, draw(cf.restore(pipe)))


def test_what_is_traced_has_weights_of_its_own():
    """Whatever those of the network are: views of one vector, permuted, expanded, negated, tied, in another dtype."""
    network = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(6)), nn.BatchNorm2d(4))
    with torch.no_grad():
        vector = nn.utils.parameters_to_vector(network.parameters())
        nn.utils.vector_to_parameters(vector, network.parameters())
        network[0].weight.data = network[0].weight.data.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
        network[1].bias.data = torch.full((1,), 1.5, dtype=torch.float32).expand(4)
        network[2].weight.data = torch._neg_view(network[2].weight.data)
        network[3].weight = network[4].weight
        network[5].weight.data = network[5].weight.data.double()
        network[6].running_mean = torch._neg_view(torch.arange(4, dtype=torch.float64))
    traced = traceable(network)
    assert [name for name, _ in traced.named_parameters()] == [name for name, _ in network.named_parameters()]
    assert traced[3].weight is traced[4].weight
    places = set()
    for mine, its in zip(
        (*traced.parameters(), *traced.buffers()), (*network.parameters(), *network.buffers()), strict=True
    ):
        assert torch.equal(mine.double(), its.double())
        assert mine.is_contiguous()
        assert not mine.is_neg()
        assert mine.dtype == (torch.float32 if mine.is_floating_point() else its.dtype)
        assert mine.untyped_storage().nbytes() == mine.nbytes
        places.add(mine.data_ptr())
    assert len(places) == len([*traced.parameters(), *traced.buffers()])
    assert places.isdisjoint({each.data_ptr() for each in (*network.parameters(), *network.buffers())})


# every backend that is made of it, as users have it


def engines():
    for name, dtype in (
        ("onnxruntime", "float32"),
        ("openvino", "float32"),
        ("openvino", "bfloat16"),
        ("compile", "auto"),
    ):
        marks = [pytest.mark.slow] if name == "compile" else []
        missing = [
            package for package in acceleration.RUNTIMES[name].packages if importlib.util.find_spec(package) is None
        ]
        if missing or (dtype == "bfloat16" and not native_bfloat16()):
            marks.append(pytest.mark.skip(reason=f"{', '.join(missing) or 'bfloat16 of the CPU'} is missing"))
        yield pytest.param((name, dtype), marks=marks, id=f"{name}-{dtype}")


@pytest.fixture(scope="module", params=engines())
def engine(request):
    """A pipeline by one of the backends, warmed up for one and two pictures."""
    name, dtype = request.param
    pipe = cf.accelerate(load(), name, dtype)
    assert "not prepared yet" in cf.explain(pipe)
    cf.warmup(pipe, batch_sizes=(1, 2))
    return pipe


def test_same_call_same_seed_same_pictures(engine):
    before = base.count
    drawn = draw(engine)
    kept = drawn.clone()
    assert torch.equal(draw(engine), drawn)  # two runs, equal bits
    draw(engine, ["rocket", "ghost"])
    draw(engine, "owl")
    assert base.count == before  # the warm-up has prepared all
    assert torch.equal(drawn, kept)
    expected = draw(load())
    assert drawn.dtype == torch.float32
    assert psnr(drawn, expected).min() > (70 if engine.runtime.dtype == torch.float32 else 35)


def test_results_are_not_written_to_by_a_later_call(engine):
    runtime, sample = engine.runtime, torch.randn(2, 1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditioning = runtime.condition(["octopus"], runtime.device)
        results = [*runtime.evaluate(sample[0], conditioning), runtime.decode(sample[0])]
        kept = [y.clone() for y in results]
        later = [*runtime.evaluate(sample[1], conditioning), runtime.decode(sample[1])]
        expected = [
            *engine.evaluate(sample[0], engine.condition(["octopus"], runtime.device)),
            engine.decode(sample[0]),
        ]
    for y, k, other, e in zip(results, kept, later, expected):
        assert y.dtype == torch.float32
        assert torch.equal(y, k)
        assert not torch.equal(y, other)
        assert float((y - e).norm() / e.norm()) < (1e-4 if runtime.dtype == torch.float32 else 5e-2)


def test_threads_may_draw_at_once(engine):
    runtime, noise = engine.runtime, torch.randn(4, 1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    shared = runtime.condition(["octopus"], runtime.device)

    def evaluate(i: int) -> list[torch.Tensor]:
        with torch.inference_mode(i % 2 == 0), torch.no_grad():
            own = runtime.condition([PROMPTS[i % 2]], runtime.device)
            return [*runtime.evaluate(noise[i], own), *runtime.evaluate(noise[i], shared), runtime.decode(noise[i])]

    before = base.count
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(evaluate, range(4)))
    assert base.count == before
    for i, results in enumerate(at_once):
        assert all(torch.equal(a, b) for a, b in zip(results, evaluate(i)))


def test_prepared_in_inference_mode(engine):
    name, dtype = engine.runtime.name, str(engine.runtime.dtype).removeprefix("torch.")
    with torch.inference_mode():
        pipe = cf.accelerate(load(), name, dtype)
        cf.warmup(pipe)
    expected = draw(load(), "octopus")
    drawn = draw(pipe, "octopus")
    assert psnr(drawn, expected).min() > (70 if dtype == "float32" else 35)
    with torch.inference_mode():
        assert torch.equal(draw(pipe, "octopus"), drawn)


def test_verify_passes(engine):
    result = cf.verify(engine, ["octopus", "pizza"])
    assert result.passed, str(result)
    assert result.runtime == engine.runtime.name
    assert any(row.what.startswith("coalesce_step") for row in result.rows)
    before = base.count
    draw(engine)
    assert base.count == before  # it has left all as it was


def test_a_new_size_and_new_weights_just_work(engine):
    expected = draw(load(), ["octopus", "pizza", "rocket"])
    for names in ("octopus", ["octopus", "pizza"]):
        draw(engine, names)
    before = base.count
    assert psnr(draw(engine, ["octopus", "pizza", "rocket"]), expected).min() > 35
    assert base.count == before + 2
    assert "inputs 1x16x8x8, 2x16x8x8, 3x16x8x8" in cf.explain(engine)
    if engine.runtime.name == "compile":  # takes too long, and `plain` above is tested for it
        return
    with torch.no_grad():
        engine.unet.conv_in.weight.mul_(1.2)
    after = draw(engine, "octopus")
    assert "inputs 1x16x8x8\n" in cf.explain(engine) + "\n"
    runtime = engine.runtime
    cf.restore(engine)
    assert psnr(after, draw(engine, "octopus")).min() > 35
    engine.runtime = runtime
