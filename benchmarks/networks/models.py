"""The networks that are measured: diffusers' own classes by the configurations of public checkpoints, random weights.

The tests of the native runtime take their networks from here, too. `make` builds a network, `inputs` what it is called
with, `evaluate` calls it:

    unet = make("sd-turbo", scale=0.1)
    y = evaluate(unet, inputs("sd-turbo", batch=1, size=16, scale=0.1))
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coalescer_fast.bench import calls
from coalescer_fast.bench.calls import NESTED, TIME_IDS, TOKENS, Flat, evaluate, flat

__all__ = ("NETWORKS", "TIMESTEPS", "TOKENS", "Flat", "config", "evaluate", "fill", "flat", "gflop", "inputs", "make")

TIMESTEPS = (999, 499, 19)  # of the inputs to calibrate on; the first is that of the measured call
POOLED = 1280  # features of SDXL's pooled text


@dataclass(frozen=True)
class Network:
    """A network of a public checkpoint.

    Attributes:
        kind: diffusers' class, of which an autoencoder's decoder alone is run.
        config: what differs from the defaults of the class.
        size: height and width of its latents.
    """

    kind: str
    config: dict[str, Any]
    size: int = 64


CROSS_DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
CROSS_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
LOW_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
LOW_UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")

SD15: dict[str, Any] = {
    "down_block_types": CROSS_DOWN,
    "up_block_types": CROSS_UP,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD21 = {**SD15, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}

NETWORKS = {
    # runwayml/stable-diffusion-v1-5
    "sd15": Network("UNet2DConditionModel", SD15),
    # stabilityai/stable-diffusion-2-1; sd-turbo has the same UNet at 512x512 pixels
    "sd21": Network("UNet2DConditionModel", SD21, 96),
    "sd-turbo": Network("UNet2DConditionModel", SD21),
    # SimianLuo/LCM_Dreamshaper_v7, and what the LCM distillation of SD 1.5 makes
    "lcm-sd15": Network("UNet2DConditionModel", {**SD15, "time_cond_proj_dim": 256}),
    # stabilityai/sdxl-turbo
    "sdxl-turbo": Network(
        "UNet2DConditionModel",
        {
            "down_block_types": LOW_DOWN,
            "up_block_types": LOW_UP,
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    # IDKiro/sdxs-512-dreamshaper
    "sdxs": Network(
        "UNet2DConditionModel",
        {
            "down_block_types": LOW_DOWN,
            "mid_block_type": None,
            "up_block_types": LOW_UP,
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 1,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
    ),
    # google/ddpm-cifar10-32
    "ddpm": Network(
        "UNet2DModel",
        {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (128, 256, 256, 256),
            "attention_head_dim": None,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
        },
        32,
    ),
    # madebyollin/taesd
    "tiny-vae": Network(
        "AutoencoderTiny",
        {"encoder_block_out_channels": (64, 64, 64, 64), "decoder_block_out_channels": (64, 64, 64, 64)},
    ),
    # the autoencoder of SD 1.5 and of sd-turbo
    "kl-vae": Network(
        "AutoencoderKL",
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
        },
    ),
}


def config(name: str, scale: float = 1.0) -> dict[str, Any]:
    """The configuration of a network, for its class in diffusers.

    Args:
        name: a key of `NETWORKS`.
        scale: multiplies widths, heads and the depth of transformers, rounded so that groups and heads divide widths.
    """
    found = dict(NETWORKS[name].config)
    if scale == 1:
        return found
    for key in ("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels"):
        if key in found:
            found[key] = tuple(_scaled(n, scale) for n in found[key])
    if isinstance(heads := found.get("attention_head_dim"), tuple):
        pairs = zip(heads, found["block_out_channels"])
        found["attention_head_dim"] = tuple(_divisor(width, round(scale * n)) for n, width in pairs)
    if "transformer_layers_per_block" in found:
        depths = found["transformer_layers_per_block"]
        found["transformer_layers_per_block"] = tuple(max(1, round(scale * n)) for n in depths)
    if "cross_attention_dim" in found:
        found["cross_attention_dim"] = _scaled(found["cross_attention_dim"], scale)
    if "projection_class_embeddings_input_dim" in found:
        features = TIME_IDS * found["addition_time_embed_dim"] + _scaled(POOLED, scale)
        found["projection_class_embeddings_input_dim"] = features
    return found


def _scaled(width: int, scale: float) -> int:
    """A multiple of 32, the number of groups of normalisations."""
    return max(1, round(scale * width / 32)) * 32


def _divisor(width: int, most: int) -> int:
    """The largest divisor of the width that is at most this, and at least 1."""
    return next(n for n in range(max(1, most), 0, -1) if width % n == 0)


def on_meta(name: str, scale: float = 1.0) -> nn.Module:
    """The network without memory, in evaluation mode; of an autoencoder the decoder."""
    import diffusers

    kind = NETWORKS[name].kind
    with torch.device("meta"):
        module: Any = getattr(diffusers, kind)(**config(name, scale))
    module = module.decoder if kind.startswith("Autoencoder") else module
    return module.eval().requires_grad_(False)


def make(
    name: str,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The network with random weights: the same numbers in every process on one kind of device, rounded to ``dtype``.

    Args:
        name: a key of `NETWORKS`.
        scale: see `config`.
        dtype: of the weights, in which they are made one by one: there is never a copy of all in float32.
        seed: of the weights.
        device: where they are drawn.
    """
    module = nn.Module.to(on_meta(name, scale), dtype)  # diffusers' own to() warns of layers that none of these have
    return fill(module.to_empty(device=device), seed)


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all weights of a module in place, such that activations stay near 1.

    Matrices and kernels have variance 1/fan_in, scales of normalisations lie around 1, and biases around 0.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator(parameter.device).manual_seed(seed + zlib.crc32(name.encode()))
            drawn = torch.randn(parameter.shape, dtype=torch.float32, generator=generator, device=parameter.device)
            if parameter.ndim > 1:
                drawn *= parameter[0].numel() ** -0.5
            else:
                drawn.mul_(0.1)
                if name.endswith("weight"):
                    drawn += 1
            parameter.copy_(drawn)
    return module


