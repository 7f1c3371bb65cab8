"""Tiny pipelines of diffusers, of random weights. They need transformers, which the package does not."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .diffusers_networks import network, randn
from .networks import seeded

SIDE = 64  # of a picture; latents are a quarter of it
LETTERS = [chr(ord("a") + i) for i in range(26)]
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
UNETS = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionImg2ImgPipeline": "sd_turbo",
    "StableDiffusionInpaintPipeline": "sd15",
    "StableDiffusionControlNetPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl_turbo",
    "LatentConsistencyModelPipeline": "lcm",
}
NAMES = tuple(UNETS)


def tokenizer() -> CLIPTokenizer:
    """One that spells words."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(WORDS)}), "utf-8")
        merges.write_text("#version: 0.2\n", "utf-8")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=11)


def text_encoder(width: int, projection: int | None = None) -> Any:
    """A text encoder whose states have ``width`` channels."""
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=11,
        projection_dim=projection or width,
        bos_token_id=WORDS.index("<|startoftext|>"),
        eos_token_id=WORDS.index("<|endoftext|>"),
    )
    with torch.random.fork_rng():
        return seeded((CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config))


def pipeline(name: str, vae: str = "vae_kl", **changes: Any) -> Any:
    """A pipeline of random weights, without progress bars.

    Args:
        name: of its class.
        vae: a network of `diffusers_networks`.
        changes: of its components.
    """
    changed = {"in_channels": 9} if name == "StableDiffusionInpaintPipeline" else {}
    unet = network(UNETS[name], sample_size=SIDE // 4, **changed)
    components = {
        "unet": unet,
        "vae": network(vae),
        "scheduler": diffusers.DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False),
    }
    states = unet.config.cross_attention_dim
    if name == "StableDiffusionXLPipeline":
        components |= {"tokenizer": tokenizer(), "tokenizer_2": tokenizer()}
        components |= {"text_encoder": text_encoder(8), "text_encoder_2": text_encoder(states - 8, projection=20)}
    else:
        components |= {"tokenizer": tokenizer(), "text_encoder": text_encoder(states)}
        components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if name == "LatentConsistencyModelPipeline":
        components["scheduler"] = diffusers.LCMScheduler(beta_schedule="scaled_linear")
    if name == "StableDiffusionControlNetPipeline":
        components["controlnet"] = network("controlnet", conditioning_embedding_out_channels=(4, 8, 16))
    pipe = getattr(diffusers, name)(**{**components, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(name: str, n: int = 1, **more: Any) -> dict[str, Any]:
    """Those of a call of the pipeline of this name, without the noise."""
    given: dict[str, Any] = {
        "prompt": ["a cat", "two dogs"][:n],
        "num_inference_steps": 2,
        "output_type": "pt",
    }
    picture = randn(n, 3, SIDE, SIDE, seed=7).sigmoid()
    if name == "StableDiffusionImg2ImgPipeline":
        given |= {"image": picture, "strength": 0.7, "num_inference_steps": 3}
    elif name == "StableDiffusionInpaintPipeline":
        hole = torch.zeros(n, 1, SIDE, SIDE, dtype=torch.float32)
        hole[:, :, 8:40, 16:50] = 1
        given |= {"image": picture, "mask_image": hole, "height": SIDE, "width": SIDE}
    elif name == "StableDiffusionControlNetPipeline":
        given["image"] = picture
    else:
        given |= {"height": SIDE, "width": SIDE}
    return {**given, **more}


def draw(pipe: Any, n: int = 1, **more: Any) -> torch.Tensor:
    """Pictures (N, 3, H, W) in [0, 1], of always the same noise."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():  # img2img of some versions samples the picture's latents without the generator
        torch.manual_seed(0)
        return pipe(**arguments(type(pipe).__name__, n, **more), generator=generator).images


def psnr(x: torch.Tensor, expected: torch.Tensor) -> float:
    """The smallest over the pictures, in dB."""
    squares = (x.double() - expected.double()).square().flatten(1).mean(1)
    return float(-10 * squares.log10().max())
