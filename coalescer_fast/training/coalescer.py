"""Training of a coalescer: the anchor's MLP first, then, with it frozen, the dual-head UNet.

A step draws R at mixed radii, ``R = a z + (1 - a) x`` with a = 1 (the prior) for half of the batch and a ~ U(0, 1) for the rest, so
that the second sampling step is on-distribution; the close picture comes from a pairing (`training.pairing`), renewed every
``queue_size / batch_size`` steps with the averaged network. A reconstruction: the seed's own lists of steps are lost.
"""

from __future__ import annotations

import logging
import random
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .. import files
from ..folders import WEIGHTS
from ..models import CoalescerAutoencoder, CoalescerUNet, DescriptionEncoder
from ..models.unet import CONFIGURATIONS, AnchorMLP
from ..pipeline import CoalescerPipeline
from ..runtime.engines.hashes import network_sha256
from ..scheduler import CoalescerScheduler
from ..schema import check_arguments
from . import checkpoint, pairing
from .autoencoder import AutoencoderConfig, encode, train_autoencoder
from .data import PictureDataset
from .flow_matching import FlowMatchingUNet
from .loop import Schedule, Trainer, make_accelerator
from .losses import DIRECTION_LOSSES, coalescer_loss, flow_matching_loss, mean_square
from .pictures import sheet
from .prompts import PromptConfig, PromptSampler

logger = logging.getLogger(__name__)

PAIRINGS = ("output_transport", "transport", "nearest", "nearest_of_k", "paired")
OBJECTIVES = ("coalescer", "flow_matching")


