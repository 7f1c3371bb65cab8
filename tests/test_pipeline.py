from __future__ import annotations

import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coalescer_fast import CoalescerPipeline

from .helpers.pipelines import FREE, SIZE, noise, seed, tiny_pipeline

ATOL = 1e-5  # float32 sums in another order, on latents of size 1


@pytest.fixture(scope="module")
def pipe() -> CoalescerPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def free() -> CoalescerPipeline:
    """Without an anchor, with cross-attention: any size."""
    return tiny_pipeline(FREE)


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


def sample(pipe: CoalescerPipeline, prompt="octopus", **kwargs) -> torch.Tensor:
    return pipe(prompt, output_type="latent", **kwargs).images


def test_same_seed_same_bits(pipe):
    first, second = (pipe(["octopus", ""], 2, generator=seed(), output_type="np").images for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, pipe(["octopus", ""], 2, generator=seed(1), output_type="np").images)


def test_without_a_generator_the_global_one_draws(pipe):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = sample(pipe), sample(pipe)
        torch.manual_seed(3)
        assert torch.equal(sample(pipe), first)
    assert not torch.equal(first, second)


def test_a_generator_goes_on(pipe):
    generator = seed()
    assert not torch.equal(sample(pipe, generator=generator), sample(pipe, generator=generator))


def test_noise_is_standard_normal_and_drawn_first(pipe):
    assert torch.equal(
        sample(pipe, ["octopus", "cat"], generator=seed()), sample(pipe, ["octopus", "cat"], latents=noise(2))
    )  # torch.randn of the shape, float32, on the CPU


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_alone_or_in_a_batch(pipe, free, guidance_scale):
    prompts = ["octopus", "", "cat, 3d style", "red dog", "zebra"]
    for pipeline in (pipe, free):
        latents = noise(5)
        out = pipeline(prompts, output_type="latent", latents=latents, guidance_scale=guidance_scale, return_trace=True)
        # a unit step divides by a direction's length, and so its rounding
        atol = ATOL / min(1.0, *(float(step.direction_length.min()) for step in out.trace))
        for i, prompt in enumerate(prompts):
            alone = sample(pipeline, prompt, latents=latents[i : i + 1], guidance_scale=guidance_scale)
            torch.testing.assert_close(alone[0], out.images[i], rtol=ATOL, atol=atol)


def test_list_of_generators_equals_single_ones(pipe):
    prompts = ["octopus", "cat"]
    together = sample(pipe, prompts, generator=[seed(5), seed(6)])
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(sample(pipe, prompt, generator=seed(5 + i))[0], together[i], rtol=ATOL, atol=ATOL)


def test_pictures_are_prompt_major(pipe):
    latents = noise(4)
    drawn = sample(pipe, ["octopus", "cat"], num_images_per_prompt=2, latents=latents)
    torch.testing.assert_close(drawn[:2], sample(pipe, "octopus", num_images_per_prompt=2, latents=latents[:2]), rtol=ATOL, atol=ATOL)
    torch.testing.assert_close(drawn[2:], sample(pipe, "cat", num_images_per_prompt=2, latents=latents[2:]), rtol=ATOL, atol=ATOL)


def test_given_latents_are_not_modified(pipe):
    latents = noise(2)
    sample(pipe, ["octopus", "cat"], latents=latents)
    assert torch.equal(latents, noise(2))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_generators(pipe, count):
    with pytest.raises(ValueError, match=f"generator is a list of {count}; expected one for each of the 2 pictures"):
        pipe(["octopus", "cat"], generator=[seed() for _ in range(count)])


class CudaGenerator(torch.Generator):
    """Says that it is on a GPU, where there is none."""

    device = torch.device("cuda")


def test_generator_of_another_device(pipe):
    with pytest.raises(ValueError, match="Cannot generate a cpu tensor from a generator of type cuda"):
        pipe("octopus", generator=CudaGenerator())


@pytest.mark.parametrize("generator", [0, "seed", [0]], ids=repr)
def test_what_is_no_generator(pipe, generator):
    with pytest.raises((TypeError, ValueError), match="generator is"):
        pipe("octopus", generator=generator)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 4, 5), (1, 4, 4, 4), (3, 4, 4), (1, 3, 8, 8)], ids=str)
def test_latents_of_another_shape(pipe, shape):
    with pytest.raises(ValueError, match=r"latents has shape \(.*\); expected \(1, 3, 4, 4\)"):
        pipe("octopus", latents=torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_latents_that_are_no_floating_point_numbers(pipe, dtype):
    with pytest.raises(TypeError, match=f"latents is {dtype}"):
        pipe("octopus", latents=torch.zeros(1, 3, 4, 4, dtype=dtype))


def test_latents_that_are_no_tensor(pipe):
    with pytest.raises(TypeError, match="latents is ndarray"):
        pipe("octopus", latents=np.zeros((1, 3, 4, 4)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_latents_of_another_precision(pipe, dtype):
    latents = noise(1).to(dtype)
    drawn = sample(pipe, latents=latents)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, sample(pipe, latents=latents.float()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_latents_that_are_not_finite(pipe, value):
    latents = noise(1)
    latents[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="latents"):
        pipe("octopus", latents=latents)


@pytest.fixture
def evaluations(pipe):
    """Counts the network's evaluations, by batch size."""
    calls: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    yield calls
    handle.remove()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 2),
        ({"guidance_scale": 1}, 2),
        ({"guidance_scale": 1.5}, 3),
        ({"guidance_scale": 0.0}, 3),
        ({"guidance_scale": 1.5, "num_inference_steps": 1}, 2),
        ({"num_inference_steps": 5}, 5),
        ({"guidance_scale": 2.0, "num_inference_steps": 5}, 6),
    ],
    ids=str,
)
def test_network_evaluations(pipe, evaluations, arguments, expected):
    pipe(["octopus", "cat"], 3, **arguments)
    assert evaluations == [6] * expected


def test_the_model_has_a_guidance_of_its_own(pipe):
    guided = tiny_pipeline(guidance_scale=1.5)
    assert torch.equal(sample(guided, latents=noise(1)), sample(pipe, latents=noise(1), guidance_scale=1.5))
    assert torch.equal(sample(guided, latents=noise(1), guidance_scale=1), sample(pipe, latents=noise(1)))
    assert not torch.allclose(sample(pipe, latents=noise(1)), sample(pipe, latents=noise(1), guidance_scale=1.5))


def test_guidance_in_every_step():
    pipeline = tiny_pipeline(guided_steps="all")
    calls: list[None] = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(None))
    pipeline("octopus", guidance_scale=1.5)
    assert len(calls) == 4


def test_guidance_of_the_empty_description_changes_nothing(pipe):
    torch.testing.assert_close(
        sample(pipe, "", latents=noise(1), guidance_scale=3.0), sample(pipe, "", latents=noise(1)), rtol=ATOL, atol=ATOL
    )


@pytest.mark.parametrize("scale", [math.inf, math.nan, "strong"], ids=repr)
def test_wrong_guidance(pipe, scale):
    with pytest.raises((TypeError, ValueError), match=f"guidance_scale is .*{scale}"):
        pipe("octopus", guidance_scale=scale)


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_step_counts(pipe, evaluations, steps):
    assert sample(pipe, num_inference_steps=steps, generator=seed()).isfinite().all()
    assert len(evaluations) == steps


def test_a_thousand_steps_stay_finite(pipe):
    drawn = sample(pipe, num_inference_steps=1000, generator=seed())
    assert drawn.isfinite().all()
    assert drawn.square().mean().sqrt() < 100  # no slow runaway either: R starts at 1


@pytest.mark.parametrize("steps", [0, -1, True, 2.5, "2", None], ids=repr)
def test_wrong_step_counts(pipe, steps):
    with pytest.raises(ValueError, match="num_inference_steps is") as caught:
        pipe("octopus", num_inference_steps=steps)
    assert repr(steps) in str(caught.value)


def test_a_call_does_not_depend_on_the_calls_before(pipe):
    expected = sample(pipe, latents=noise(1))
    sample(pipe, num_inference_steps=7, guidance_scale=2.0)
    assert torch.equal(sample(pipe, latents=noise(1)), expected)


def test_output_types(pipe):
    call = {"num_images_per_prompt": 2, "latents": noise(2)}
    pictures = pipe("octopus", **call).images
    assert [type(p) for p in pictures] == [Image.Image] * 2
    assert {p.size for p in pictures} == {(SIZE, SIZE)}
    assert {p.mode for p in pictures} == {"RGB"}
    array = pipe("octopus", **call, output_type="np").images
    assert array.shape == (2, SIZE, SIZE, 3)
    assert array.dtype == np.float32
    assert 0 <= array.min() < array.max() <= 1
    assert np.array_equal(np.asarray(pictures[1]), (array[1] * 255).round().astype(np.uint8))
    tensor = pipe("octopus", **call, output_type="pt").images
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    latents = pipe("octopus", **call, output_type="latent").images
    assert latents.shape == (2, 3, 4, 4)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents).sample
    torch.testing.assert_close(decoded.div(2).add(0.5).clamp(0, 1), tensor)


@pytest.mark.parametrize("output_type", ["png", None, 1], ids=repr)
def test_wrong_output_types(pipe, output_type):
    with pytest.raises(ValueError, match=f"output_type is {output_type!r}; use one of pil, np, pt, latent"):
        pipe("octopus", output_type=output_type)


def test_tuple_output(pipe):
    (images,) = pipe("octopus", latents=noise(1), output_type="pt", return_dict=False)
    assert torch.equal(images, pipe("octopus", latents=noise(1), output_type="pt").images)
    images, trace = pipe("octopus", latents=noise(1), output_type="pt", return_dict=False, return_trace=True)
    assert len(trace) == 2


def test_nothing_is_differentiated(pipe):
    assert not sample(pipe, latents=noise(1).requires_grad_()).requires_grad


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@torch.no_grad()
def test_trace_equals_a_computation_by_hand(pipe, guidance_scale):
    prompts, latents = ["octopus, flat style", "red dog, 3d style"], noise(2)
    output = pipe(prompts, latents=latents, output_type="latent", return_trace=True, guidance_scale=guidance_scale)
    assert len(output.trace) == 2
    description, empty = pipe.description_encoder(prompts), torch.zeros(2, 6)

    point = latents.double()
    network = tiny_pipeline().unet.double()
    for i, step in enumerate(output.trace):
        torch.testing.assert_close(step.sample.double(), point, rtol=ATOL, atol=ATOL)
        direction, distance = network(point, description.double(), return_dict=False)
        length = (direction**2).mean((1, 2, 3)) ** 0.5
        torch.testing.assert_close(step.distance.double(), distance, rtol=ATOL, atol=ATOL)
        torch.testing.assert_close(step.direction_length.double(), length, rtol=ATOL, atol=ATOL)
        column = distance.view(-1, 1, 1, 1)
        if i == 0:
            point = point + 0.5 * column * direction
        else:
            away, far = network(point, empty.double(), return_dict=False)
            direction = direction + (guidance_scale - 1) * (direction - (far / distance).view(-1, 1, 1, 1) * away)
            point = point + column * direction / (direction**2).mean((1, 2, 3), keepdim=True) ** 0.5
    torch.testing.assert_close(output.images.double(), point, rtol=ATOL, atol=ATOL)


def test_trace_only_when_asked(pipe):
    assert pipe("octopus").trace is None


