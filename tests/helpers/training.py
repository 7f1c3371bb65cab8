"""A training of seconds: sixteen small pictures, and a network for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from coalescer_fast.training.coalescer import CoalescerConfig, train_coalescer
from coalescer_fast.training.data import Concept, PictureDataset
from coalescer_fast.training.loop import Schedule
from coalescer_fast.training.prompts import PromptConfig

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "black": (20, 20, 20)}
OVERRIDES = {
    "sample_size": 4,
    "latent_channels": 4,
    "block_out_channels": (16, 16),
    "norm_num_groups": 4,
    "attention_levels": (),
    "embedding_dim": 16,
    "anchor_hidden_dim": 32,
}


def squares() -> PictureDataset:
    """Sixteen 16x16 pictures: a square of each of four colours in two styles, slightly different each time."""
    rng = np.random.default_rng(0)
    images, concept, style = [], [], []
    for c, colour in enumerate(COLOURS.values()):
        for s in range(2):
            for _ in range(2):
                picture = np.full((16, 16, 3), 255, np.uint8)
                inset = 2 + 3 * s
                picture[inset:-inset, inset:-inset] = np.clip(np.array(colour) + rng.integers(-15, 15, 3), 0, 255)
                images.append(picture)
                concept.append(c)
                style.append(s)
    concepts = tuple(Concept(name, ("square", f"{name}ish"), "shapes") for name in COLOURS)
    return PictureDataset(np.stack(images), concepts, np.array(concept), ("flat", "3d"), np.array(style))


def configuration(folder: Path, **changes) -> CoalescerConfig:
    base = CoalescerConfig(
        schedule=Schedule(
            steps=16,
            batch_size=8,
            learning_rate=2e-3,
            warmup_steps=1,
            ema_decay=0.9,
            checkpoint_every=8,
            sample_every=8,
        ),
        autoencoder=str(folder / "autoencoder"),
        anchor=Schedule(steps=20, batch_size=16, learning_rate=5e-3, ema_decay=0.9, checkpoint_every=10),
        overrides=OVERRIDES,
        pairing_warmup=4,
        prompts=PromptConfig(queue_size=32, min_group=4),
        sheet=("red", "blue, flat style"),
    )
    return replace(base, **changes)


def train(autoencoder: str | Path, out: str | Path) -> None:
    """A training of 64 steps in one thread, in a process of its own."""
    torch.set_num_threads(1)
    schedule = Schedule(
        steps=64, batch_size=8, learning_rate=2e-3, ema_decay=0.9, checkpoint_every=8, sample_every=1000
    )
    train_coalescer(configuration(Path(autoencoder), schedule=schedule), squares(), Path(out), progress=False)
