from __future__ import annotations

import math
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from PIL import Image

from coalescer_fast import CoalescerAutoencoder, CoalescerPipeline, CoalescerUNet, DescriptionEncoder, accelerate
from coalescer_fast.acceleration import unavailable
from coalescer_fast.models.description import Entry

from .helpers.pipelines import ANCHORED, FREE, SIZE, STYLES, TOKENS, UNET, noise, seed, tiny_pipeline

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
    torch.testing.assert_close(
        drawn[:2], sample(pipe, "octopus", num_images_per_prompt=2, latents=latents[:2]), rtol=ATOL, atol=ATOL
    )
    torch.testing.assert_close(
        drawn[2:], sample(pipe, "cat", num_images_per_prompt=2, latents=latents[2:]), rtol=ATOL, atol=ATOL
    )


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

    output = pipe(
        "octopus, 3d style", latents=noise(1), output_type="latent", return_trace=True, callback_on_step_end=callback
    )
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


UNUSUAL = [
    "",
    "   ",
    "海 海",
    "🐙",
    "zebra",
    "octopus " * 5000,
    "a\nb\tc\x00d",
    "%s {} \\",
    "cat, 3d style; flat style",
]


def test_unusual_prompts(pipe, free):
    for pipeline in (pipe, free):
        drawn = sample(pipeline, UNUSUAL, latents=noise(len(UNUSUAL)))
        assert drawn.isfinite().all()
        assert drawn.shape == (len(UNUSUAL), 3, 4, 4)


def test_unknown_words_draw_as_nothing_does(pipe):
    torch.testing.assert_close(
        sample(pipe, "zebra 🛸", latents=noise(1)), sample(pipe, "", latents=noise(1)), rtol=0, atol=0
    )


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
    monkeypatch.setattr(
        pipe.description_encoder, "forward", lambda texts: (read.append(list(texts)), forward(texts))[1]
    )
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
        assert (
            styled_prompts(pipe, monkeypatch, ["octopus", "cat"], torch.stack([latents[i], noise(1)[0]]))[0]
            == together[i]
        )
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
    with pytest.raises(
        ValueError, match="nobody/nothing is neither a local folder nor a reachable Hub model"
    ) as caught:
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


def latents_of(pipe: CoalescerPipeline, **kwargs) -> torch.Tensor:
    return sample(pipe, ["octopus, 3d style", "cat, flat style"], latents=noise(2), guidance_scale=1.5, **kwargs)


def by_hand(pipe: CoalescerPipeline, avoided: list[str]) -> torch.Tensor:
    """The formula of negative_prompt, from the networks alone."""
    wanted, away = (
        pipe.condition(texts, torch.device("cpu")) for texts in (["octopus, 3d style", "cat, flat style"], avoided)
    )
    point = noise(2)
    direction, distance = pipe.evaluate(point, wanted)
    point = point + 0.5 * distance.view(-1, 1, 1, 1) * direction
    direction, distance = pipe.evaluate(point, wanted)
    far_direction, far = pipe.evaluate(point, away)
    described, negative = (point + a.view(-1, 1, 1, 1) * b for a, b in ((distance, direction), (far, far_direction)))
    direction = (described + 0.5 * (described - negative) - point) / distance.view(-1, 1, 1, 1)
    return point + distance.view(-1, 1, 1, 1) * direction / direction.square().mean((1, 2, 3), keepdim=True).sqrt()


@pytest.mark.parametrize(
    ("negative_prompt", "each"),
    [
        ("red", ["red", "red"]),
        (["red"], ["red", "red"]),
        (["red", "dog"], ["red", "dog"]),
        ("", ["", ""]),
        (["", "dog"], ["", "dog"]),
    ],
    ids=str,
)
@torch.no_grad()
def test_guidance_leads_away_from_the_negative_prompt(pipe, free, negative_prompt, each):
    for pipeline in (pipe, free):
        found = latents_of(pipeline, negative_prompt=negative_prompt)
        torch.testing.assert_close(found, by_hand(pipeline, each), rtol=1e-4, atol=1e-4)
        assert torch.allclose(found, latents_of(pipeline), atol=1e-4) == (each == ["", ""])


def test_an_empty_negative_prompt_is_none(pipe):
    assert torch.equal(latents_of(pipe, negative_prompt=""), latents_of(pipe))


def test_negative_prompts_are_prompt_major(pipe):
    prompts, latents = ["octopus, 3d style", "cat, flat style"], noise(4)
    call = {"num_images_per_prompt": 2, "guidance_scale": 2.0}
    found = sample(pipe, prompts, latents=latents, negative_prompt=["red", "dog"], **call)
    for i, (prompt, negative) in enumerate(zip(prompts, ["red", "dog"])):
        some = slice(2 * i, 2 * i + 2)
        torch.testing.assert_close(
            found[some],
            sample(pipe, prompt, latents=latents[some], negative_prompt=negative, **call),
            rtol=ATOL,
            atol=ATOL,
        )


