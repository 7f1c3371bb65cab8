"""Training of the image autoencoder.

    L = |e| + 2 e^2 + 1/2 |grad e| + |mean_4x4(e)|

with e the error of the reconstruction, and means over all elements. Noise of random strength is added to the latents,
so that the decoder tolerates the errors of a sampler.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from .. import files
from ..folders import WEIGHTS, embedded_models
from ..models.autoencoder import CoalescerAutoencoder
from ..schema import check_arguments
from .data import PictureDataset
from .loop import Schedule, Trainer, make_accelerator
from .pictures import sheet, to_tensor, to_uint8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AutoencoderConfig:
    """How an autoencoder is trained.

    Attributes:
        schedule: of the training.
        model: arguments of `CoalescerAutoencoder`.
        latent_noise: largest standard deviation of the noise that is added to latents.
        flip: probability that a picture is mirrored.
        permute_colours: probability that the colours of a batch are permuted.
        train_encoder: False trains the decoder alone, so that the latents stay those that a coalescer was trained on.
        init: folder of a saved autoencoder to start from instead of ``model``, or the name of an embedded model.
        seed: of the weights and of all random draws.
    """

    schedule: Schedule
    model: dict[str, Any] = field(default_factory=dict)
    latent_noise: float = 0.2
    flip: float = 0.5
    permute_colours: float = 0.3
    train_encoder: bool = True
    init: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        check_arguments(self.model, CoalescerAutoencoder.__init__, "model")
        for name in ("latent_noise", "flip", "permute_colours"):
            if not 0 <= getattr(self, name) <= (math.inf if name == "latent_noise" else 1):
                limit = "up" if name == "latent_noise" else "to 1"
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number from 0 {limit}")


def reconstruction_loss(reconstruction: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """The loss of reconstructed pictures (N, 3, H, W), a scalar."""
    error = reconstruction - picture
    gradient = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * gradient + F.avg_pool2d(error, 4).abs().mean()


def batch(
    data: PictureDataset, size: int, config: AutoencoderConfig, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augmented pictures (N, 3, H, W), and the strength (N, 1, 1, 1) of the noise of each latent."""
    index = torch.randint(len(data), (size,), generator=generator)
    pictures = to_tensor(data.images[index.numpy()])
    flip = torch.rand(size, dtype=torch.float32, generator=generator) < config.flip
    pictures = torch.where(flip[:, None, None, None], pictures.flip(3), pictures)
    if torch.rand((), dtype=torch.float32, generator=generator) < config.permute_colours:
        pictures = pictures[:, torch.randperm(3, generator=generator)]
    return pictures, config.latent_noise * torch.rand(size, 1, 1, 1, dtype=torch.float32, generator=generator)


def train_autoencoder(
    config: AutoencoderConfig,
    data: PictureDataset,
    output_dir: Path,
    *,
    allow_changes: bool = False,
    progress: bool = True,
) -> CoalescerAutoencoder:
    """Train an autoencoder, or resume its training, and save it.

    Args:
        config: how it is trained.
        data: pictures; those that are held out are not trained on.
        output_dir: folder of the checkpoint, of sample sheets and of the saved autoencoder.
        allow_changes: resume even if the configuration or the pictures have changed.
        progress: show a bar.

    Returns:
        The averaged autoencoder with exact latent statistics.

    Raises:
        ValueError: if ``config.init`` has no autoencoder, or the checkpoint cannot be resumed.
    """
    init = WEIGHTS / config.init / "vae" if config.init in embedded_models() else Path(config.init)
    if config.init and not (init / "config.json").is_file():
        raise ValueError(
            f"init is {config.init!r}, where there is no autoencoder: train that first, or give another folder"
        )
    accelerator = make_accelerator()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = CoalescerAutoencoder.from_pretrained(init) if config.init else CoalescerAutoencoder(**config.model)
    model.to(memory_format=torch.channels_last)
    model.encoder.requires_grad_(config.train_encoder)
    training, held = data.train(), data.held()
    others = {key: value for key, value in asdict(config).items() if key not in ("schedule", "seed", "init")}
    trainer = Trainer(
        "autoencoder",
        model,
        config.schedule,
        output_dir,
        accelerator,
        config.seed,
        settings={**others, "data": training.fingerprint()},
        allow_changes=allow_changes,
        progress=progress,
    )
    probe = to_tensor((held if len(held) else training).images[:32])

    def loss(network: nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        model.latent_norm.train(config.train_encoder)
        generator = trainer.generator(step)
        pictures, strength = batch(training, config.schedule.batch_size, config, generator)
        shape = (
            len(pictures),
            model.config.latent_channels,
            *(side // model.scale_factor for side in pictures.shape[2:]),
        )
        noise = strength * torch.randn(shape, dtype=torch.float32, generator=generator)
        pictures = pictures.to(accelerator.device, memory_format=torch.channels_last)
        reconstruction = network(pictures, noise.to(accelerator.device), return_dict=False)[0]
        value = reconstruction_loss(reconstruction.float(), pictures)
        return value, {}

    @torch.no_grad()
    def on_sample(averaged: nn.Module, step: int) -> None:
        assert isinstance(averaged, CoalescerAutoencoder)
        if config.train_encoder:  # the averaged encoder's statistics are not the running ones
            set_latent_statistics(averaged, training.take(np.arange(0, len(training), max(1, len(training) // 512))))
        reconstruction = averaged(probe.to(accelerator.device)).sample.cpu()
        logger.info("step %d: %.2f dB on %d held-out pictures", step, psnr(reconstruction, probe).mean(), len(probe))
        rows = [Image.fromarray(p) for pair in zip(to_uint8(probe), to_uint8(reconstruction)) for p in pair]
        files.write_picture(output_dir / f"autoencoder-{step:06d}.png", sheet(rows, columns=16))

    averaged = trainer.run(loss, on_sample)
    assert isinstance(averaged, CoalescerAutoencoder)
    if accelerator.is_main_process:
        if config.train_encoder:
            set_latent_statistics(averaged, training)
        with files.writing_folder(output_dir / "autoencoder") as folder:
            averaged.save_pretrained(folder)
    accelerator.wait_for_everyone()
    return averaged


@torch.no_grad()
def set_latent_statistics(model: CoalescerAutoencoder, data: PictureDataset, batch_size: int = 256) -> None:
    """Set ``latent_norm`` to the exact mean and variance of each channel of the pictures' latents."""
    device = next(model.parameters()).device
    parts = [
        model.encoder(
            F.pixel_unshuffle(to_tensor(data.images[i : i + batch_size]).to(device), model.patch_size)
        ).double()
        for i in range(0, len(data), batch_size)
    ]
    latents, norm = torch.cat(parts), model.latent_norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(latents.mean((0, 2, 3)))
    norm.running_var.copy_(latents.var((0, 2, 3), correction=0))


@torch.no_grad()
def encode(model: CoalescerAutoencoder, data: PictureDataset, batch_size: int = 256) -> torch.Tensor:
    """Standardised latents (N, C, H/f, W/f) of all pictures, float32 on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    return torch.cat(
        [
            model.encode(to_tensor(data.images[i : i + batch_size]).to(device)).latents.cpu()
            for i in range(0, len(data), batch_size)
        ]
    )


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (N,) in dB of pictures in [-1, 1]: -10 log10(mean(((a - b)/2)^2))."""
    return -10 * ((a.clamp(-1, 1) - b) / 2).square().flatten(1).mean(1).clamp_min(1e-10).log10()
