"""A coalescer that is made of a diffusers UNet computes what the UNet computes at one timestep."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel, UNet2DModel

from coalescer_fast import CoalescerAutoencoder, CoalescerPipeline, CoalescerScheduler, CoalescerUNet, accelerate
from coalescer_fast.ops import native_library

from .test_unet import relative_error

COMMON = dict(sample_size=8, block_out_channels=(16, 32, 48, 48), norm_num_groups=8)
LEVELS = dict(
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)
XL = dict(
    sample_size=8,
    block_out_channels=(16, 32, 48),
    norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 4, 8),
    transformer_layers_per_block=(1, 2, 3),
    use_linear_projection=True,
    cross_attention_dim=12,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=20 + 6 * 8,
)
CONDITIONAL = {
    "sd-1.5": dict(COMMON, **LEVELS, cross_attention_dim=20, attention_head_dim=4),
    "sd-2.1": dict(
        COMMON, **LEVELS, cross_attention_dim=20, attention_head_dim=(2, 4, 6, 6), use_linear_projection=True
    ),
    "sdxl": XL,
    "lcm": dict(COMMON, **LEVELS, cross_attention_dim=20, attention_head_dim=4, time_cond_proj_dim=24),
    "no-bottom": dict(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        cross_attention_dim=20,
        attention_head_dim=4,
    ),
    "plain-bottom": dict(
        COMMON, **LEVELS, cross_attention_dim=20, attention_head_dim=4, mid_block_type="UNetMidBlock2D"
    ),
    "scale-shift": dict(
        COMMON, **LEVELS, cross_attention_dim=20, attention_head_dim=4, resnet_time_scale_shift="scale_shift"
    ),
}
UNCONDITIONAL = {
    "ddpm": dict(
        sample_size=8,
        block_out_channels=(16, 16, 32),
        norm_num_groups=8,
        norm_eps=1e-6,
        attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ),
    "heads": dict(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        num_class_embeds=5,
    ),
}
FOLDED = {
    "sdxl": {"added_cond_kwargs": {"text_embeds": torch.full((1, 20), 0.3), "time_ids": torch.ones(1, 6)}},
    "lcm": {"timestep_cond": torch.linspace(-1, 1, 24)[None]},
    "heads": {"class_labels": torch.tensor([3])},
}


def make(name: str, **changes):
    """A random UNet of a layout, every parameter away from its initial value."""
    torch.manual_seed(0)
    kind = UNet2DConditionModel if name in CONDITIONAL else UNet2DModel
    unet = kind(**{**CONDITIONAL, **UNCONDITIONAL}[name] | changes).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.add_(torch.randn(parameter.shape) * scale)
    return unet


def inputs(unet, n: int = 3):
    config, generator = unet.config, torch.Generator().manual_seed(1)
    sample = torch.randn(n, config.in_channels, 8, 8, generator=generator)
    if not isinstance(unet, UNet2DConditionModel):
        return sample, {}
    return sample, {"encoder_hidden_states": torch.randn(n, 7, config.cross_attention_dim, generator=generator)}


def repeated(conditions, n: int):
    """The folded conditions for n samples."""
    return {
        name: repeated(value, n) if isinstance(value, dict) else value.expand(n, *value.shape[1:])
        for name, value in conditions.items()
    }


@pytest.mark.parametrize("timestep", [0, 421, 999])
@pytest.mark.parametrize("name", [*CONDITIONAL, *UNCONDITIONAL])
@torch.no_grad()
def test_direction_is_the_prediction_at_the_timestep(name, timestep):
    unet = make(name)
    sample, rows = inputs(unet)
    folded = FOLDED.get(name, {})
    expected = unet(sample, timestep, **rows, **repeated(folded, len(sample))).sample
    other = unet(sample, (timestep + 500) % 1000, **rows, **repeated(folded, len(sample))).sample
    assert relative_error(other, expected) > 1e-2  # or the timestep would not be tested
    network = CoalescerUNet.from_diffusers(unet, timestep=timestep, **folded)
    description = torch.randn(len(sample), network.config.description_dim)
    output = network(sample, description, *rows.values())
    assert relative_error(output.direction, expected) < 1e-5
    torch.testing.assert_close(output.distance, torch.full((len(sample),), math.sqrt(2)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@torch.no_grad()
def test_it_lands_on_the_picture_that_the_unet_expects(prediction):
    unet = make("sd-1.5")
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    scheduler.register_to_config(prediction_type=prediction)
    scheduler.set_timesteps(10)
    sample, rows = inputs(unet)
    predicted = unet(sample, 999, **rows).sample
    expected = scheduler.step(predicted, 999, sample).pred_original_sample
    network = CoalescerUNet.from_diffusers(unet, scheduler)
    direction, distance = network(sample, torch.ones(len(sample), 20), *rows.values(), return_dict=False)
    step = CoalescerScheduler(etas=(1.0,), modes=("raw",)).step(direction, distance, 0, sample)
    assert relative_error(step.prev_sample, expected) < 1e-5


@torch.no_grad()
def test_descriptions_have_no_effect_yet_and_can_learn_one():
    network = CoalescerUNet.from_diffusers(make("sd-2.1"))
    sample, rows = inputs(make("sd-2.1"))
    one, two = (network(sample, torch.randn(3, 20), *rows.values()).direction for _ in range(2))
    assert torch.equal(one, two)
    with torch.enable_grad():
        network(sample, torch.randn(3, 20), *rows.values()).direction.square().mean().backward()
    assert all(block.film.weight.grad.abs().sum() > 0 for block in network.residual_blocks)


@torch.no_grad()
def test_it_is_saved_and_loaded(tmp_path):
    unet = make("sdxl")
    network = CoalescerUNet.from_diffusers(unet, DDPMScheduler(), 900, **FOLDED["sdxl"])
    network.save_pretrained(tmp_path)
    loaded = CoalescerUNet.from_pretrained(tmp_path)
    sample, rows = inputs(unet)
    description = torch.randn(3, 12)
    assert network.config.sample_residual > 0
    assert torch.equal(
        loaded(sample, description, *rows.values()).direction, network(sample, description, *rows.values()).direction
    )


def test_half_precision_and_the_unet_stays_as_it_is():
    unet = make("sd-1.5").half()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    network = CoalescerUNet.from_diffusers(unet)
    assert network.dtype == torch.float16
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert not unet.down_blocks[0].resnets[0]._forward_pre_hooks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 9}, "in_channels 9 and out_channels 4"),
        ({"act_fn": "gelu"}, "act_fn gelu"),
        ({"downsample_padding": 0}, "downsample_padding 0"),
        ({"layers_per_block": (1, 2, 2, 2)}, "layers_per_block"),
        ({"cross_attention_dim": (20, 20, 24, 24)}, "cross_attention_dim"),
        ({"up_block_types": ("CrossAttnUpBlock2D",) * 4}, "attention at other levels"),
        ({"down_block_types": ("SimpleCrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)}, "SimpleCrossAttnDownBlock2D"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type UNetMidBlock2DSimpleCrossAttn"),
        ({"conv_out_kernel": 1}, "conv_out_kernel 1"),
        ({"attention_head_dim": 5}, r"a Conv2d of shape \(15, 16, 1, 1\)"),
    ],
)
def test_what_cannot_be_taken_over_is_named(changes, words):
    unet = UNet2DConditionModel(**{**CONDITIONAL["sd-1.5"], **changes})
    with pytest.raises(ValueError, match=words) as caught:
        CoalescerUNet.from_diffusers(unet)
    assert "cannot be taken over" in str(caught.value)


def test_wrong_arguments():
    unet = make("sd-1.5")
    with pytest.raises(TypeError, match="unet is a Linear; expected a UNet2DConditionModel"):
        CoalescerUNet.from_diffusers(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no alphas_cumprod"):
        CoalescerUNet.from_diffusers(unet, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="timestep is 1000; expected one of the scheduler's, 0 to 999"):
        CoalescerUNet.from_diffusers(unet, DDPMScheduler(), 1000)
    with pytest.raises(ValueError, match="epsilon says nothing of the picture"):
        CoalescerUNet.from_diffusers(unet, DDIMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="added_cond_kwargs"):
        CoalescerUNet.from_diffusers(make("sdxl"))


def test_an_adapter_is_refused():
    unet = make("sd-1.5")
    unet.down_blocks[0].attentions[0].proj_in.base_layer = torch.nn.Identity()
    with pytest.raises(ValueError, match="adapters"):
        CoalescerUNet.from_diffusers(unet)


@pytest.mark.parametrize(("dtype", "budget"), [("float32", 1e-5), ("bfloat16", 0.03)])
@torch.no_grad()
def test_it_runs_natively(dtype, budget):
    if reason := native_library.unavailable():
        pytest.skip(reason)
    unet = make("sd-2.1", cross_attention_dim=128, transformer_layers_per_block=2, attention_head_dim=(2, 4, 4, 4))
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    network = CoalescerUNet.from_diffusers(unet, scheduler, 600)
    encoder = CoalescerPipeline.from_pretrained("emoji-64").description_encoder
    pipe = CoalescerPipeline(
        network, CoalescerScheduler(), encoder, CoalescerAutoencoder(2, 4, 8, (1, 1), (1, 1)).eval()
    )
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    texts, device = ["owl", "red heart"], torch.device("cpu")
    expected = pipe.evaluate(sample, pipe.condition(texts, device))
    accelerate(pipe, backend="cpu", dtype=dtype)
    found = pipe.runtime.evaluate(sample, pipe.runtime.condition(texts, device))
    assert not pipe.runtime.refused
    for mine, its in zip(found, expected):
        assert relative_error(mine, its) < budget