def test_callback_sees_every_step(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((pipeline is pipe, step, int(timestep), tensors["latents"].clone()))

    drawn = sample(pipe, latents=noise(1), callback_on_step_end=callback)
    trace = pipe("octopus", latents=noise(1), return_trace=True).trace
    assert [entry[:3] for entry in seen] == [(True, 0, 0), (True, 1, 1)]
    assert torch.equal(seen[0][3], trace[1].sample)
    assert torch.equal(seen[1][3], drawn)


def test_callback_replaces_latents(pipe):
    replacement = noise(1, value=9)

    def callback(pipeline, step, timestep, tensors):
        return {"latents": replacement} if step == 0 else {}

    output = pipe("octopus, 3d style", latents=noise(1), output_type="latent", return_trace=True, callback_on_step_end=callback)
    assert torch.equal(output.trace[1].sample, replacement)
    assert not torch.equal(output.images, sample(pipe, "octopus, 3d style", latents=noise(1)))


def test_unknown_callback_tensors(pipe):
    with pytest.raises(ValueError, match=r"callback_on_step_end_tensor_inputs has \['noise'\]; allowed: \['latents'\]"):
        pipe("octopus", callback_on_step_end=lambda *_: None, callback_on_step_end_tensor_inputs=["latents", "noise"])


@pytest.mark.parametrize("name", ["height", "width"])
@pytest.mark.parametrize("pixels", [0, -8, 12, 17, 16.0, True, "16"], ids=repr)
def test_wrong_sizes(pipe, free, name, pixels):
    for pipeline in (pipe, free):
        with pytest.raises(ValueError, match=f"{name} is .*; expected a positive multiple of 8") as caught:
            pipeline("octopus", **{name: pixels})
        assert repr(pixels) in str(caught.value)


def test_a_model_with_an_anchor_has_one_size(pipe):
    assert pipe("octopus", height=SIZE, width=SIZE, output_type="pt").images.shape == (1, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match="width is 32; this model has an anchor and draws 16 pixels only"):
        pipe("octopus", width=32)


@pytest.mark.parametrize(("height", "width"), [(16, 32), (8, 8), (40, 24), (None, 32)])
def test_a_model_without_an_anchor_has_any_size(free, height, width):
    picture = free("octopus", height=height, width=width).images[0]
    assert picture.size == (width or SIZE, height or SIZE)


UNUSUAL = ["", "   ", "海 海", "🐙", "zebra", "octopus " * 5000, "a\nb\tc\x00d", "%s {} \\", "cat, 3d style; flat style"]


def test_unusual_prompts(pipe, free):
    for pipeline in (pipe, free):
        drawn = sample(pipeline, UNUSUAL, latents=noise(len(UNUSUAL)))
        assert drawn.isfinite().all()
        assert drawn.shape == (len(UNUSUAL), 3, 4, 4)


def test_unknown_words_draw_as_nothing_does(pipe):
    torch.testing.assert_close(sample(pipe, "zebra 🛸", latents=noise(1)), sample(pipe, "", latents=noise(1)), rtol=0, atol=0)


@pytest.mark.parametrize("prompt", [None, 3, b"octopus", ["octopus", 3], [["octopus"]], {"octopus"}, [None]], ids=repr)
def test_prompts_that_are_no_strings(pipe, prompt):
    with pytest.raises(TypeError, match=r"prompt is .*; expected a string or a list of strings"):
        pipe(prompt)


def test_no_prompts(pipe):
    with pytest.raises(ValueError, match="prompt is an empty list"):
        pipe([])


@pytest.mark.parametrize("count", [0, -1, True, 1.5, None], ids=repr)
def test_wrong_picture_counts(pipe, count):
    with pytest.raises(ValueError, match="num_images_per_prompt is") as caught:
        pipe("octopus", num_images_per_prompt=count)
    assert repr(count) in str(caught.value)


def styled_prompts(pipe: CoalescerPipeline, monkeypatch, prompts: list[str], latents: torch.Tensor) -> list[str]:
    """What the description encoder reads in the end."""
    read: list[list[str]] = []
    forward = pipe.description_encoder.forward
    monkeypatch.setattr(pipe.description_encoder, "forward", lambda texts: (read.append(list(texts)), forward(texts))[1])
    pipe(prompts, latents=latents, output_type="latent", guidance_scale=1)
    monkeypatch.undo()
    return next(texts for texts in reversed(read) if len(texts) == len(prompts))


def test_style_is_a_function_of_the_latents_alone(pipe, monkeypatch):
    latents = noise(64)
    prompts = ["octopus"] * 64
    together = styled_prompts(pipe, monkeypatch, prompts, latents)
    assert set(together) == {"octopus, 3d style", "octopus, flat style"}
    assert 16 <= together.count("octopus, 3d style") <= 48  # a fair coin: four standard deviations
    assert styled_prompts(pipe, monkeypatch, prompts, latents) == together
    for i in range(0, 64, 7):
        assert styled_prompts(pipe, monkeypatch, ["octopus", "cat"], torch.stack([latents[i], noise(1)[0]]))[0] == together[i]
    assert styled_prompts(pipe, monkeypatch, prompts, latents.double()) == together


def test_styles_that_exist_and_styles_that_are_named(pipe, monkeypatch):
    latents = noise(8)
    assert set(styled_prompts(pipe, monkeypatch, ["cat"] * 8, latents)) == {"cat, flat style"}
    assert set(styled_prompts(pipe, monkeypatch, ["cat, 3d style"] * 8, latents)) == {"cat, 3d style"}
    assert set(styled_prompts(pipe, monkeypatch, [""] * 8, latents)) == {""}


def test_lower_precision(pipe, saved):
    loaded = CoalescerPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    assert loaded.unet.dtype == torch.bfloat16
    assert loaded.description_encoder.table.dtype == torch.int8
    call = {"prompt": ["octopus", "cat"], "latents": noise(2), "guidance_scale": 1.5, "output_type": "np"}
    # two evaluations of about thirty roundings of half an ulp, which add up as a random walk, on values of [0, 1]
    assert np.abs(loaded(**call).images - pipe(**call).images).max() < 10 * torch.finfo(torch.bfloat16).eps


def refuse(*_args, **_kwargs):
    raise OSError("the network is not there")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_folder_needs_no_network(offline, saved):
    assert CoalescerPipeline.from_pretrained(saved)("octopus").images[0].size == (SIZE, SIZE)


def test_a_hub_id_without_a_network(offline):
    with pytest.raises(ValueError, match="nobody/nothing is neither a local folder nor a reachable Hub model") as caught:
        CoalescerPipeline.from_pretrained("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_nobody_is_told_to_install_accelerate(monkeypatch):
    said = []
    monkeypatch.setattr("coalescer_fast.pipeline.is_accelerate_available", lambda: False)
    for name in ("pipelines.pipeline_utils", "models.modeling_utils"):
        monkeypatch.setattr(f"diffusers.{name}.is_accelerate_available", lambda: False)
        monkeypatch.setattr(f"diffusers.{name}.logger.warning", said.append)
    CoalescerPipeline.from_pretrained("emoji-64")
    assert said == []
    CoalescerPipeline.from_pretrained("emoji-64", low_cpu_mem_usage=True)
    assert any("accelerate" in text for text in said)