def test_without_guidance_a_negative_prompt_does_nothing_and_says_so(pipe, caplog):
    output = pipe("octopus", latents=noise(1), negative_prompt="red dog cat", guidance_scale=1, output_type="latent")
    assert torch.equal(output.images, sample(pipe, latents=noise(1)))
    assert output.warnings == ["negative_prompt has no effect with guidance_scale=1: give a larger one"]
    assert pipe("octopus", negative_prompt="red", guidance_scale=1.5).warnings == []


@pytest.mark.parametrize("count", [2, 4])
def test_wrong_numbers_of_negative_prompts(pipe, count):
    with pytest.raises(
        ValueError, match=f"negative_prompt has {count} descriptions; expected one, or one for each of the 3 prompts"
    ):
        pipe(["octopus", "cat", "dog"], negative_prompt=["red"] * count)
    with pytest.raises(
        ValueError, match=f"negative_prompt has {count} descriptions; expected one, or one for each of the 3 prompts"
    ):
        pipe.encode_prompt(["octopus", "cat", "dog"], negative_prompt=["red"] * count)


EMBEDS = ("prompt_embeds", "prompt_token_embeds", "prompt_attention_mask")


def embeds(pipe: CoalescerPipeline, *args, **kwargs) -> dict[str, torch.Tensor | None]:
    """What `encode_prompt` gives, as keywords of a call."""
    found = pipe.encode_prompt(*args, **kwargs)
    names = EMBEDS[: len(found) // 2]
    return dict(zip([*names, *(f"negative_{name}" for name in names)], found))


@pytest.mark.parametrize("negative_prompt", [None, "red", ["red", "dog"]], ids=str)
def test_embeds_are_what_their_prompts_are(pipe, free, negative_prompt):
    prompts = ["octopus, 3d style", "cat, flat style"]
    for pipeline in (pipe, free):
        given = embeds(pipeline, prompts, negative_prompt=negative_prompt)
        assert len(given) == (6 if pipeline is free else 2)
        assert given["prompt_embeds"].shape == given["negative_prompt_embeds"].shape == (2, 6)
        found = pipeline(**given, latents=noise(2), guidance_scale=1.5, output_type="latent")
        torch.testing.assert_close(
            found.images, latents_of(pipeline, negative_prompt=negative_prompt), rtol=ATOL, atol=ATOL
        )
        assert found.warnings == []


def test_embeds_of_several_pictures(pipe, free):
    for pipeline in (pipe, free):
        call = {"latents": noise(4), "guidance_scale": 1.5, "output_type": "latent"}
        prompts = ["octopus, 3d style", "cat, flat style"]
        expected = pipeline(prompts, num_images_per_prompt=2, negative_prompt=["red", "dog"], **call).images
        one_each = pipeline(
            **embeds(pipeline, prompts, negative_prompt=["red", "dog"]), num_images_per_prompt=2, **call
        ).images
        repeated = pipeline(
            **embeds(pipeline, prompts, num_images_per_prompt=2, negative_prompt=["red", "dog"]), **call
        ).images
        torch.testing.assert_close(one_each, expected, rtol=ATOL, atol=ATOL)
        torch.testing.assert_close(repeated, expected, rtol=ATOL, atol=ATOL)


def test_embeds_without_guidance(pipe):
    found = embeds(pipe, "octopus, 3d style", do_classifier_free_guidance=False)
    assert found["negative_prompt_embeds"] is None
    drawn = pipe(**found, latents=noise(1), output_type="latent").images
    torch.testing.assert_close(drawn, sample(pipe, "octopus, 3d style", latents=noise(1)), rtol=ATOL, atol=ATOL)


def test_one_negative_embedding_for_all(pipe):
    negative = pipe.encode_prompt("red")[0]
    torch.testing.assert_close(
        latents_of(pipe, negative_prompt_embeds=negative), latents_of(pipe, negative_prompt="red"), rtol=ATOL, atol=ATOL
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_embeds_of_another_precision(pipe, dtype):
    vectors = pipe.encode_prompt("octopus")[0].to(dtype)
    found = pipe(prompt_embeds=vectors, latents=noise(1), output_type="latent").images
    assert torch.equal(found, pipe(prompt_embeds=vectors.float(), latents=noise(1), output_type="latent").images)


def test_without_a_mask_all_tokens_count(free):
    vectors, rows = torch.randn(2, 6), torch.randn(2, 5, 6)
    call = {"prompt_embeds": vectors, "prompt_token_embeds": rows, "latents": noise(2), "output_type": "latent"}
    ones = torch.ones(2, 5, dtype=torch.int64)  # as tokenizers give it
    assert torch.equal(free(**call).images, free(**call, prompt_attention_mask=ones).images)
    ones[:, 3:] = 0
    assert not torch.equal(free(**call).images, free(**call, prompt_attention_mask=ones).images)


V, ROWS, MASK = torch.zeros(2, 6), torch.zeros(2, 5, 6), torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, TypeError, "prompt is None; expected a string or a list of strings, or prompt_embeds"),
        (
            {"prompt": "cat", "prompt_embeds": V},
            ValueError,
            "prompt and prompt_embeds are both given; give one of them",
        ),
        (
            {"prompt": "cat", "negative_prompt": "dog", "negative_prompt_embeds": V},
            ValueError,
            "negative_prompt and negative_prompt_emb",
        ),
        ({"prompt_embeds": [[0.0] * 6]}, TypeError, "prompt_embeds is list; expected a floating-point tensor"),
        ({"prompt_embeds": V.long()}, TypeError, "prompt_embeds is torch.int64"),
        ({"prompt_embeds": V[0]}, ValueError, r"prompt_embeds has shape \(6,\); expected \(N, 6\)"),
        ({"prompt_embeds": V[:, :5]}, ValueError, r"prompt_embeds has shape \(2, 5\); expected \(N, 6\)"),
        ({"prompt_embeds": V[:0]}, ValueError, r"prompt_embeds has shape \(0, 6\)"),
        ({"prompt_embeds": V + math.nan}, ValueError, "prompt_embeds holds numbers that are not finite"),
        ({"prompt_embeds": V.double() + 1e300}, ValueError, "prompt_embeds holds numbers that are not finite"),
        (
            {"prompt_embeds": V, "negative_prompt_embeds": torch.zeros(3, 6)},
            ValueError,
            "negative_prompt has 3 descriptions",
        ),
        (
            {"prompt_embeds": V, "prompt_token_embeds": ROWS},
            ValueError,
            "prompt_token_embeds is given; this network has no cross-att",
        ),
        ({"prompt": "cat", "prompt_attention_mask": MASK}, ValueError, "prompt_embeds is missing"),
        ({"prompt": "cat", "negative_prompt_token_embeds": ROWS}, ValueError, "negative_prompt_embeds is missing"),
        (
            {"prompt": "cat", "negative_prompt": 3},
            TypeError,
            "negative_prompt is 3; expected a string or a list of strings",
        ),
        ({"prompt": "cat", "negative_prompt": []}, ValueError, "negative_prompt is an empty list"),
        ({"prompt": "cat\ud800"}, ValueError, "prompt is 'cat\\\\ud800', which holds half a character"),
    ],
    ids=str,
)
def test_wrong_descriptions(pipe, given, error, words):
    with pytest.raises(error, match=words) as caught:
        pipe(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "prompt_token_embeds is missing; this network attends to token rows"),
        ({"prompt_token_embeds": ROWS[:1]}, r"prompt_token_embeds has shape \(1, 5, 6\); expected \(2, N, 6\)"),
        ({"prompt_token_embeds": ROWS[:, :, :4]}, r"prompt_token_embeds has shape \(2, 5, 4\)"),
        (
            {"prompt_token_embeds": ROWS, "prompt_attention_mask": MASK[:, :4]},
            r"prompt_attention_mask is \(2, 4\); expected \(2, 5\)",
        ),
        ({"prompt_token_embeds": ROWS, "prompt_attention_mask": ~MASK}, "with a token in each row"),
        ({"prompt_token_embeds": ROWS, "prompt_attention_mask": [1]}, "prompt_attention_mask is list"),
    ],
    ids=str,
)
def test_wrong_token_rows(free, given, words):
    with pytest.raises(ValueError, match=words):
        free(prompt_embeds=V, **given)


def test_unknown_words_are_said(pipe, caplog):
    prompts = ["octopus", "blorp 1 octopus, 3d style", "blorp 2", "blorp 2", ""]
    with caplog.at_level("WARNING", logger="coalescer_fast"):
        output = pipe(prompts)
        assert output.warnings == [
            "prompt 'blorp 1 octopus, 3d style' has unknown words, which count for nothing: 'blorp', '1'",
            "no word of prompt 'blorp 2' is known, and what is drawn is anything: use other words",
        ]
        assert [record.getMessage() for record in caplog.records] == output.warnings
        assert pipe(prompts).warnings == output.warnings
        assert len(caplog.records) == 2  # once for each prompt
    assert pipe(["octopus", "", " ,; ", "Red CAT!"]).warnings == []
    assert pipe("--").warnings == ["no word of prompt '--' is known, and what is drawn is anything: use other words"]
    assert (
        pipe("cat", guidance_scale=2.0, negative_prompt="blorp")
        .warnings[0]
        .startswith("no word of negative_prompt 'blorp' is known")
    )


def test_emoji_are_read(pipe):
    assert torch.equal(sample(pipe, "🐙", latents=noise(1)), sample(pipe, "octopus", latents=noise(1)))
    assert pipe("🐙").warnings == []


def test_properties_before_and_after_a_call():
    pipeline = tiny_pipeline(guidance_scale=1.5)
    assert (pipeline.guidance_scale, pipeline.num_timesteps, pipeline.interrupt) == (1.5, 0, False)
    pipeline("octopus", guidance_scale=1, num_inference_steps=5)
    assert (pipeline.guidance_scale, pipeline.num_timesteps, pipeline.interrupt) == (1, 5, False)
    assert not pipeline.do_classifier_free_guidance
    pipeline("octopus")
    assert (pipeline.guidance_scale, pipeline.num_timesteps) == (1.5, 2)
    assert pipeline.do_classifier_free_guidance


