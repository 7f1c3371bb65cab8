"""A pipeline that is exported in seconds."""

from __future__ import annotations

import torch
from torch import nn

import coalescer_fast as cf
from coalescer_fast.models import CoalescerAutoencoder, CoalescerUNet

UNET = dict(
    sample_size=4,
    latent_channels=4,
    block_out_channels=(8, 12),
    norm_num_groups=4,
    attention_levels=(1,),
    mid_attention=False,
    num_attention_heads=2,
    embedding_dim=16,
)


def build(**config) -> cf.CoalescerPipeline:
    """An untrained pipeline with the embedded model's descriptions."""
    whole = cf.CoalescerPipeline.from_pretrained("emoji-64")
    torch.manual_seed(0)
    unet, vae = CoalescerUNet(**{**UNET, **config}).eval(), CoalescerAutoencoder(1, 4, 8, (1, 1), (1, 1)).eval()
    for module in unet.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    pipe = cf.CoalescerPipeline(unet, whole.scheduler, whole.description_encoder, vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe
