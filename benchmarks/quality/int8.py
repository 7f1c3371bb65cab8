"""What 8 bits cost, kind of product by kind, on a small UNet of Stable Diffusion's structure that was trained a little.

OMP_NUM_THREADS=1 python -m benchmarks.quality.int8 --data emoji_32.npz --out runs/int8
"""

from __future__ import annotations

import argparse
import math
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from coalescer_fast.training.data import PictureDataset, load

from ..networks import models

SCALE = 0.2  # of SD-Turbo's widths: 64, 128, 256 and 256
PATCH = 2  # pixels a side that are the channels of a position
STEPS, BATCH, LEARNING_RATE = 400, 16, 4e-4
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def small_unet(folder: Path, data: PictureDataset, steps: int = STEPS) -> Any:
    """The UNet in a folder, which is trained if it is not there."""
    if (folder / "config.json").exists():
        return UNet2DConditionModel.from_pretrained(folder).eval().requires_grad_(False)
    torch.manual_seed(0)
    channels = 3 * PATCH**2
    unet = UNet2DConditionModel(**models.config("sd-turbo", SCALE), in_channels=channels, out_channels=channels)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    train = data.train()
    started = time.time()
    for step in range(steps):
        lr = LEARNING_RATE * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr
        index = torch.randint(len(train), (BATCH,), generator=generator)
        noisy, given, noise = call(train, index, None, generator)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noisy, **given).sample
        loss = F.mse_loss(predicted.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            print(step, loss.item(), time.time() - started, flush=True)
    unet.save_pretrained(folder)
    return unet.eval().requires_grad_(False)


def call(
    data: PictureDataset, index: Tensor, timestep: int | None, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Noisy pictures, the other arguments of a call, and the noise. Timesteps are drawn if none is given."""
    pictures = torch.from_numpy(data.images[index.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
    clean = F.pixel_unshuffle(pictures, PATCH)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float32)
    if timestep is None:
        timesteps = torch.randint(1000, (len(clean),), generator=generator)
    else:
        timesteps = torch.full((len(clean),), timestep, dtype=torch.int64)
    noisy = DDPMScheduler(**SCHEDULER).add_noise(clean, noise, timesteps)
    tokens = torch.stack([described(data.concepts[int(data.concept[i])].name) for i in index])
    return noisy, {"timestep": timesteps, "encoder_hidden_states": tokens}, noise


def described(text: str) -> Tensor:
    """A text as tokens (77, D): a vector for each word, and what fills them up."""
    width = models.config("sd-turbo", SCALE)["cross_attention_dim"]
    words = [*text.split(), *["<end>"] * models.TOKENS][: models.TOKENS]
    return torch.stack(
        [
            torch.randn(width, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())), dtype=torch.float32)
            for word in words
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.int8", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, metavar="FILE.npz", help="pictures of 32x32, by build-data")
    parser.add_argument("--out", type=Path, default=Path("runs/int8"), metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    small_unet(args.out / "unet", load(args.data))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