def test_a_callback_sees_the_call(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((pipeline.guidance_scale, pipeline._guidance_scale, pipeline.num_timesteps, pipeline.interrupt))
        pipeline("cat", num_inference_steps=1, guidance_scale=3.0)  # another call, in between
        assert pipeline.num_timesteps == 2
        return tensors

    pipe("octopus", guidance_scale=2.0, callback_on_step_end=callback)
    assert seen == [(2.0, 2.0, 2, False)] * 2
    assert (pipe.guidance_scale, pipe.num_timesteps) == (2.0, 2)


def test_a_callback_changes_the_guidance(pipe, evaluations):
    """As diffusers' test_callback_cfg."""

    def increase(pipeline, step, timestep, tensors):
        pipeline._guidance_scale += 1.0
        return tensors

    call = {"latents": noise(1), "callback_on_step_end_tensor_inputs": pipe._callback_tensor_inputs}
    found = sample(pipe, guidance_scale=2.0, callback_on_step_end=increase, **call)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    assert torch.equal(found, sample(pipe, latents=noise(1), guidance_scale=3.0))  # the last step alone is guided
    evaluations.clear()
    found = sample(pipe, guidance_scale=1, callback_on_step_end=increase, **call)
    assert torch.equal(found, sample(pipe, latents=noise(1), guidance_scale=2))
    assert len(evaluations) == 6
    with pytest.raises(ValueError, match="guidance_scale is nan"):
        pipe("octopus", callback_on_step_end=lambda pipeline, *_: setattr(pipeline, "_guidance_scale", math.nan))


def test_an_interrupted_call(pipe, evaluations):
    def callback(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 1
        assert pipeline.interrupt == (step == 1)
        return tensors

    call = {"latents": noise(1), "num_inference_steps": 5}
    output = pipe("octopus", output_type="latent", callback_on_step_end=callback, return_trace=True, **call)
    assert evaluations == [1, 1]
    assert len(output.trace) == 2
    assert pipe.interrupt
    assert torch.equal(output.images, pipe("octopus", return_trace=True, **call).trace[2].sample)
    assert not pipe.interrupt


def test_an_interruption_is_of_one_call_or_from_outside_of_all(pipe):
    halfway, steps = threading.Barrier(3), {}

    def draw(name: str) -> None:
        def callback(pipeline, step, timestep, tensors):
            steps[name] = step
            if step == 0 and name == "a":
                pipeline._interrupt = True
            if step == 1:
                halfway.wait()  # until the other, and what interrupts from outside, are here
                halfway.wait()

        pipe("octopus", num_inference_steps=5, callback_on_step_end=callback)

    threads = [threading.Thread(target=draw, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    halfway.wait(30)
    pipe._interrupt = True
    halfway.wait(30)
    for thread in threads:
        thread.join(30)
    assert steps == {"a": 0, "b": 1, "c": 1}


class Zero(PipelineCallback):
    tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers' interface)

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == pipeline.num_timesteps - 1:
            callback_kwargs["latents"] = torch.zeros_like(callback_kwargs["latents"])
        return callback_kwargs


@pytest.mark.parametrize("callback", [Zero(), MultiPipelineCallbacks([Zero(), Zero()])], ids=lambda c: type(c).__name__)
def test_callback_objects_of_diffusers(pipe, callback):
    assert not sample(pipe, callback_on_step_end=callback).any()


def test_a_callback_object_that_wants_something_else(pipe):
    with pytest.raises(
        ValueError, match=r"callback_on_step_end_tensor_inputs has \['prompt_embeds'\]; allowed: \['latents'\]"
    ):
        pipe("octopus", callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0))


@pytest.mark.parametrize(("inputs", "names"), [(None, ["latents"]), ([], []), (("latents",), ["latents"])], ids=str)
def test_a_callback_is_given_what_it_asks_for(pipe, inputs, names):
    seen = []
    pipe(
        "octopus",
        callback_on_step_end=lambda *args: seen.append(list(args[3])),
        callback_on_step_end_tensor_inputs=inputs,
    )
    assert seen == [names, names]


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (3, TypeError, "callback_on_step_end returned a int; expected a dict with latents, or None"),
        ({"latents": None}, TypeError, "returned latents of NoneType; expected a floating-point tensor"),
        ({"latents": np.zeros((1, 3, 4, 4))}, TypeError, "returned latents of ndarray"),
        ({"latents": torch.zeros(1, 3, 4, 4, dtype=torch.int64)}, TypeError, "returned latents of torch.int64"),
        (
            {"latents": torch.zeros(2, 3, 4, 4)},
            ValueError,
            r"shape \(2, 3, 4, 4\) on cpu; expected \(1, 3, 4, 4\) on cpu",
        ),
        ({"latents": torch.zeros(3, 4, 4)}, ValueError, r"shape \(3, 4, 4\)"),
        ({"latents": torch.zeros(1, 3, 4, 4, device="meta")}, ValueError, "on meta; expected .* on cpu"),
        ({"latents": torch.full((1, 3, 4, 4), math.nan)}, ValueError, "latents with numbers that are not finite"),
        (
            {"latents": torch.full((1, 3, 4, 4), 1e300, dtype=torch.float64)},
            ValueError,
            "latents with numbers that are not finite",
        ),
    ],
    ids=str,
)
def test_callbacks_that_return_what_they_should_not(pipe, returned, error, words):
    with pytest.raises(error, match=words) as caught:
        pipe("octopus", callback_on_step_end=lambda *_: returned)
    assert "\n" not in str(caught.value)
    pipe("octopus")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_callback_may_round(pipe, dtype):
    def callback(pipeline, step, timestep, tensors):
        return {"latents": tensors["latents"].to(dtype)}

    found = sample(pipe, latents=noise(1), callback_on_step_end=callback)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.to(dtype).float())


