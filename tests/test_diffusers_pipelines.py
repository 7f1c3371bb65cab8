"""Pipelines of diffusers draw the same pictures accelerated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import coalescer_fast as cf
from coalescer_fast.runtime import base
from coalescer_fast.runtime.native.module import no_programs, runtime_of

pytest.importorskip("transformers", reason="diffusers' pipelines need transformers, which is not installed")

import diffusers

from .helpers.diffusers_networks import network, parts, randn
from .helpers.diffusers_pipelines import NAMES, draw, pipeline, psnr

pytestmark = pytest.mark.skipif(
    bool(no_programs(torch.float32)), reason=no_programs(torch.float32) or "programs run here"
)
bfloat16 = pytest.mark.skipif(bool(no_programs(torch.bfloat16)), reason="the processor does not multiply bfloat16")
int8 = pytest.mark.skipif(bool(no_programs(torch.uint8)), reason="the processor does not multiply int8 itself")
NEAR = 2e-5  # the largest difference of a pixel in [0, 1], in float32
PSNR = {"bfloat16": 45.0, "int8": 42.0}  # dB, the worst picture


def networks(pipe: Any) -> dict[str, nn.Module]:
    """Those of its networks that run natively, by name."""
    found = {}
    for name in ("unet", "vae", "controlnet"):
        if isinstance(module := getattr(pipe, name, None), nn.Module):
            found |= {f"{name}.{part}".rstrip("."): each for part, each in parts(module).items()}
    return found


def assert_native(pipe: Any, *left_out: str) -> None:
    """That networks ran as programs in their last call, but for those that no call of this pipeline needs."""
    for name, module in networks(pipe).items():
        if name not in left_out:
            runtime = runtime_of(module)
            assert runtime is not None, name
            assert runtime.refused == "", name


def assert_near(pictures: torch.Tensor, expected: torch.Tensor) -> None:
    assert pictures.shape == expected.shape
    assert pictures.dtype == expected.dtype
    assert float((pictures - expected).abs().max()) < NEAR
    assert float(expected.std()) > 0.05  # a picture


@pytest.mark.parametrize("name", NAMES)
def test_the_same_pictures(name):
    pipe = pipeline(name)
    expected, guided = draw(pipe, 2), draw(pipe, 1, guidance_scale=3.0)
    assert cf.accelerate(pipe, dtype="float32") is pipe
    for _ in range(2):
        assert_near(draw(pipe, 2), expected)
        assert_near(draw(pipe, 1, guidance_scale=3.0), guided)
    assert_native(pipe)
    assert type(pipe).__name__ == name


@bfloat16
@pytest.mark.parametrize("name", NAMES)
def test_nearly_the_same_pictures_in_bfloat16(name):
    pipe = pipeline(name)
    expected = draw(pipe, 2)
    cf.accelerate(pipe, dtype="bfloat16")
    pictures = draw(pipe, 2)
    assert pictures.dtype == torch.float32
    assert psnr(pictures, expected) > PSNR["bfloat16"]
    assert not torch.equal(pictures, expected)
    assert_native(pipe)


@int8
@pytest.mark.parametrize(
    "name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"]
)
def test_nearly_the_same_pictures_in_int8(name):
    pipe = pipeline(name)
    expected = draw(pipe, 2)
    cf.accelerate(pipe, dtype="int8", prompts=["a dog", "red"], num_inference_steps=2, height=64, width=64)
    assert psnr(draw(pipe, 2), expected) > PSNR["int8"]
    assert runtime_of(pipe.unet).precision == "int8"
    assert_native(pipe)


@int8
def test_int8_has_prompts_of_its_own():
    pipe = pipeline("StableDiffusionPipeline")
    expected = draw(pipe)
    assert psnr(draw(cf.accelerate(pipe, dtype="int8", height=64, width=64)), expected) > PSNR["int8"]
    assert runtime_of(pipe.unet).precision == "int8"
    assert_native(pipe, "vae.encoder")


@pytest.mark.parametrize(
    "name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"]
)
def test_callbacks_see_and_change_every_step(name):
    pipe = pipeline(name)
    seen: list[torch.Tensor] = []

    def callback(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].clone())
        return {"latents": 0.9 * tensors["latents"]}

    given = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents"]}
    expected, steps = draw(pipe, **given), seen
    seen = []
    cf.accelerate(pipe, dtype="float32")
    assert_near(draw(pipe, **given), expected)
    assert len(seen) == len(steps) == 2
    for mine, own in zip(seen, steps):
        torch.testing.assert_close(mine, own, rtol=0, atol=1e-4)
    assert_native(pipe)


@pytest.mark.parametrize(
    "more",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 7.5, "negative_prompt": ["red"]},
        {"guidance_scale": 5.0, "guidance_rescale": 0.7},
        {"num_images_per_prompt": 2},
        {"eta": 0.5},
        {"height": 72, "width": 56},
        {"output_type": "latent"},
    ],
    ids=str,
)
def test_arguments_of_a_call(more):
    pipe = pipeline("StableDiffusionPipeline")
    expected = draw(pipe, **more)
    assert_near(draw(cf.accelerate(pipe, dtype="float32"), **more), expected)


@pytest.mark.parametrize(
    "more",
    [
        {"original_size": (128, 96), "crops_coords_top_left": (8, 16), "guidance_scale": 4.0},
        {"guidance_scale": 0.0, "num_inference_steps": 1},  # as SDXL-Turbo is called
        {"denoising_end": 0.5, "num_inference_steps": 4},
    ],
    ids=str,
)
def test_arguments_of_a_call_of_sdxl(more):
    pipe = pipeline("StableDiffusionXLPipeline")
    expected = draw(pipe, **more)
    assert_near(draw(cf.accelerate(pipe, dtype="float32"), **more), expected)
    assert_native(pipe)


def test_arguments_of_a_call_with_a_controlnet():
    pipe = pipeline("StableDiffusionControlNetPipeline")
    calls = (
        {"controlnet_conditioning_scale": 0.3},
        {"guess_mode": True, "guidance_scale": 3.0},
        {"control_guidance_start": 0.5},
    )
    expected = [draw(pipe, **more) for more in calls]
    cf.accelerate(pipe, dtype="float32")
    for more, own in zip(calls, expected):
        assert_near(draw(pipe, **more), own)
    assert float((expected[0] - expected[1]).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline"])
def test_pictures_of_a_tiny_autoencoder(name):
    pipe = pipeline(name, "vae_tiny")
    more = {} if "Img2Img" in name else {"height": 96, "width": 64}
    expected = draw(pipe, **more)
    assert_near(draw(cf.accelerate(pipe, dtype="float32"), **more), expected)
    assert_native(pipe, *(() if "Img2Img" in name else ["vae.encoder"]))


def test_tiling_and_slicing():
    pipe = pipeline("StableDiffusionPipeline")
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 8, 32
    expected = draw(pipe, 2)
    cf.accelerate(pipe, dtype="float32")
    tiled = draw(pipe, 2)
    assert_near(tiled, expected)
    pipe.vae.disable_tiling()
    whole = draw(pipe, 2)
    assert float((whole - tiled).abs().max()) > 1e-3
    pipe.vae.disable_slicing()
    torch.testing.assert_close(draw(pipe, 2), whole, rtol=0, atol=NEAR)
    pipe.enable_attention_slicing()
    torch.testing.assert_close(draw(pipe, 2), whole, rtol=0, atol=NEAR)


@pytest.mark.parametrize(
    "name", ["StableDiffusionPipeline", "StableDiffusionControlNetPipeline", "StableDiffusionXLPipeline"]
)
def test_explain_names_every_component(name):
    pipe = cf.accelerate(pipeline(name), dtype="float32")
    draw(pipe)
    explained = cf.explain(pipe)
    for part in networks(pipe):
        assert part in explained
    for part in ("text_encoder", "scheduler") if "XL" not in name else ("text_encoder", "text_encoder_2", "scheduler"):
        assert part in explained  # left alone
    assert "float32" in explained


@pytest.mark.parametrize(
    "name", ["StableDiffusionPipeline", "StableDiffusionControlNetPipeline", "StableDiffusionXLPipeline"]
)
def test_restore_gives_equal_bits(name):
    pipe = pipeline(name)
    expected = draw(pipe)
    draw(cf.accelerate(pipe, dtype="float32"))
    assert cf.restore(pipe) is pipe
    assert torch.equal(draw(pipe), expected)
    assert all(runtime_of(module) is None for module in networks(pipe).values())


def test_saved_as_it_was(tmp_path):
    pipe = pipeline("StableDiffusionPipeline")
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path / "before")
    draw(cf.accelerate(pipe, dtype="float32"))
    pipe.save_pretrained(tmp_path / "after")
    files = {
        folder: {
            str(path.relative_to(tmp_path / folder)): path.read_bytes()
            for path in (tmp_path / folder).rglob("*")
            if path.is_file()
        }
        for folder in ("before", "after")
    }
    assert files["before"] == files["after"]
    other = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "after", safety_checker=None)
    other.set_progress_bar_config(disable=True)
    assert_near(draw(other), expected)
    assert_near(draw(cf.accelerate(other, dtype="float32")), expected)
    assert_native(other, "vae.encoder")


def test_moves():
    pipe = pipeline("StableDiffusionPipeline")
    expected = draw(pipe)
    cf.accelerate(pipe, dtype="float32")
    assert_near(draw(pipe.to("cpu")), expected)
    assert_near(draw(pipe.to("cpu", torch.float32)), expected)
    assert_native(pipe, "vae.encoder")
    half = copy.deepcopy(cf.restore(copy.deepcopy(pipe))).to(torch.bfloat16)
    own = draw(half)
    pictures = draw(pipe.to(torch.bfloat16))
    assert pictures.dtype == own.dtype
    # the scheduler rounds in both
    assert psnr(pictures.float(), own.float()) > 40
    assert_native(pipe, "vae.encoder")
    cf.restore(pipe)
    assert torch.equal(draw(pipe), own)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_pipelines(stored):
    pipe = pipeline("StableDiffusionPipeline")
    pipe.to(stored)
    exact = copy.deepcopy(pipe).to(torch.float32)
    expected = draw(exact)
    cf.accelerate(pipe)
    pictures = draw(pipe)
    assert psnr(pictures.float(), expected) > 45  # latents and updates are in half precision
    assert_native(pipe, "vae.encoder")
    assert {p.dtype for p in pipe.unet.parameters()} == {stored}


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=bfloat16)])
def test_verify(name, dtype):
    pipe = cf.accelerate(pipeline(name), dtype=dtype)
    before = draw(pipe)
    found = cf.verify(pipe, num_inference_steps=2, height=64, width=64)
    assert found.passed, str(found)
    assert found.dtype == dtype
    assert torch.equal(draw(pipe), before)


def test_verify_with_its_defaults():
    pipe = cf.accelerate(pipeline("LatentConsistencyModelPipeline"), dtype="float32")
    assert cf.verify(pipe).passed


def test_verify_finds_another_network():
    pipe = cf.accelerate(pipeline("StableDiffusionPipeline"), dtype="float32")
    draw(pipe)
    pipe.unet.conv_out.weight.data.view(-1)[2:34] += 3  # which no call can see
    assert not cf.verify(pipe, num_inference_steps=2, height=64, width=64).passed


def test_warmup_prepares_the_calls_to_come():
    pipe = cf.accelerate(pipeline("StableDiffusionPipeline"), dtype="float32")
    cf.warmup(pipe, batch_sizes=(1, 2), num_inference_steps=1, height=64, width=64)
    prepared = base.count
    draw(pipe, 1)
    draw(pipe, 2)
    assert base.count == prepared
    with pytest.raises(TypeError, match=r"^batch_sizes is \['a cat'\]; expected whole numbers"):
        cf.warmup(pipe, ["a cat"], num_inference_steps=1)


def test_another_network_in_the_place_of_one():
    pipe, twin = pipeline("StableDiffusionPipeline"), pipeline("StableDiffusionPipeline")
    draw(cf.accelerate(pipe, dtype="float32"))
    for each in (pipe, twin):
        unet = network("sd21")
        each.unet = unet
    assert_near(draw(pipe), draw(twin))
    assert cf.explain(pipe)
    assert_near(draw(cf.accelerate(pipe, dtype="float32")), draw(twin))
    assert_native(pipe, "vae.encoder")


def test_another_scheduler():
    pipe, twin = pipeline("StableDiffusionPipeline"), pipeline("StableDiffusionPipeline")
    cf.accelerate(pipe, dtype="float32")
    for kind in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"):  # timesteps of other kinds
        for each in (pipe, twin):
            each.scheduler = getattr(diffusers, kind).from_config(each.scheduler.config)
        assert_near(draw(pipe, num_inference_steps=4), draw(twin, num_inference_steps=4))
        assert_native(pipe, "vae.encoder")


def test_pipelines_that_share_networks():
    pipe, twin = pipeline("StableDiffusionPipeline"), pipeline("StableDiffusionPipeline")
    cf.accelerate(pipe, dtype="float32")
    kind = diffusers.StableDiffusionImg2ImgPipeline
    other, own = (kind(**each.components, requires_safety_checker=False) for each in (pipe, twin))
    for each in (other, own):
        each.set_progress_bar_config(disable=True)
    assert_near(draw(other), draw(own))
    assert_native(other)
    assert_near(draw(pipe), draw(twin))


def lora(unet: Any) -> dict[str, torch.Tensor]:
    """As in a file of an adapter for the UNet."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    adapted = copy.deepcopy(unet)
    adapted.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    state = get_peft_model_state_dict(adapted)
    return {
        f"unet.{key}": 0.7 * randn(*value.shape, seed=i) / (4 if "lora_B" in key else value.shape[1]) ** 0.5
        for i, (key, value) in enumerate(sorted(state.items()))
    }


