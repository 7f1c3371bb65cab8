"""Train a coalescer in miniature: coloured squares, from pictures in a folder to a pipeline that draws them.

pip install '.[train]'
python examples/train_squares.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from coalescer_fast import CoalescerPipeline
from coalescer_fast.training.autoencoder import AutoencoderConfig
from coalescer_fast.training.coalescer import CoalescerConfig, train_coalescer
from coalescer_fast.training.data import load_folder
from coalescer_fast.training.loop import Schedule
from coalescer_fast.training.prompts import PromptConfig

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "black": (20, 20, 20)}

# A data set is a folder of pictures with captions.
folder = Path("squares")
folder.mkdir(exist_ok=True)
lines = []
random = np.random.default_rng(0)
for name, colour in COLOURS.items():
    for i in range(4):
        picture = np.full((16, 16, 3), 255, np.uint8)
        picture[2:-2, 2:-2] = np.clip(np.array(colour) + random.integers(-15, 15, 3), 0, 255)
        Image.fromarray(picture).save(folder / f"{name}-{i}.png")
        lines.append(json.dumps({"file_name": f"{name}-{i}.png", "text": name, "keywords": ["square"]}))
(folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
data = load_folder(folder, size=16)

# coalescer-fast train reads the same settings from a TOML file.
config = CoalescerConfig(
    autoencoder=AutoencoderConfig(
        Schedule(steps=600, batch_size=8, learning_rate=2e-3, ema_decay=0.98, checkpoint_every=600, sample_every=600),
        model={"latent_channels": 4, "width": 32, "encoder_blocks": (1, 1), "decoder_blocks": (1, 1)},
        permute_colours=0.0,
    ),
    anchor=Schedule(steps=150, batch_size=16, learning_rate=5e-3, ema_decay=0.9, checkpoint_every=150),
    schedule=Schedule(
        steps=32, batch_size=8, learning_rate=2e-3, warmup_steps=1, ema_decay=0.9, checkpoint_every=32, sample_every=32
    ),
    overrides={
        "sample_size": 4,
        "latent_channels": 4,
        "block_out_channels": (16, 16),
        "norm_num_groups": 4,
        "attention_levels": (),
        "embedding_dim": 16,
        "anchor_hidden_dim": 32,
    },
    pairing_warmup=4,
    prompts=PromptConfig(queue_size=32, min_group=4),
)
train_coalescer(config, data, Path("run"), progress=False)

pipe = CoalescerPipeline.from_pretrained("run/pipeline")
pipe.set_progress_bar_config(disable=True)
images = pipe(list(COLOURS), generator=torch.Generator().manual_seed(0), output_type="pt").images
for name, colour in zip(COLOURS, images[:, :, 6:10, 6:10].mean((2, 3))):
    print(f"{name}: the middle of the picture has the colour {[round(255 * c) for c in colour.tolist()]}")