def test_a_callback_that_spoils_latents_in_place(pipe):
    def callback(pipeline, step, timestep, tensors):
        tensors["latents"].fill_(math.nan)

    with pytest.raises(ValueError, match="callback_on_step_end returned latents with numbers that are not finite"):
        pipe("octopus", callback_on_step_end=callback)


@pytest.mark.parametrize("callback", [3, "show", [print]], ids=repr)
def test_callbacks_that_are_no_functions(pipe, callback):
    with pytest.raises(TypeError, match=r"callback_on_step_end is a .*; expected a function"):
        pipe("octopus", callback_on_step_end=callback)


@pytest.mark.parametrize("inputs", ["latents", 3], ids=repr)
def test_callback_inputs_that_are_no_list(pipe, inputs):
    with pytest.raises(TypeError, match="callback_on_step_end_tensor_inputs is"):
        pipe("octopus", callback_on_step_end=lambda *_: None, callback_on_step_end_tensor_inputs=inputs)


@pytest.mark.parametrize(
    ("part", "words"), [("unet", "R of prompt 'cat' after step 1 of 2"), ("vae", "the picture of prompt 'octopus'")]
)
@pytest.mark.parametrize("output_type", ["pil", "latent", "pt"])
@pytest.mark.parametrize("callback", [None, lambda *_: None], ids=["", "callback"])
def test_numbers_that_are_not_finite_become_no_picture(part, words, output_type, callback):
    pipeline = tiny_pipeline(FREE)
    with torch.no_grad():
        if part == "vae":
            pipeline.vae.decoder.layers[0].bias[0] = math.nan
        else:
            pipeline.unet.embedding[0].bias[0] = math.nan
            pipeline.unet.embedding[0].weight.zero_()
            pipeline.unet.embedding[0].bias.zero_()
            pipeline.description_encoder.scale[0] = 1e38  # overflows for what has a word
    prompts = ["octopus", "cat"]
    if part == "unet":
        prompts = ["", "cat"]
    call = {"output_type": output_type, "callback_on_step_end": callback}
    if part == "vae" and output_type == "latent":
        assert pipeline(prompts, **call).images.isfinite().all()
        return
    with pytest.raises(ValueError, match=words) as caught:
        pipeline(prompts, **call)
    assert "is not finite: lower guidance_scale, check the weights, or compute in float32" in str(caught.value)


@pytest.mark.parametrize("size", [1e7, 1e30, 1e300])
def test_latents_that_are_absurdly_large(pipe, free, size):
    for pipeline in (pipe, free):
        with pytest.raises(ValueError, match="latents holds numbers that are not finite or beyond 1e"):
            pipeline("octopus", latents=torch.full((1, 3, 4, 4), size, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e7, 1e308, -1e300, 10**400, True])
def test_guidance_that_overflows(pipe, scale):
    with pytest.raises(ValueError, match=r"guidance_scale is .*; expected a finite number, of at most 1e\+06 in size"):
        pipe("octopus", guidance_scale=scale)


def test_components_that_are_none_or_others(pipe):
    for name in pipe.components:
        with pytest.raises(ValueError, match=f"^{name} is None; a pipeline needs a "):
            CoalescerPipeline(**{**pipe.components, name: None})
        with pytest.raises(TypeError, match=f"^{name} is a Linear; expected a "):
            CoalescerPipeline(**{**pipe.components, name: torch.nn.Linear(1, 1)})


def test_components_that_do_not_fit(pipe):
    other = CoalescerAutoencoder(2, 5, 8, (1, 1), (1, 1))
    narrow = CoalescerUNet(**{**FREE, "cross_attention_dim": 4})
    wide = CoalescerUNet(**{**UNET, "description_dim": 7})
    for changed, words in (
        ({"vae": other}, "vae has 5 latent channels and unet 3; give two that fit each other"),
        ({"unet": narrow}, "description_encoder has dim 6 and unet cross_attention_dim 4"),
        ({"unet": wide}, "description_encoder has dim 6 and unet description_dim 7"),
    ):
        with pytest.raises(ValueError, match=words):
            CoalescerPipeline(**{**pipe.components, **changed})
        pipeline = tiny_pipeline()
        for name, part in changed.items():
            setattr(pipeline, name, part)
        with pytest.raises(ValueError, match=words):  # before anything is sampled
            pipeline("octopus")