def test_lora_of_a_pipeline():
    pytest.importorskip("peft")
    pipe, twin = pipeline("StableDiffusionPipeline"), pipeline("StableDiffusionPipeline")
    adapter = lora(twin.unet)
    plain = draw(cf.accelerate(pipe, dtype="float32"))
    changes = (
        lambda each: each.load_lora_weights(dict(adapter), adapter_name="one"),
        lambda each: each.set_adapters(["one"], [0.5]),
        lambda each: each.disable_lora(),
        lambda each: each.enable_lora(),
        lambda each: each.fuse_lora(lora_scale=0.8),
        lambda each: each.unfuse_lora(),
        lambda each: each.unload_lora_weights(),
    )
    pictures = []
    for change in changes:
        for each in (pipe, twin):
            change(each)
        pictures.append(draw(pipe))
        assert_near(pictures[-1], draw(twin))
        assert_native(pipe, "vae.encoder")
    assert float((pictures[0] - plain).abs().max()) > 0.01
    assert_near(pictures[-1], plain)
    assert_near(draw(pipe, cross_attention_kwargs={"scale": 0.5}), draw(twin, cross_attention_kwargs={"scale": 0.5}))


def test_a_pipeline_of_a_unet_alone():
    pipe = diffusers.DDPMPipeline(network("ddpm"), diffusers.DDPMScheduler())
    pipe.unet.register_to_config(sample_size=16)
    pipe.set_progress_bar_config(disable=True)

    def pictures() -> Any:
        return torch.from_numpy(pipe(2, torch.Generator().manual_seed(0), 3, "np").images)

    expected = pictures()
    cf.accelerate(pipe, dtype="float32")
    assert_near(pictures(), expected)
    assert_native(pipe)
    assert "unet" in cf.explain(pipe)
    cf.restore(pipe)
    assert torch.equal(pictures(), expected)


def test_a_pipeline_without_networks_to_run_is_refused():
    with pytest.raises((TypeError, ValueError)) as caught:
        cf.accelerate(diffusers.DDPMPipeline(None, diffusers.DDPMScheduler()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionControlNetPipeline"])
def test_weights_that_are_not_kept(name):
    pipe = pipeline(name)
    expected = draw(pipe)
    cf.accelerate(pipe, dtype="float32", keep_weights=False)
    for _ in range(2):
        assert_near(draw(pipe), expected)
    assert_native(pipe, "vae.encoder")
    with pytest.raises((RuntimeError, ValueError), match="keep_weights"):
        cf.restore(pipe)


def test_packed_weights_are_kept(tmp_path):
    expected = draw(cf.accelerate(pipeline("StableDiffusionPipeline"), dtype="float32", cache=tmp_path))
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert files
    written = [path.read_bytes() for path in files]
    assert torch.equal(
        draw(cf.accelerate(pipeline("StableDiffusionPipeline"), dtype="float32", cache=tmp_path)), expected
    )
    assert [path.read_bytes() for path in files] == written


def test_a_hook_in_one_network_leaves_the_others_native():
    pipe, twin = pipeline("StableDiffusionPipeline"), pipeline("StableDiffusionPipeline")
    cf.accelerate(pipe, dtype="float32")
    for each in (pipe, twin):
        each.unet.mid_block.register_forward_hook(lambda module, args, result: 2 * result)
    assert_near(draw(pipe), draw(twin))
    assert "hook" in cf.explain(pipe)
    assert_native(pipe, "unet", "vae.encoder")
