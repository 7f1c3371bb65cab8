from __future__ import annotations

import gc
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

import coalescer_fast as cf
from coalescer_fast import nvtx_ranges
from coalescer_fast.models import CoalescerAutoencoder, CoalescerUNet, DescriptionEncoder
from coalescer_fast.ops import native_library
from coalescer_fast.runtime import base
from coalescer_fast.runtime.cuda import runtime as cuda
from coalescer_fast.runtime.cuda.runtime import CudaRuntime
from coalescer_fast.scheduler import CoalescerScheduler

PROMPTS = ["octopus", "pizza", "rocket", "owl, 3d style", "red apple"]
PLENTY = 10**9


@pytest.fixture
def pipe():
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def fast(pipe, capture):
    """A pipeline whose graphs are captured on the CPU."""
    pipe.runtime = CudaRuntime(pipe, "reference", torch.float32, PLENTY, capture=capture)
    return pipe


@pytest.fixture
def free(capture):
    """Without an anchor, with cross-attention: any size."""
    torch.manual_seed(0)
    unet = CoalescerUNet(4, 12, (8, 8), 1, 4, (1,), False, 2, 6, 6, 16).eval()
    for parameter in unet.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    encoder = cf.CoalescerPipeline.from_pretrained("emoji-64").description_encoder
    table = torch.randint(-127, 128, (encoder.config.vocab_size, 6), dtype=torch.int8)
    encoder = DescriptionEncoder.from_table(
        table.numpy(), torch.full((6,), 1 / 64).numpy(), encoder.vocab.numpy()
    ).eval()
    vae = CoalescerAutoencoder(2, 12, 8, (1, 1), (1, 1)).eval()
    pipe = cf.CoalescerPipeline(unet, CoalescerScheduler(guidance_scale=1.5), encoder, vae)
    pipe.set_progress_bar_config(disable=True)
    pipe.runtime = CudaRuntime(pipe, "reference", torch.float32, PLENTY, capture=capture)
    return pipe


def draw(pipe, prompt=PROMPTS, seed=0, output_type="pt", **kwargs) -> torch.Tensor:
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type=output_type, **kwargs).images


def plainly(pipe, *args, **kwargs) -> torch.Tensor:
    """Step by step, by the same networks: whoever watches the steps is given that."""
    return draw(pipe, *args, callback_on_step_end=lambda *_: {}, **kwargs)


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return -10 * (a - b).square().mean((1, 2, 3)).log10()


@pytest.mark.parametrize("guidance_scale", [None, 1, 2.5])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_graph_draws_what_its_steps_draw(fast, steps, guidance_scale):
    for n in (1, 2, 5):
        for output_type in ("pt", "latent"):
            call = dict(num_inference_steps=steps, guidance_scale=guidance_scale, output_type=output_type)
            expected = plainly(fast, PROMPTS[:n], **call)
            for _ in range(2):
                drawn = draw(fast, PROMPTS[:n], **call)
                assert torch.equal(drawn, expected)
                assert drawn.is_contiguous()
    assert fast.runtime.graphs.captures == 6


@pytest.mark.parametrize("backend", ["reference", *([] if native_library.unavailable() else ["cpu"])])
def test_same_call_same_seed_same_pictures(pipe, capture, backend):
    reference = draw(pipe)
    pipe.runtime = CudaRuntime(pipe, backend, torch.float32, PLENTY, capture=capture)
    assert psnr(draw(pipe), reference).median() > 70
    verification = cf.verify(pipe, prompts=2)
    assert verification.passed, str(verification)
    assert verification.runtime == "cuda"
    assert torch.equal(draw(cf.restore(pipe)), reference)