def test_a_component_that_is_taken_away():
    pipeline = tiny_pipeline()
    pipeline.vae = None
    with pytest.raises(ValueError, match="vae is None; a pipeline needs a CoalescerAutoencoder"):
        pipeline("octopus", output_type="latent")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_precision_draws_and_changes_without_a_word(pipe, dtype, caplog):
    pipeline = tiny_pipeline()
    with caplog.at_level("WARNING"):
        assert pipeline.to(dtype) is pipeline
        assert pipeline.to("cpu", dtype) is pipeline
    assert caplog.records == []
    assert pipeline.unet.dtype == dtype
    call = {"prompt": ["octopus", "cat"], "latents": noise(2), "guidance_scale": 1.5, "output_type": "np"}
    found = pipeline(**call).images
    assert found.dtype == np.float32
    assert np.abs(found - pipe(**call).images).max() < 10 * max(
        ATOL, torch.finfo(dtype).eps
    )  # as of test_lower_precision


def test_what_diffusers_says_of_other_modules_is_still_said(caplog):
    class Kept(CoalescerUNet):
        _keep_in_fp32_modules = ["norm_out"]  # noqa: RUF012 (diffusers' interface)

    pipeline = tiny_pipeline()
    pipeline.unet = Kept(**ANCHORED)
    with caplog.at_level("WARNING"):
        pipeline.to(torch.bfloat16)
    assert ["norm_out" in record.getMessage() for record in caplog.records] == [True]


def test_offloading_to_the_cpu(pipe):
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="device is cpu, where all weights are already"):
        pipeline.enable_sequential_cpu_offload(device="cpu")
    pipeline.enable_model_cpu_offload(device="cpu")
    call = {"prompt": "octopus", "guidance_scale": 1.5}
    for _ in range(2):
        torch.testing.assert_close(
            sample(pipeline, **call, latents=noise(1)), sample(pipe, **call, latents=noise(1)), rtol=ATOL, atol=ATOL
        )
        assert pipeline(**call).images[0].size == (SIZE, SIZE)
        with pytest.raises(ValueError, match="latents"):
            pipeline("octopus", latents=torch.zeros(3))
    pipeline.remove_all_hooks()
    sample(pipeline, **call)


@pytest.mark.parametrize("shape", [(16,), (1, 3, 7, 7), (1, 3, 1, 64), (0, 3, 4, 4), ()], ids=str)
def test_latents_that_no_network_takes(pipe, free, shape):
    for pipeline in (pipe, free):
        with pytest.raises(ValueError, match=r"latents has shape \(.*\); expected \(1, 3, 4, 4\)"):
            pipeline("octopus", latents=torch.zeros(shape))


def test_what_was_deprecated_is_not_used(pipe, recwarn):
    pipe("octopus", guidance_scale=1.5)
    assert [str(w.message) for w in recwarn] == []


RUNTIMES = [
    pytest.param("cpu", marks=pytest.mark.skipif(bool(unavailable("cpu")), reason="the CPU library is not built")),
    pytest.param(
        "onnxruntime", marks=pytest.mark.skipif(bool(unavailable("onnxruntime")), reason="needs onnxruntime and onnx")
    ),
]


