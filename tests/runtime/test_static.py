from __future__ import annotations

import gc
import importlib.util
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import coalescer_fast as cf
from coalescer_fast import acceleration
from coalescer_fast.models import CoalescerUNet
from coalescer_fast.models.unet import Conditioning
from coalescer_fast.runtime import base, static
from coalescer_fast.runtime.cpu import native_bfloat16
from coalescer_fast.runtime.static import Evaluation, StaticRuntime

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
    pipe.runtime = StaticRuntime(pipe, "plain", plain, torch.float32)
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
    monkeypatch.setattr(static, "LIMIT", 4)
    for n in range(1, 6):
        draw(pipe, num_images_per_prompt=n)
    assert [key[:2] for key in pipe.runtime.networks] == [(part, (2 * n, 16, 8, 8)) for n in (4, 5) for part in ("UNet", "decoder")]
    gc.collect()
    assert not pipe.runtime.bound
    before = base.count
    draw(pipe, num_images_per_prompt=4)
    assert base.count == before
    draw(pipe)
    assert base.count == before + 2


def test_a_conditioning_serves_several_sizes_and_inference_mode():
    torch.manual_seed(0)
    small = dict(block_out_channels=(8, 8), norm_num_groups=4, embedding_dim=8, attention_levels=(1,), num_attention_heads=2)
    whole = load()
    pipe = cf.CoalescerPipeline(CoalescerUNet(**small), whole.scheduler, whole.description_encoder, whole.vae)
    runtime = StaticRuntime(pipe, "plain", plain, torch.float32)
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


# every backend that is made of it, as users have it


def engines():
    for name, dtype in (("onnxruntime", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"), ("compile", "auto")):
        marks = [pytest.mark.slow] if name == "compile" else []
        missing = [package for package in acceleration.BACKENDS[name].packages if importlib.util.find_spec(package) is None]
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
        expected = [*engine.evaluate(sample[0], engine.condition(["octopus"], runtime.device)), engine.decode(sample[0])]
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


def test_verify_passes(engine):
    result = cf.verify(engine, ["octopus", "pizza"])
    assert result.passed, str(result)
    assert result.runtime == engine.runtime.name
    assert any(row.what.startswith("coalesce_step") for row in result.rows)


def test_a_new_size_and_new_weights_just_work(engine):
    expected = draw(load(), ["octopus", "pizza", "rocket"])
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
    runtime, engine.runtime = engine.runtime, None
    assert psnr(after, draw(engine, "octopus")).min() > 35
    engine.runtime = runtime
