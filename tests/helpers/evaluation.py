"""A data set and a pipeline that are evaluated in seconds."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from coalescer_fast.models import CoalescerAutoencoder, CoalescerUNet
from coalescer_fast.pipeline import CoalescerPipeline
from coalescer_fast.scheduler import CoalescerScheduler
from coalescer_fast.training.classifier import PictureClassifier
from coalescer_fast.training.coalescer import description_encoder
from coalescer_fast.training.data import Concept, PictureDataset

STYLES = ("3d", "flat", "noto", "blob")
UNET = dict(
    sample_size=4,
    latent_channels=12,
    block_out_channels=(16, 16),
    norm_num_groups=4,
    attention_levels=(),
    mid_attention=False,
    description_dim=128,
    embedding_dim=16,
    anchor="mlp",
    anchor_hidden_dim=16,
)


def tiny_data() -> PictureDataset:
    """Eight concepts of two groups in four styles, 16x16 noise; the last two concepts are held out."""
    words = ("cat", "dog", "pizza", "bread", "horse", "cake", "tiger", "rice")
    groups = ("animals", "animals", "food", "food", "animals", "food", "animals", "food")
    concepts = tuple(
        Concept(word, tuple(f"{word} {part}" for part in "abc"), group) for word, group in zip(words, groups)
    )
    images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3)).astype(np.uint8)
    concept, style = np.divmod(np.arange(32), 4)
    return PictureDataset(images, concepts, concept, STYLES, style, held_out=concept >= 6)


def pipeline_for(data: PictureDataset, guidance_scale: float = 1.5) -> CoalescerPipeline:
    """An untrained pipeline that knows the training names and styles of ``data``."""
    torch.manual_seed(0)
    unet = CoalescerUNet(**UNET).eval()
    nn.init.normal_(unet.anchor_mlp.linear_out.weight)
    vae = CoalescerAutoencoder(2, 12, 8, (1, 1), (1, 1)).eval()
    return CoalescerPipeline(
        unet, CoalescerScheduler(guidance_scale=guidance_scale), description_encoder(data.train()), vae
    )


def classifier() -> PictureClassifier:
    torch.manual_seed(0)
    return PictureClassifier(size=16, num_features=4).eval()
