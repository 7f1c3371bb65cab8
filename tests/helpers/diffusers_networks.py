"""Small random networks of diffusers, built as public checkpoints are, and inputs for them.

Each has the block types, projections, heads and embeddings of the checkpoint that it is named after, with fewer and
narrower levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from .networks import seeded

TOKENS = 11  # of the encoder's hidden states
SD15 = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,  # the number of heads, in spite of its name
}
SD21 = {**SD15, "attention_head_dim": (1, 2, 4), "use_linear_projection": True}
CONFIGURATIONS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "sd15": (UNet2DConditionModel, SD15),
    "sd21": (UNet2DConditionModel, {**SD21, "layers_per_block": 2, "upcast_attention": True}),
    "sd_turbo": (UNet2DConditionModel, {**SD21, "cross_attention_dim": 40}),
    "lcm": (UNet2DConditionModel, {**SD15, "time_cond_proj_dim": 16}),
    "sdxl_turbo": (
        UNet2DConditionModel,
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 24,
            "attention_head_dim": (2, 4),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 20 + 6 * 8,
        },
    ),
    "sdxs": (
        UNet2DConditionModel,
        {
            **SD15,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "mid_block_type": None,
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "ddpm": (
        UNet2DModel,
        {
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "norm_num_groups": 8,
            "norm_eps": 1e-6,
            "attention_head_dim": None,  # one head
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
        },
    ),
    "scale_shift": (
        UNet2DModel,
        {
            "block_out_channels": (24, 40),  # groups of 3, 5 and 8 channels
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 8,
            "resnet_time_scale_shift": "scale_shift",
            "num_class_embeds": 10,
        },
    ),
    "vae_kl": (
        AutoencoderKL,
        {
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
    ),
    "vae_tiny": (
        AutoencoderTiny,
        {
            "encoder_block_out_channels": (16, 16, 16, 16),
            "decoder_block_out_channels": (16, 16, 16, 16),
            "num_encoder_blocks": (1, 2, 2, 2),
            "num_decoder_blocks": (2, 2, 2, 1),
        },
    ),
    "controlnet": (
        ControlNetModel,
        {
            **{name: value for name, value in SD15.items() if name != "up_block_types"},
            "conditioning_embedding_out_channels": (4, 8, 8, 16),
        },
    ),
}
NAMES = tuple(CONFIGURATIONS)
CONDITIONAL = ("sd15", "sd21", "sd_turbo", "lcm", "sdxl_turbo", "sdxs")
AUTOENCODERS = ("vae_kl", "vae_tiny")
# heights and widths of a sample; of latents for an autoencoder. The last is a multiple of no power of 2 but 2, where
# the network allows it.
SIZES = {name: ((16, 16), (24, 16), (18, 20)) for name in NAMES}
SIZES["ddpm"] = SIZES["scale_shift"] = ((16, 16), (24, 16), (12, 20))
SIZES["vae_kl"] = SIZES["vae_tiny"] = ((8, 8), (12, 8), (9, 10))


def network(name: str, **changes: Any) -> Any:
    """A network of random weights, for inference.

    Args:
        name: of `CONFIGURATIONS`.
        changes: of its configuration.
    """
    kind, configuration = CONFIGURATIONS[name]
    with torch.random.fork_rng():
        return seeded(kind(**{**configuration, **changes}))


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Float32, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def inputs(module: nn.Module, n: int = 1, size: Sequence[int] = (16, 16), timestep: Any = 999, seed: int = 0) -> Any:
    """What a call is given, by name: for an autoencoder, pictures to encode and latents to decode.

    Args:
        module: a network of this file's kinds.
        n: batch size.
        size: height and width, see `SIZES`.
        timestep: a number or a tensor.
        seed: of the numbers.
    """
    height, width = size
    config: Any = module.config
    if isinstance(module, (AutoencoderKL, AutoencoderTiny)):
        pixels = 4 if isinstance(module, AutoencoderKL) else 8
        return {
            "pictures": randn(n, 3, pixels * height, pixels * width, seed=seed).tanh(),
            "latents": 0.6 * randn(n, config.latent_channels, height, width, seed=seed + 1),  # as the encoder gives
        }
    given = {"sample": randn(n, config.in_channels, height, width, seed=seed), "timestep": timestep}
    if isinstance(module, UNet2DModel):
        if config.num_class_embeds is not None:
            given["class_labels"] = torch.arange(seed, seed + n) % config.num_class_embeds
        return given
    given["encoder_hidden_states"] = randn(n, TOKENS, config.cross_attention_dim, seed=seed + 1)
    if config.get("time_cond_proj_dim"):
        given["timestep_cond"] = randn(n, config.time_cond_proj_dim, seed=seed + 2)
    if config.addition_embed_type == "text_time":
        size_and_crop = torch.tensor([[8 * height, 8 * width, 0, seed, 8 * height, 8 * width]], dtype=torch.float32)
        given["added_cond_kwargs"] = {
            "text_embeds": randn(n, config.projection_class_embeddings_input_dim - 48, seed=seed + 3),
            "time_ids": size_and_crop.repeat(n, 1),
        }
    if isinstance(module, ControlNetModel):
        given["controlnet_cond"] = randn(n, 3, 8 * height, 8 * width, seed=seed + 4).sigmoid()
    return given


def residuals(unet: UNet2DConditionModel, n: int = 1, size: Sequence[int] = (16, 16), seed: int = 0) -> dict[str, Any]:
    """What a ControlNet adds to a call of a UNet of the structure of "sd15"."""
    control = network("controlnet", layers_per_block=unet.config.layers_per_block)
    with torch.no_grad():
        down, mid = control(**inputs(control, n, size, seed=seed), conditioning_scale=0.5, return_dict=False)
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}


def call(module: nn.Module, given: dict[str, Any]) -> list[Tensor]:
    """All tensors that the network gives for what `inputs` returned."""
    with torch.no_grad():
        if isinstance(module, AutoencoderKL):
            encoded = module.encode(given["pictures"]).latent_dist.parameters
            return [encoded, module.decode(given["latents"]).sample]
        if isinstance(module, AutoencoderTiny):
            return [module.encode(given["pictures"]).latents, module.decode(given["latents"]).sample]
        results = module(**given, return_dict=False)
    if isinstance(module, ControlNetModel):
        down, mid = results
        return [*down, mid]
    return list(results)


def arguments(given: dict[str, Any]) -> dict[str, Any] | tuple[Tensor, ...]:
    """What `inputs` returned as the arguments of one call of the module itself."""
    return (given["pictures"],) if "pictures" in given else given


def parts(module: nn.Module) -> dict[str, nn.Module]:
    """By name, those modules that run natively: an autoencoder's encoder and decoder, else the module itself."""
    if isinstance(module, (AutoencoderKL, AutoencoderTiny)):
        return {"encoder": module.encoder, "decoder": module.decoder}
    return {"": module}


def error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest ``|y - y_ref| / |y_ref|``, in the root mean square, of the tensors that a call gives."""
    assert [y.shape for y in results] == [y.shape for y in expected]
    # max() would pass over a NaN
    errors = [float((y.double() - x.double()).norm() / x.double().norm()) for y, x in zip(results, expected)]
    return next((each for each in errors if each != each), max(errors))