@pytest.mark.parametrize("backend", RUNTIMES)
@pytest.mark.parametrize("network", [ANCHORED, FREE], ids=["anchor", "cross-attention"])
def test_runtimes_take_negative_prompts_and_embeds(backend, network):
    plain, fast = tiny_pipeline(network), accelerate(tiny_pipeline(network), backend, "float32")
    texts = {"prompt": ["octopus, 3d style", "cat, flat style"], "negative_prompt": ["red", "dog"]}
    given = embeds(plain, **texts)
    for call in (texts, {**texts, "negative_prompt": "red"}, given):
        call = {**call, "latents": noise(2), "guidance_scale": 1.5, "output_type": "latent"}
        torch.testing.assert_close(fast(**call).images, plain(**call).images, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(bool(unavailable("cpu")), reason="the CPU library is not built")
def test_a_runtimes_numbers_that_are_not_finite_become_no_picture():
    fast = accelerate(tiny_pipeline(), "cpu", "float32")
    fast.description_encoder.scale[0] = 1e38
    with pytest.raises(ValueError, match="R of prompt 'octopus' after step 1 of 2 is not finite"):
        fast("octopus")


GRADING = {"1": [-1.0, 2.0, 0.5, 1.0, 0.5, 2.0], "2": [-1.0, 2.0, 0.5, -3.0, -0.25, 1.0, 0.5, 2.0]}


@pytest.fixture(scope="module")
def graded() -> CoalescerPipeline:
    return tiny_pipeline(grading=GRADING, guidance_scale=1.5, arrival_distance=1.0)


def test_quality_by_hand(graded):
    out = graded(["octopus", "cat, 3d style"], 2, latents=noise(4), return_trace=True)
    closeness = torch.tensor([graded.description_encoder.closeness(text) for text in ("octopus", "cat")])
    words = [torch.ones(4), *closeness.repeat_interleave(2, 0).T]  # both are known names: their similarity is 1
    lengths, distances = ([getattr(step, name) for step in out.trace] for name in ("direction_length", "distance"))
    bias, *weights = GRADING["2"]
    features = [lengths[0], distances[0], lengths[1], distances[1], *words]
    odds = bias + sum(w * x for w, x in zip(weights, features))
    torch.testing.assert_close(torch.tensor(out.quality), torch.sigmoid(odds), atol=1e-5, rtol=0)
    assert out.num_evaluations == [3] * 4
    one = graded("octopus", latents=noise(1), num_inference_steps=1, guidance_scale=1)
    bias, *weights = GRADING["1"]
    odds = bias + sum(w * x for w, x in zip(weights, [lengths[0][0], distances[0][0], 1.0, *closeness[0]]))
    assert math.isclose(one.quality[0], float(torch.sigmoid(odds)), abs_tol=1e-5)
    assert one.num_evaluations == [1]


def test_quality_is_that_of_more_steps(graded):
    two, four = (graded("octopus", latents=noise(1), num_inference_steps=n).quality for n in (2, 4))
    assert two == four


def test_where_there_is_no_quality(pipe, graded):
    assert pipe("octopus").quality is None
    assert pipe("octopus").num_evaluations == [2]
    embeds = graded.encode_prompt("octopus", do_classifier_free_guidance=False)[0]
    assert graded(prompt_embeds=embeds).quality is None
    assert graded("").quality == [1.0]  # any picture shows it
    assert graded("zzz").quality[0] < 1
    out = graded("octopus", callback_on_step_end=lambda pipe, i, *_: setattr(pipe, "_interrupt", True) or {})
    assert out.num_evaluations == [1]
    assert out.quality is not None


def test_quality_is_saved_with_the_model(graded, tmp_path):
    graded.save_pretrained(tmp_path)
    loaded = CoalescerPipeline.from_pretrained(tmp_path)
    found, expected = (each("octopus", latents=noise(1)).quality[0] for each in (loaded, graded))
    assert math.isclose(found, expected, abs_tol=1e-6)


@pytest.mark.parametrize("output_type", ["latent", "pt"])
@pytest.mark.parametrize("prompt", [["octopus", "red dog"], "embeds"])
def test_best_of_keeps_the_best(graded, output_type, prompt):
    given = {"prompt": prompt}
    if prompt == "embeds":
        given = {"prompt_embeds": graded.encode_prompt(["octopus", "red dog"], do_classifier_free_guidance=False)[0]}
    best = graded(**given, num_images_per_prompt=2, latents=noise(12), best_of=3, output_type=output_type)
    every = graded(**given, num_images_per_prompt=6, latents=noise(12), output_type=output_type, return_trace=True)
    kept = (every.trace[1].distance.view(4, 3).argmax(1) + torch.arange(0, 12, 3)).tolist()
    torch.testing.assert_close(best.images, every.images[kept], atol=1e-5, rtol=0)
    assert len(set(kept)) == 4
    assert kept != [0, 3, 6, 9]
    assert best.num_evaluations == [9] * 4
    if prompt != "embeds":
        torch.testing.assert_close(best.quality, [every.quality[i] for i in kept])


def test_generators_of_best_of_draw_for_one_picture_each(graded):
    generators = [seed(3), seed(4)]
    found = sample(graded, ["octopus", "cat"], generator=generators, best_of=2)
    latents = torch.cat([torch.randn(2, 3, 4, 4, generator=seed(value)) for value in (3, 4)])
    torch.testing.assert_close(found, sample(graded, ["octopus", "cat"], latents=latents, best_of=2))


@pytest.mark.parametrize("best_of", [0, -1, 1.5, True, "4"])
def test_a_best_of_that_is_no_count(graded, best_of):
    with pytest.raises(ValueError, match=r"best_of is .*; expected a whole number from 1 up"):
        graded("octopus", best_of=best_of)


@pytest.mark.parametrize("best_of", [1, 3])
def test_descriptions_are_what_was_drawn(graded, best_of):
    asked = {"latents": noise(4 * best_of), "best_of": best_of, "output_type": "latent"}
    out = graded(["octopus", "cat, 3d style"], 2, **asked)
    assert [text.partition(",")[0] for text in out.descriptions] == ["octopus", "octopus", "cat", "cat"]
    assert all(graded.description_encoder.names_style(text) for text in out.descriptions)
    if best_of == 1:
        again = graded(out.descriptions, latents=asked["latents"], output_type="latent")
        torch.testing.assert_close(again.images, out.images)
    embeds = graded.encode_prompt("octopus", do_classifier_free_guidance=False)[0]
    assert graded(prompt_embeds=embeds).descriptions is None


@pytest.mark.parametrize("steps", [1, "auto"])
def test_best_of_by_the_evaluations_that_all_have_had(graded, steps):
    best = graded("octopus", 1, steps, latents=noise(8), best_of=8, output_type="latent").images
    every = graded("octopus", 8, steps, latents=noise(8), output_type="latent")
    first = graded("octopus", 8, 1, latents=noise(8), output_type="latent", return_trace=True).trace[0].distance
    if steps == "auto":
        assert len(set(every.num_evaluations)) > 1
    torch.testing.assert_close(best[0], every.images[int(first.argmax())], atol=1e-5, rtol=0)


def test_best_of_without_a_grading(pipe):
    best = pipe("octopus", latents=noise(3), best_of=3, output_type="latent")
    every = pipe("octopus", 3, latents=noise(3), output_type="latent", return_trace=True)
    kept = int(every.trace[1].distance.argmax())
    torch.testing.assert_close(best.images[0], every.images[kept], atol=1e-5, rtol=0)
    assert best.quality is None


def test_auto_is_the_plain_call_with_as_many_steps(graded):
    texts, start = ["octopus", "cat", "red dog", ""], noise(12)
    counts = set()
    for arrival in (0.6, 0.8, 1.0, 1.2):
        graded.scheduler.register_to_config(arrival_distance=arrival)
        auto = graded(texts, 3, latents=start, num_inference_steps="auto", output_type="latent")
        for i, used in enumerate(auto.num_evaluations):
            call = {"latents": start[i : i + 1], "num_inference_steps": used - 1, "output_type": "latent"}
            plain = graded(texts[i // 3], **call)
            torch.testing.assert_close(auto.images[i : i + 1], plain.images, atol=ATOL, rtol=1e-4)
            assert math.isclose(auto.quality[i], plain.quality[0], abs_tol=1e-5)
            counts.add(used - 1)
    assert len(counts) > 2
    graded.scheduler.register_to_config(arrival_distance=1.0)


def test_auto_and_what_watches_every_step(graded):
    for given in ({"return_trace": True}, {"callback_on_step_end": lambda *_: {}}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} is for a number of steps"):
            graded("octopus", num_inference_steps="auto", **given)


@pytest.fixture(scope="module")
def matching() -> CoalescerPipeline:
    """The tiny pipeline, with an encoder that takes "dog" as an octopus and "red" as a cat."""
    plain = tiny_pipeline()
    encoder = plain.description_encoder
    table = np.zeros((len(TOKENS), 2), np.int8)
    table[TOKENS.index("dog")], table[TOKENS.index("red")] = (100, 10), (10, 100)
    matcher = table, np.ones(2, np.float32), np.array([[1, 0], [0, 1]], np.int8)
    arrays = (encoder.table.numpy(), encoder.scale.numpy(), encoder.vocab.numpy())
    styles = encoder.name_styles.numpy()
    with_matcher = DescriptionEncoder.from_table(
        *arrays, STYLES, encoder.known_names, styles, matcher, {"kraken": Entry(0, 1.0)}
    )
    plain.register_modules(description_encoder=with_matcher)
    return plain


def test_a_prompt_is_drawn_as_the_name_that_it_matches(matching):
    asked = ["dog", "red, flat style", "kraken", "octopus", ""]
    read = ["octopus", "cat, flat style", "octopus", "octopus", ""]
    out = matching(asked, 2, latents=noise(10), output_type="latent")
    assert torch.equal(out.images, sample(matching, read, num_images_per_prompt=2, latents=noise(10)))
    assert [match and (match.prompt, match.name, match.description) for match in out.matched] == [
        ("dog", "octopus", "octopus"),
        ("red, flat style", "cat", "cat, flat style"),
        ("kraken", "octopus", "octopus"),
        ("octopus", "octopus", "octopus"),
        None,
    ]
    assert 0.99 < out.matched[0].similarity < 1 == out.matched[3].similarity


def test_matching_can_be_turned_off(matching, pipe):
    out = matching("dog, 3d style", latents=noise(1), output_type="latent", prompt_matching=False)
    assert out.matched is None
    assert torch.equal(out.images, sample(pipe, "dog, 3d style", latents=noise(1)))
    assert not torch.equal(out.images, sample(matching, "dog, 3d style", latents=noise(1)))


def test_a_model_without_a_matcher_draws_the_words(pipe):
    out = pipe("dog", latents=noise(1), output_type="latent")
    assert out.matched is None
    assert torch.equal(out.images, sample(pipe, "dog", latents=noise(1), prompt_matching=False))


def test_embeddings_are_of_what_is_matched(matching):
    embeds, _ = matching.encode_prompt("dog, 3d style")
    assert torch.equal(embeds, matching.encode_prompt("octopus, 3d style")[0])
    assert not torch.equal(embeds, matching.encode_prompt("dog, 3d style", prompt_matching=False)[0])
    out = matching(prompt_embeds=embeds, latents=noise(1), output_type="latent")
    assert out.matched is None
    assert torch.equal(out.images, sample(matching, "dog, 3d style", latents=noise(1)))


def test_a_negative_prompt_is_not_matched(matching, pipe):
    call = {"latents": noise(1), "guidance_scale": 2.0, "negative_prompt": "dog"}
    assert torch.equal(sample(matching, "cat", **call), sample(pipe, "cat", **call))