@dataclass(frozen=True)
class CoalescerConfig:
    """schedule, anchor: how the UNet and the anchor's MLP are trained; autoencoder: folder of a saved autoencoder, or how one is
    trained first; model: a named configuration; overrides: arguments of `CoalescerUNet` that differ from it; anchor_from: folder of a
    run whose anchor is taken over; pairing_warmup: steps for which output_transport matches in noise space; prior_share: share of R
    drawn from the prior; without: pictures left out, arguments of `PictureDataset.without`; prompts: what is said; scheduler: arguments
    of `CoalescerScheduler` stored with the model; sheet: prompts of the sample sheets."""

    schedule: Schedule
    autoencoder: str | AutoencoderConfig
    anchor: Schedule | None = None
    anchor_from: str = ""
    model: str = "emoji-64"
    overrides: dict[str, Any] = field(default_factory=dict)
    objective: str = "coalescer"
    pairing: str = "output_transport"
    direction_loss: str = "sqrt"
    nearest_of: int = 64
    pairing_warmup: int = 64
    prior_share: float = 0.5
    without: dict[str, Any] = field(default_factory=dict)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    scheduler: dict[str, Any] = field(default_factory=dict)
    sheet: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_arguments(self.overrides, CoalescerUNet.__init__, "overrides")
        check_arguments(self.without, PictureDataset.without, "without")
        try:
            re.compile(self.without.get("names", ""))
        except re.error as error:
            raise ValueError(f"without.names is no regular expression ({error})") from error
        check_arguments(self.scheduler, CoalescerScheduler.__init__, "scheduler")
        for name, least, most in (("nearest_of", 1, 2**31), ("pairing_warmup", 0, 2**62), ("prior_share", 0, 1)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number from {least} to {most}")
        choices = {
            "pairing": PAIRINGS,
            "objective": OBJECTIVES,
            "direction_loss": DIRECTION_LOSSES,
            "model": CONFIGURATIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        if self.anchor is not None and self.anchor.batch_size > self.prompts.queue_size:
            raise ValueError(
                f"anchor.batch_size is {self.anchor.batch_size}; expected at most the queue_size, {self.prompts.queue_size}"
            )
        period = self.prompts.queue_size // self.schedule.batch_size
        if period < 1 or self.schedule.checkpoint_every % period:
            raise ValueError(
                f"checkpoint_every is {self.schedule.checkpoint_every}; expected a multiple of the {period} steps "
                "(queue_size / batch_size) that a pairing lasts, so that a resumed run equals an undisturbed one"
            )


@dataclass
class Queue:
    """Training items: noise (n, C, h, w), description (n, D), radius (n,), and indices (n,) of the source and the close picture."""

    noise: torch.Tensor
    description: torch.Tensor
    radius: torch.Tensor
    source: torch.Tensor
    close: torch.Tensor

    def batch(self, start: int, size: int) -> Queue:
        return Queue(*(x[start : start + size] for x in vars(self).values()))


def fill_queue(
    sampler: PromptSampler,
    latents: torch.Tensor,
    config: CoalescerConfig,
    generator: torch.Generator,
    size: int,
    endpoint: Any = None,
) -> Queue:
    """Draw groups, pair each, and shuffle: ``size`` items. ``endpoint(noise, description)`` serves output_transport; None is warm-up."""
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    groups = sampler.groups(rng)
    counts = torch.tensor([len(g.pictures) for g in groups], dtype=torch.int64)
    description = sampler.vectors([g.phrases for g in groups]).repeat_interleave(counts, 0)
    picture = torch.tensor([i for g in groups for i in g.pictures], dtype=torch.int64)
    n = len(picture)
    noise = torch.randn(n, *latents.shape[1:], dtype=torch.float32, generator=generator)
    prior, mixed = (torch.rand(n, dtype=torch.float32, generator=generator) for _ in range(2))
    radius = torch.where(prior < config.prior_share, torch.ones_like(mixed), mixed)

    source = close = torch.arange(n, dtype=torch.int64)
    if config.pairing != "paired":
        several = counts.repeat_interleave(counts) > 1
        landing = noise
        if config.pairing == "output_transport" and endpoint is not None:
            landing = noise.clone()
            landing[several] = endpoint(noise[several], description[several])
        source, close = source.clone(), close.clone()
        for start, count in zip((counts.cumsum(0) - counts).tolist(), counts.tolist()):
            if count > 1:
                part = slice(start, start + count)
                args = (noise[part], latents[picture[part]], radius[part])
                if config.pairing == "output_transport":
                    pairs = pairing.output_transport(*args, landing[part])
                elif config.pairing == "nearest_of_k":
                    pairs = pairing.nearest_of_k(*args, config.nearest_of, generator)
                else:
                    pairs = getattr(pairing, config.pairing)(*args)
                source[part], close[part] = pairs[0] + start, pairs[1] + start
    order = torch.randperm(n, generator=generator)[:size]
    order = order.repeat(-(-size // len(order)))[:size]
    return Queue(noise[order], description[order], radius[order], picture[source[order]], picture[close[order]])


def description_encoder(data: PictureDataset) -> DescriptionEncoder:
    """The embedded token table, told the styles of ``data`` and which of them exist for its names."""
    embedded = DescriptionEncoder.from_pretrained(WEIGHTS / "emoji-64" / "description_encoder")
    concepts = sorted(set(data.concept.tolist()))
    row = {concept: i for i, concept in enumerate(concepts)}
    exists = torch.zeros(len(concepts), len(data.styles), dtype=torch.uint8)
    for concept, style in zip(data.concept.tolist(), data.style.tolist()):
        if style >= 0:
            exists[row[concept], style] = 1
    names = [data.concepts[c].name.replace("\n", " ") for c in concepts] if data.styles else []
    return DescriptionEncoder.from_table(
        embedded.table.numpy(),
        embedded.scale.numpy(),
        embedded.vocab.numpy(),
        data.styles,
        names,
        exists.numpy() if names else None,
    )


def train_anchor(
    config: CoalescerConfig,
    sampler: PromptSampler,
    latents: torch.Tensor,
    model: AnchorMLP,
    output_dir: Path,
    accelerator: Accelerator,
    **options: Any,
) -> nn.Module:
    """Fit ``model``, the mean latent of a description, by the mean squared error; ``options``: of the `Trainer`."""
    schedule = config.anchor
    assert schedule is not None
    trainer = Trainer("anchor", model, schedule, output_dir, accelerator, config.seed, **options)
    independent = CoalescerConfig(schedule=config.schedule, autoencoder="", pairing="paired", prompts=config.prompts)
    period = config.prompts.queue_size // schedule.batch_size
    queue: Queue

    def loss(network: nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        nonlocal queue
        if step % period == 0 or step == trainer.first_step:
            queue = fill_queue(
                sampler, latents, independent, trainer.generator(1, step // period), config.prompts.queue_size
            )
        item = queue.batch(step % period * schedule.batch_size, schedule.batch_size)
        target = latents[item.close].to(accelerator.device)
        return mean_square(network(item.description.to(accelerator.device)).float() - target).mean(), {}

    return trainer.run(loss)


def train_coalescer(
    config: CoalescerConfig,
    data: PictureDataset,
    output_dir: Path,
    *,
    allow_changes: bool = False,
    progress: bool = True,
) -> CoalescerUNet:
    """Train (or go on training) a coalescer in ``output_dir`` and save its pipeline there; returns the averaged network.

    allow_changes: go on even if configuration, pictures or autoencoder are others than before; progress: show bars.
    """
    for name, part in (("autoencoder", "config.json"), ("anchor_from", "anchor.pt")):
        folder = getattr(config, name)
        if isinstance(folder, str) and folder and not (Path(folder) / part).is_file():
            raise ValueError(
                f"{name} is {folder!r}, where there is no {part}: train that first, or give another folder"
            )
    options: dict[str, Any] = {"allow_changes": allow_changes, "progress": progress}
    if isinstance(config.autoencoder, str):
        vae = CoalescerAutoencoder.from_pretrained(config.autoencoder)
        origin: Any = network_sha256(vae, vae.config)
    else:
        vae, origin = train_autoencoder(config.autoencoder, data, output_dir, **options), asdict(config.autoencoder)
    vae.eval()
    accelerator = make_accelerator()
    training = data.train().without(**config.without)
    if not len(training):
        raise ValueError("no picture is left to train on: leave fewer out (without), or give another data set")
    latents = encode(vae.to(accelerator.device), training)
    encoder = description_encoder(training)
    sampler = PromptSampler(training, encoder, config.prompts)
    network_class = FlowMatchingUNet if config.objective == "flow_matching" else CoalescerUNet
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = network_class(**{**CONFIGURATIONS[config.model], **config.overrides})

    data_settings = {"data": training.fingerprint(), "autoencoder": origin, "prompts": asdict(config.prompts)}
    if model.anchor_mlp is not None:
        if config.anchor_from:
            source = Path(config.anchor_from) / "anchor.pt"
            try:
                model.anchor_mlp.load_state_dict(checkpoint.read(source).ema)
            except RuntimeError as error:
                raise ValueError(f"{source} is of another anchor than this model's: give another folder") from error
        elif config.anchor is not None:
            averaged = train_anchor(
                config, sampler, latents, model.anchor_mlp, output_dir, accelerator, settings=data_settings, **options
            )
            model.anchor_mlp.load_state_dict(averaged.state_dict())
        model.anchor_mlp.requires_grad_(False)

    schedule, period = config.schedule, config.prompts.queue_size // config.schedule.batch_size
    names = (
        "model",
        "overrides",
        "objective",
        "pairing",
        "direction_loss",
        "nearest_of",
        "pairing_warmup",
        "prior_share",
    )
    settings = {**{name: getattr(config, name) for name in names}, **data_settings}
    trainer = Trainer(
        config.objective, model, schedule, output_dir, accelerator, config.seed, settings=settings, **options
    )
    queue: Queue

    @torch.no_grad()
    def endpoint(noise: torch.Tensor, description: torch.Tensor) -> torch.Tensor:
        parts = []
        for z, d in zip(noise.split(256), description.split(256)):
            with accelerator.autocast():
                direction, distance = trainer.ema.model(
                    z.to(accelerator.device), d.to(accelerator.device), return_dict=False
                )
            parts.append((z.to(accelerator.device) + distance.view(-1, 1, 1, 1) * direction).float().cpu())
        return torch.cat(parts)

    def loss(network: nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        nonlocal queue
        if step % period == 0 or step == trainer.first_step:
            warm = config.objective == "flow_matching" or step < config.pairing_warmup
            queue = fill_queue(
                sampler,
                latents,
                config,
                trainer.generator(2, step // period),
                config.prompts.queue_size,
                None if warm else endpoint,
            )
        item = queue.batch(step % period * schedule.batch_size, schedule.batch_size)
        device = accelerator.device
        close, noise, description = latents[item.close].to(device), item.noise.to(device), item.description.to(device)
        if config.objective == "flow_matching":
            time = torch.rand(len(noise), dtype=torch.float32, generator=trainer.generator(3, step)).to(device)
            velocity = network(pairing.mix(noise, close, 1 - time), description, time)
            return flow_matching_loss(velocity.float(), noise, close), {}
        sample = pairing.mix(noise, latents[item.source].to(device), item.radius.to(device))
        direction, distance = network(sample, description, return_dict=False)
        return coalescer_loss(direction.float(), distance.float(), sample, close, config.direction_loss)

    def pipeline(network: CoalescerUNet) -> CoalescerPipeline:
        return CoalescerPipeline(network, CoalescerScheduler(**config.scheduler), encoder, vae)

    def on_sample(network: nn.Module, step: int) -> None:
        if config.sheet and isinstance(network, CoalescerUNet) and config.objective == "coalescer":
            pipe: Any = pipeline(network)
            pipe.set_progress_bar_config(disable=True)
            pictures = pipe(list(config.sheet), generator=torch.Generator().manual_seed(config.seed)).images
            files.write_picture(output_dir / f"coalescer-{step:06d}.png", sheet(pictures, config.sheet, columns=10))

    averaged = trainer.run(loss, on_sample)
    assert isinstance(averaged, CoalescerUNet)
    if accelerator.is_main_process:
        coalescer = config.objective == "coalescer"
        with files.writing_folder(output_dir / ("pipeline" if coalescer else "unet")) as folder:
            (pipeline(averaged) if coalescer else averaged).save_pretrained(folder)
    accelerator.wait_for_everyone()
    return averaged