def test_quality_best_of_and_auto(fast):
    """From a graph as step by step; "auto" has no graph."""
    grading = {"1": [-1.0, 2.0, 0.5, 1.0, 0.5, 2.0], "2": [-1.0, 2.0, 0.5, -3.0, -0.25, 1.0, 0.5, 2.0]}
    fast.scheduler.register_to_config(grading=grading)
    noise = fast.initial_noise(6, torch.Generator().manual_seed(0))
    for given in ({"num_images_per_prompt": 3}, {"best_of": 3}, {"num_images_per_prompt": 3, "num_inference_steps": 1}):
        call = dict(latents=noise, output_type="pt", **given)
        found = fast(PROMPTS[:2], **call)
        again = fast(PROMPTS[:2], **call)
        expected = fast(PROMPTS[:2], **call, callback_on_step_end=lambda *_: {})
        assert found.quality == again.quality == expected.quality
        assert len({*found.quality}) == len(found.quality)
        assert found.num_evaluations == expected.num_evaluations
        assert torch.equal(found.images, expected.images)
    captures = fast.runtime.graphs.captures
    auto = fast(PROMPTS[:2], 3, latents=noise, num_inference_steps="auto", output_type="pt")
    assert fast.runtime.graphs.captures == captures
    for i, used in enumerate(auto.num_evaluations):
        plain = fast(PROMPTS[i // 3], latents=noise[i : i + 1], num_inference_steps=used - 1, output_type="pt")
        torch.testing.assert_close(plain.images[0], auto.images[i], atol=1e-4, rtol=0)


def test_sizes_and_tokens(free):
    for size in (64, 32, 48):
        for _ in range(2):
            assert torch.equal(draw(free, height=size, width=64), plainly(free, height=size, width=64))
    assert [(key.size, key.tokens) for key, _ in free.runtime.graphs.sizes()] == [
        ((h, 16), (77, 77)) for h in (16, 8, 12)
    ]
    assert torch.equal(draw(free, "a very long description " * 20), plainly(free, "a very long description " * 20))


def test_negative_prompts(fast, free):
    """One for all pictures, which has a row of its own in a graph, and one for each."""
    for pipe in (fast, free):
        for negative in ("red apple", ["red apple"] * 4 + ["pizza"], None, "owl", ["owl"] * 4 + ["red apple"]):
            assert torch.equal(draw(pipe, negative_prompt=negative), plainly(pipe, negative_prompt=negative))
        assert not torch.equal(draw(pipe, negative_prompt="owl"), draw(pipe))


def test_embeds(fast, free):
    for pipe in (fast, free):
        found = pipe.encode_prompt(PROMPTS, negative_prompt="owl")
        names = ["prompt_embeds", "prompt_token_embeds", "prompt_attention_mask"][: len(found) // 2]
        given = dict(zip([*names, *(f"negative_{name}" for name in names)], found))
        assert torch.equal(draw(pipe, None, **given), plainly(pipe, None, **given))


def test_latents_that_are_not_finite_are_no_picture(fast, monkeypatch):
    evaluate = fast.runtime.evaluate

    def overflowing(sample, conditioning):
        direction, distance = evaluate(sample, conditioning)
        distance[1] = torch.inf
        return direction, distance

    monkeypatch.setattr(fast.runtime, "evaluate", overflowing)
    with pytest.raises(ValueError, match=r"^R of prompt 'pizza' after step 1 of 2 is not finite"):
        draw(fast)


def test_who_watches_the_steps_is_given_them(fast):
    seen = []
    trace = fast("octopus", return_trace=True).trace
    draw(fast, callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(i) or kwargs)
    assert len(trace) == len(seen) == 2
    assert fast.runtime.graphs.captures == 0


def test_after_a_warmup_nothing_is_captured(fast):
    cf.warmup(fast, batch_sizes=(1, 4))
    graphs = fast.runtime.graphs
    assert graphs.captures == 2
    before = base.count
    draw(fast, "owl")
    draw(fast, PROMPTS[:4], seed=3, guidance_scale=1.7)  # another strength is no other graph
    fast("dog", 4, output_type="pil")
    assert graphs.captures == 2
    assert base.count == before
    cf.warmup(fast, (1,), guidance_scale=1, num_inference_steps=3, output_type="latent")
    assert graphs.captures == 3
    draw(fast, "owl", guidance_scale=1, num_inference_steps=3, output_type="latent")
    draw(fast, PROMPTS)  # a batch size that was not warmed up just works
    assert graphs.captures == 4


def test_another_schedule_is_another_graph(fast):
    before = draw(fast)
    fast.scheduler = CoalescerScheduler.from_config(fast.scheduler.config, etas=(0.4, 0.9), guided_steps="all")
    after = draw(fast)
    assert not torch.equal(after, before)
    assert torch.equal(after, plainly(fast))


def test_changed_weights_take_effect(fast, change_weights):
    before = draw(fast)
    change_weights(fast)
    after = draw(fast)
    assert len(fast.runtime.graphs.held) == 1  # none of the old weights
    assert torch.equal(after, plainly(fast))
    assert not torch.equal(after, before)
    assert psnr(after, draw(cf.restore(fast))).median() > 70


def test_pictures_are_not_overwritten_by_the_next_call(fast):
    first = draw(fast, output_type="latent")
    kept = first.clone()
    draw(fast, seed=1, output_type="latent")
    assert torch.equal(first, kept)


def test_eviction_and_a_cap_change_no_picture(pipe, capture):
    for most_bytes, most_graphs in ((PLENTY, 2), (100_000, 10), (1, 10), (0, 10)):
        pipe.runtime = CudaRuntime(pipe, "reference", torch.float32, most_bytes, most_graphs, type(capture)())
        for n in (1, 2, 3, 1, 3):
            assert torch.equal(draw(pipe, PROMPTS[:n]), plainly(pipe, PROMPTS[:n]))
            held = pipe.runtime.graphs
            assert len(held.held) <= most_graphs
            assert held.bytes() <= most_bytes or len(held.held) == 1
    assert held.captures == 0


def test_release_gives_everything_back(fast):
    before = draw(fast)
    assert fast.runtime.graphs.bytes() > 0
    fast.runtime.release()
    assert fast.runtime.graphs.bytes() == 0
    assert torch.equal(draw(fast), before)


def test_threads_may_draw_at_once(fast):
    calls = [(PROMPTS[: 1 + i % 3], i, 1 + i % 2) for i in range(12)]

    def one(call):
        prompts, seed, steps = call
        return draw(fast, prompts, seed, num_inference_steps=steps)

    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(one, calls))
    assert all(torch.equal(images, one(call)) for images, call in zip(at_once, calls))
    assert fast.runtime.graphs.captures == 6


def test_many_shapes_leave_memory_flat(free):
    def loop(start: int, stop: int) -> int:
        for i in range(start, stop):
            draw(
                free,
                "dog",
                num_inference_steps=1,
                height=8 * (1 + i % 15),
                width=8 * (1 + i // 15),
                output_type="latent",
            )
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    draw(free, "dog", height=120, width=160)  # the largest of all
    before = loop(0, 50)
    assert loop(50, 150) - before < 20_000  # kilobytes
    graphs = free.runtime.graphs
    assert graphs.captures == 151
    assert len(graphs.held) == graphs.most


def test_a_profiler_sees_the_graph(fast, monkeypatch):
    seen = []
    monkeypatch.setattr(nvtx_ranges, "_open", lambda name, domain: seen.append(name) or nullcontext())
    draw(fast)
    assert seen[:4] == ["encode", "condition", "graph", "evaluate[0]"]
    seen.clear()
    draw(fast)
    monkeypatch.setattr(type(fast.runtime.graphs.capture), "turn", None)  # nobody asks for a graph
    assert [name for name in seen if not name.startswith("evaluate")] == ["encode", "condition", "graph"]
    draw(fast, callback_on_step_end=lambda *_: {})
    assert seen[-4:] == ["evaluate[0]", "evaluate[1]", "evaluate_empty[1]", "decode"]


def test_explain_names_ops_and_graphs(fast, free):
    cf.warmup(fast, (1, 4))
    fast("dog", num_inference_steps=1, guidance_scale=1, output_type="latent")
    lines = cf.explain(fast).splitlines()
    assert lines[0].split() == ["part", "runs", "on", "because"]
    assert any(line.startswith("group_norm_silu") and " reference " in line for line in lines)
    held = [line for line in lines if line.startswith("graph ")]
    assert "batch 1, latents 8x8, 2 steps, 1 guided, decoder" in held[0]
    assert "batch 1, latents 8x8, 1 step " in held[2]
    assert all(line.endswith(" MB") for line in held)
    assert "3 of 16" in lines[-1]
    draw(free)
    assert "77 tokens" in cf.explain(free)


def test_explain_says_why_an_op_runs_where_it_does(pipe, capture):
    pipe.runtime = CudaRuntime(pipe, "auto", torch.float32, PLENTY, capture=capture)
    rows = {part.name: part for part in pipe.runtime.explain()}
    if native_library.unavailable():
        assert rows["dual_head"].backend == "reference"
        assert f"not on cpu: {native_library.unavailable()}" in rows["dual_head"].because
    else:
        assert rows["dual_head"] == base.Part("dual_head", "cpu", "it can run", backend="cpu")


def test_bytes_for_graphs(monkeypatch):
    monkeypatch.setenv(cuda.VARIABLE, "12345")
    assert cuda.graph_bytes(torch.device("cuda:0")) == 12345
    monkeypatch.setenv(cuda.VARIABLE, "2 GB")
    with pytest.raises(
        ValueError, match="COALESCER_FAST_GRAPH_BYTES is '2 GB'; expected a number of bytes, 0 for no CUDA graphs"
    ):
        cuda.graph_bytes(torch.device("cuda:0"))


def on_gpu(dtype="auto"):
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    return cf.accelerate(pipe.to("cuda"), dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gpu_same_pictures_within_the_budget(dtype):
    pipe = on_gpu(dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # of the reference, too
        verification = cf.verify(pipe)
        assert verification.passed, str(verification)
        for n in (1, 2, 5):
            drawn = draw(pipe, PROMPTS[:n])
            assert torch.equal(draw(pipe, PROMPTS[:n]), drawn)
            assert psnr(plainly(pipe, PROMPTS[:n]), drawn).min() > 40


@pytest.mark.gpu
def test_gpu_noise_is_that_of_the_cpu():
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    reference = draw(pipe)
    assert psnr(draw(on_gpu()).cpu(), reference).median() > 35


@pytest.mark.gpu
def test_gpu_after_a_warmup_nothing_is_captured():
    pipe = on_gpu()
    cf.warmup(pipe, (1, 4))
    captures = pipe.runtime.graphs.captures
    draw(pipe, "owl")
    draw(pipe, PROMPTS[:4], guidance_scale=1.7)
    assert pipe.runtime.graphs.captures == captures == 2


@pytest.mark.gpu
def test_gpu_streams_and_threads():
    pipe = on_gpu()
    calls = [(PROMPTS[: 1 + i % 3], i) for i in range(24)]
    expected = [draw(pipe, *call) for call in calls]

    def one(call):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            images = draw(pipe, *call)
        stream.synchronize()
        return images

    assert all(torch.equal(one(call), images) for call, images in zip(calls, expected))
    pipe.runtime.release()  # so that they capture beside each other, too
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(one, calls), expected))


@pytest.mark.gpu
def test_gpu_two_pipelines_capture_at_once():
    pipes = [on_gpu() for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(draw, pipes)
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_gpu_eviction_and_memory():
    pipe = on_gpu()
    expected = {n: draw(pipe, "dog", num_images_per_prompt=n) for n in range(1, 21)}
    for most_bytes, most_graphs in ((PLENTY, 3), (8 << 20, 16), (1, 16), (0, 16)):
        pipe.runtime = CudaRuntime(pipe, "auto", pipe.runtime.dtype, most_bytes, most_graphs)
        for n in expected:
            assert psnr(draw(pipe, "dog", num_images_per_prompt=n), expected[n]).min() > 40
    pipe.runtime = CudaRuntime(pipe, "auto", pipe.runtime.dtype, PLENTY, 3)

    def loop() -> int:
        for n in expected:
            draw(pipe, "dog", num_images_per_prompt=n)
        pipe.runtime.release()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = loop()
    for _ in range(4):
        assert loop() <= before + (8 << 20)


@pytest.mark.gpu
def test_gpu_changed_weights_take_effect():
    pipe = on_gpu("float32")
    before = draw(pipe)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.2)
    after = draw(pipe)
    assert not torch.equal(after, before)
    assert psnr(after, draw(cf.restore(pipe))).median() > 50


@pytest.mark.gpu
def test_gpu_moved_pipeline_is_refused():
    pipe = on_gpu()
    pipe.to("cpu")
    with pytest.raises(ValueError, match="was accelerated on cuda:0 and is on cpu: accelerate it again, or restore it"):
        pipe("octopus")