def inputs(
    name: str,
    batch: int = 1,
    size: int | None = None,
    scale: float = 1.0,
    timestep: int = TIMESTEPS[0],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The arguments of a call of the network, drawn anew for each timestep.

    Args:
        name: a key of `NETWORKS`.
        batch: number of images.
        size: height and width of the latents; those of the checkpoint if None.
        scale: see `config`.
        timestep: of a UNet.
        seed: of the numbers.
        dtype: of all but the timestep.
    """
    network, settings = NETWORKS[name], config(name, scale)
    size = size or network.size
    if "UNet" in network.kind:
        return calls.inputs(network.kind, settings, batch, size, timestep, seed, dtype)
    generator = torch.Generator().manual_seed(seed + timestep)
    sample = torch.randn((batch, 4, size, size), dtype=torch.float32, generator=generator).to(dtype)
    return {"x" if network.kind == "AutoencoderTiny" else "sample": sample}


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def gflop(name: str, batch: int, size: int | None, scale: float = 1.0) -> float:
    """Billions of floating point operations of the products and convolutions of a call, attention included."""
    module, arguments = on_meta(name, scale), inputs(name, batch, size, scale)
    moved: dict[str, Any] = {
        key: value.to("meta") if isinstance(value, Tensor) else value for key, value in arguments.items()
    }
    if NESTED in moved:
        moved[NESTED] = {key: value.to("meta") for key, value in moved[NESTED].items()}
    # attention by products, which are counted
    with torch.no_grad(), FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        evaluate(module, moved)
    return flops.get_total_flops() / 1e9
