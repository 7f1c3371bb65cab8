"""Pipelines of random weights: a tiny one, made, saved and called in milliseconds, and a small one to export."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from coalescer_fast import (
    CoalescerAutoencoder,
    CoalescerPipeline,
    CoalescerScheduler,
    CoalescerUNet,
    DescriptionEncoder,
)

TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "octopus", "cat", "dog", "red", "style", "3d", "flat", "海")
STYLES = ("3d", "flat")
UNET = {
    "sample_size": 4,
    "latent_channels": 3,
    "block_out_channels": (8, 12),
    "norm_num_groups": 4,
    "attention_levels": (1,),
    "mid_attention": False,
    "num_attention_heads": 2,
    "description_dim": 6,
    "embedding_dim": 10,
}
ANCHORED = {**UNET, "anchor": "mlp", "anchor_hidden_dim": 7}
FREE = {**UNET, "cross_attention_dim": 6}
SIZE = 16  # pixels: latents of 4, times 4


def tiny_pipeline(unet: dict | None = None, **scheduler) -> CoalescerPipeline:
    """A pipeline of random weights that sample to something of size 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CoalescerUNet(**(unet or ANCHORED))
        vae = CoalescerAutoencoder(2, 3, 8, (1, 1), (1, 1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                gain = 0.3 if "head" in name else 1.0  # near the anchor's residual heads, many steps converge
                parameter.copy_(
                    gain * torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter[0].numel())
                )
            elif "null" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    random = np.random.default_rng(0)
    encoder = DescriptionEncoder.from_table(
        random.integers(-127, 128, (len(TOKENS), 6)).astype(np.int8),
        np.ones(6, np.float32),
        np.frombuffer("\n".join(TOKENS).encode("utf-8"), np.uint8),
        STYLES,
        ("octopus", "cat"),
        np.array([[1, 1], [0, 1]]),
    )
    pipe = CoalescerPipeline(network.eval(), CoalescerScheduler(**scheduler), encoder, vae.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def noise(n: int, size: int = 4, value: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=seed(value))


SMALL_UNET = {
    "sample_size": 4,
    "latent_channels": 4,
    "block_out_channels": (8, 12),
    "norm_num_groups": 4,
    "attention_levels": (1,),
    "mid_attention": False,
    "num_attention_heads": 2,
    "embedding_dim": 16,
}


def small_pipeline(**config) -> CoalescerPipeline:
    """An untrained pipeline with the embedded model's descriptions, exported in seconds; the same in every process.

    Args:
        config: arguments of the UNet in place of those of ``SMALL_UNET``.
    """
    embedded = CoalescerPipeline.from_pretrained("emoji-64")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet, vae = CoalescerUNet(**{**SMALL_UNET, **config}), CoalescerAutoencoder(1, 4, 8, (1, 1), (1, 1))
        for module in unet.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    pipe = CoalescerPipeline(unet.eval(), embedded.scheduler, embedded.description_encoder, vae.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe
