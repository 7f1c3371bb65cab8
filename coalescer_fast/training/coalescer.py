"""Training of a coalescer: the anchor's MLP first, then, with it frozen, the dual-head UNet.

A step draws R at mixed radii, R = a z + (1 - a) x with a = 1 (the prior) for half of the batch and a ~ U(0, 1) for the
rest, so that the second sampling step is on-distribution. The close picture comes from a pairing (`training.pairing`),
renewed every ``queue_size / batch_size`` steps with the averaged network; or a teacher draws it (`training.teacher`).
This is a reconstruction: the lists of steps in the text that the method comes from are lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
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
from .items import PAIRINGS, ItemStream, Pairing
from .loop import Schedule, Trainer, make_accelerator
from .losses import DIRECTION_LOSSES, coalescer_loss, mean_square
from .pictures import sheet
from .prompts import PromptConfig, PromptSampler
from .rivals import RIVALS, Batch, TimeConditionedUNet
from .teacher import (
    Pairs,
    TeacherConfig,
    TeacherItems,
    described,
    draw_pairs,
    load_pipeline,
    load_teacher,
    make_teacher,
)

# texts -> vectors (N, D) and, for cross-attention, token rows (N, L, D') and their mask (N, L), if they need one
Describe = Callable[[Sequence[str]], list[torch.Tensor]]
OBJECTIVES = ("coalescer", *RIVALS)
DECISIVE = (  # fields of the configuration that decide what is learnt, besides schedule and seed
    *("model", "overrides", "objective", "pairing", "direction_loss", "nearest_of", "pairing_warmup", "prior_share"),
)


@dataclass(frozen=True)
class CoalescerConfig:
    """How a coalescer is trained.

    Attributes:
        schedule: of the UNet.
        autoencoder: folder of a saved autoencoder, or how one is trained first; None with a teacher that has its own.
        anchor: schedule of the anchor's MLP.
        anchor_from: folder of a training whose anchor is used.
        model: a named configuration.
        overrides: arguments of `CoalescerUNet` that differ from it.
        init: folder or Hub id of a diffusers pipeline, of whose UNet the network is made instead of ``model``; see
            `CoalescerUNet.from_diffusers`.
        init_timestep: the timestep that is folded; the last if None.
        objective: one of `OBJECTIVES`.
        pairing: one of `PAIRINGS`; without effect where there is a teacher.
        teacher: draws the close pictures.
        direction_loss: one of `DIRECTION_LOSSES`.
        nearest_of: pictures that the pairing nearest_of_k searches.
        pairing_warmup: steps for which output_transport pairs in noise space.
        prior_share: share of R that is drawn from the prior.
        without: pictures left out, arguments of `PictureDataset.without`.
        prompts: what pictures are described by.
        scheduler: arguments of `CoalescerScheduler`, stored with the model.
        sheet: prompts of the sample sheets.
        seed: of the weights and of all random draws.
    """

    schedule: Schedule
    autoencoder: str | AutoencoderConfig | None = None
    anchor: Schedule | None = None
    anchor_from: str = ""
    model: str = "emoji-64"
    overrides: dict[str, Any] = field(default_factory=dict)
    init: str = ""
    init_timestep: int | None = None
    objective: str = "coalescer"
    pairing: str = "output_transport"
    teacher: TeacherConfig | None = None
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
            limit = self.prompts.queue_size
            raise ValueError(f"anchor.batch_size is {self.anchor.batch_size}; expected at most the queue_size, {limit}")
        if self.init and (self.overrides or self.objective != "coalescer"):
            raise ValueError("init is given: leave out overrides, for the network is of that UNet, and objective")
        if self.teacher is not None and self.objective != "coalescer":
            raise ValueError(f"objective is {self.objective!r}; a teacher is for the coalescer")
        period = self.prompts.queue_size // self.schedule.batch_size
        if period < 1 or self.schedule.checkpoint_every % period:
            raise ValueError(
                f"checkpoint_every is {self.schedule.checkpoint_every}; expected a multiple of the {period} steps "
                "(queue_size / batch_size) that a pairing lasts, so that a resumed run equals an undisturbed one"
            )


def description_encoder(data: PictureDataset) -> DescriptionEncoder:
    """The embedded model's token table, with the styles of the data set and which of them exist for each name."""
    embedded = DescriptionEncoder.from_pretrained(WEIGHTS / "emoji-64" / "description_encoder")
    concepts = sorted(set(data.concept.tolist()))
    row = {concept: i for i, concept in enumerate(concepts)}
    exists = torch.zeros(len(concepts), len(data.styles), dtype=torch.uint8)
    for concept, style in zip(data.concept.tolist(), data.style.tolist()):
        if style >= 0:
            exists[row[concept], style] = 1
    names = [data.concepts[c].name.replace("\n", " ") for c in concepts]
    return DescriptionEncoder.from_table(
        embedded.table.numpy(),
        embedded.scale.numpy(),
        embedded.vocab.numpy(),
        data.styles,
        names,
        exists.numpy(),
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
    """Train the anchor's MLP to give the mean latent of a description, by the mean squared error.

    Args:
        config: with a schedule of the anchor.
        sampler: draws descriptions.
        latents: of all pictures, (N, C, h, w).
        model: the MLP.
        output_dir: folder of the checkpoint.
        accelerator: device, precision and processes.
        options: further arguments of `Trainer`.

    Returns:
        The averaged MLP.
    """
    assert config.anchor is not None
    trainer = Trainer("anchor", model, config.anchor, output_dir, accelerator, config.seed, **options)
    items = ItemStream(trainer, sampler, latents, Pairing("paired"), key=1)

    def loss(network: nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch = items.at(step)
        target = latents[batch.close].to(accelerator.device)
        return mean_square(network(batch.description.to(accelerator.device)).float() - target).mean(), {}

    return trainer.run(loss)


def train_coalescer(
    config: CoalescerConfig,
    data: PictureDataset,
    output_dir: Path,
    *,
    allow_changes: bool = False,
    progress: bool = True,
    teacher: DiffusionPipeline | TimeConditionedUNet | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> CoalescerUNet:
    """Train a coalescer, or resume its training, and save its pipeline.

    Args:
        config: how it is trained.
        data: pictures; those that are held out are not trained on.
        output_dir: folder of checkpoints, of sample sheets and of the saved pipeline.
        allow_changes: resume even if the configuration, the pictures or the autoencoder have changed.
        progress: show bars.
        teacher: draws the close pictures, instead of loading ``config.teacher.pipeline``.
        on_step: as of `Trainer.run`.

    Returns:
        The averaged network. Its pipeline is saved in ``output_dir/pipeline``; where a teacher has brought its own text
        encoder and autoencoder, the network alone in ``output_dir/unet``.

    Raises:
        ValueError: if a part is missing, no picture is left, or a checkpoint cannot be resumed.
    """
    _check_folders(config)
    options: dict[str, Any] = {"allow_changes": allow_changes, "progress": progress}
    if teacher is not None:
        config = replace(config, teacher=config.teacher or TeacherConfig())
    elif config.teacher is not None:
        teacher = load_teacher(config.teacher)
    vae, origin = _autoencoder(config, data, output_dir, **options)
    accelerator = make_accelerator()
    training = data.train().without(**config.without)
    if not len(training):
        raise ValueError("no picture is left to train on: leave fewer out (without), or give another data set")
    latents = torch.empty(0, dtype=torch.float32) if vae is None else encode(vae.to(accelerator.device), training)
    encoder = description_encoder(training)
    sampler = PromptSampler(training, encoder, config.prompts)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = _network(config)

    data_settings = {"data": training.fingerprint(), "autoencoder": origin, "prompts": asdict(config.prompts)}
    if model.anchor_mlp is not None:
        if config.anchor_from:
            _load_anchor(model.anchor_mlp, Path(config.anchor_from) / "anchor.pt")
        elif config.anchor is not None:
            averaged = train_anchor(
                config, sampler, latents, model.anchor_mlp, output_dir, accelerator, settings=data_settings, **options
            )
            model.anchor_mlp.load_state_dict(averaged.state_dict())
        model.anchor_mlp.requires_grad_(False)

    settings = {**{name: getattr(config, name) for name in DECISIVE}, **data_settings}
    if config.init:
        settings["init"] = {"unet": network_sha256(model, model.config)}
    attends, pairs = model.config.cross_attention_dim is not None, None
    read: Describe | None = None
    drawing = None if config.teacher is None else make_teacher(teacher, encoder, config.teacher, accelerator.device)
    if drawing is not None and drawing.reads:
        read = drawing.describe
    _check_widths(model, encoder, read)
    if drawing is not None and config.teacher is not None:
        settings["teacher"] = drawing.settings()
        size = model.config.sample_size
        with accelerator.main_process_first():
            shape = (model.config.latent_channels, size, size)
            folder = Path(config.teacher.folder or output_dir / "teacher")
            pairs = draw_pairs(drawing, sampler, shape, folder, config.seed, progress)
    if read is None and (attends or pairs is not None):
        read = partial(described, encoder, attends)
    trainer = Trainer(
        config.objective, model, config.schedule, output_dir, accelerator, config.seed, settings=settings, **options
    )
    coalescer = config.objective == "coalescer"
    draws_alone = coalescer and vae is not None and not hasattr(teacher, "encode_prompt")

    def pipeline(network: CoalescerUNet) -> CoalescerPipeline:
        assert vae is not None
        return CoalescerPipeline(network, CoalescerScheduler(**config.scheduler), encoder, vae)

    def on_sample(network: nn.Module, step: int) -> None:
        if config.sheet and isinstance(network, CoalescerUNet) and draws_alone:
            pipe = pipeline(network)
            pipe.set_progress_bar_config(disable=True)
            out: Any = pipe(list(config.sheet), generator=torch.Generator().manual_seed(config.seed))
            files.write_picture(output_dir / f"coalescer-{step:06d}.png", sheet(out.images, config.sheet, columns=10))

    if coalescer:
        loss = _coalescer_loss(config, trainer, sampler, latents, read, pairs)
    else:
        loss = _rival_loss(config, trainer, sampler, latents)
    averaged = trainer.run(loss, on_sample, on_step)
    assert isinstance(averaged, CoalescerUNet)
    if accelerator.is_main_process:
        with files.writing_folder(output_dir / ("pipeline" if draws_alone else "unet")) as saved:
            (pipeline(averaged) if draws_alone else averaged).save_pretrained(saved)
    accelerator.wait_for_everyone()
    return averaged


def _check_folders(config: CoalescerConfig) -> None:
    """Raise ValueError for a folder that lacks what is taken from it."""
    for name, part in (("autoencoder", "config.json"), ("anchor_from", "anchor.pt")):
        folder = getattr(config, name)
        if isinstance(folder, str) and folder and not (Path(folder) / part).is_file():
            raise ValueError(
                f"{name} is {folder!r}, where there is no {part}: train that first, or give another folder"
            )


def _check_widths(model: CoalescerUNet, encoder: DescriptionEncoder, read: Describe | None) -> None:
    """Raise ValueError if descriptions are not of the width that the network takes."""
    width = encoder.config.dim if read is None else read([""])[0].shape[1]
    for name in ("description_dim", "cross_attention_dim"):
        if model.config[name] not in (width, None):
            sizes = f"the network has {name} {model.config[name]}, and descriptions have {width}"
            raise ValueError(f"{sizes}: give a teacher with the text encoder that the network was trained with")


def _network(config: CoalescerConfig) -> CoalescerUNet:
    """The network that is trained."""
    if config.init:
        source = load_pipeline(config.init)
        if getattr(source, "unet", None) is None:
            raise ValueError(f"init is {config.init}, a {type(source).__name__}, which has no unet: give another")
        return CoalescerUNet.from_diffusers(source.unet.float(), source.scheduler, config.init_timestep)
    arguments = {**CONFIGURATIONS[config.model], **config.overrides}
    if config.objective == "coalescer":
        network: CoalescerUNet = CoalescerUNet(**arguments)
        return network
    rival = TimeConditionedUNet(**arguments)
    rival.full_precision = RIVALS[config.objective].full_precision
    return rival


def _autoencoder(
    config: CoalescerConfig, data: PictureDataset, output_dir: Path, **options: Any
) -> tuple[CoalescerAutoencoder | None, Any]:
    """The autoencoder, loaded or trained, and what tells it from others in the settings of a training."""
    if config.autoencoder is None:
        if config.teacher is None or config.anchor is not None:
            raise ValueError("autoencoder is missing: give a folder, or how one is trained")
        return None, "the teacher's"
    if isinstance(config.autoencoder, str):
        vae = CoalescerAutoencoder.from_pretrained(config.autoencoder)
        return vae.eval(), network_sha256(vae, vae.config)
    vae = train_autoencoder(config.autoencoder, data, output_dir, **options)
    return vae.eval(), asdict(config.autoencoder)


def _load_anchor(model: AnchorMLP, source: Path) -> None:
    try:
        model.load_state_dict(checkpoint.read(source).ema)
    except RuntimeError as error:
        raise ValueError(f"{source} is of another anchor than this model's: give another folder") from error


def _coalescer_loss(
    config: CoalescerConfig,
    trainer: Trainer,
    sampler: PromptSampler,
    latents: torch.Tensor,
    read: Describe | None,
    pairs: Pairs | None,
) -> Callable[[nn.Module, int], tuple[torch.Tensor, dict[str, float]]]:
    """The loss of a step, at R of mixed radii.

    The close picture is a teacher's if there are ``pairs``. ``read`` reads the texts of a batch; None takes their
    vectors alone, as they were drawn.
    """
    device, autocast = trainer.accelerator.device, trainer.accelerator.autocast

    def conditions(description: torch.Tensor, texts: Sequence[str]) -> list[torch.Tensor]:
        return [x.to(device) for x in ([description] if read is None else read(texts))]

    @torch.no_grad()
    def endpoint(noise: torch.Tensor, description: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        parts = []
        for start, z in zip(range(0, len(noise), 256), noise.split(256)):
            part = slice(start, start + 256)
            z = z.to(device)
            with autocast():
                given = conditions(description[part], texts[part])
                direction, distance = trainer.ema.model(z, *given, return_dict=False)
            parts.append((z + distance.view(-1, 1, 1, 1) * direction).float().cpu())
        return torch.cat(parts)

    items: ItemStream | TeacherItems
    if pairs is not None:
        items, latents = TeacherItems(trainer, pairs, config.prior_share, key=5), pairs.latents
    else:
        how = Pairing(config.pairing, config.prior_share, config.nearest_of)
        items = ItemStream(trainer, sampler, latents, how, key=2, endpoint=endpoint, warmup=config.pairing_warmup)

    def loss(network: nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch = items.at(step)
        close, noise = latents[batch.close].to(device), batch.noise.to(device)
        sample = pairing.mix(noise, latents[batch.source].to(device), batch.radius.to(device))
        direction, distance = network(sample, *conditions(batch.description, batch.texts), return_dict=False)
        return coalescer_loss(direction.float(), distance.float(), sample, close, config.direction_loss)

    return loss


def _rival_loss(
    config: CoalescerConfig, trainer: Trainer, sampler: PromptSampler, latents: torch.Tensor
) -> Callable[[nn.Module, int], tuple[torch.Tensor, dict[str, float]]]:
    """The loss of a step of a rival; see `training.rivals`."""
    device, autocast = trainer.accelerator.device, trainer.accelerator.autocast
    how = Pairing(config.pairing, config.prior_share, config.nearest_of)
    items = ItemStream(trainer, sampler, latents, how, key=2)

    def averaged(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        with autocast():
            answer: tuple[torch.Tensor, torch.Tensor | None] = trainer.ema.model(*inputs)
        return answer

    def loss(network: nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        drawn = items.at(step)
        noise, picture, description = (x.to(device) for x in (drawn.noise, latents[drawn.close], drawn.description))
        progress = step / trainer.schedule.steps
        batch = Batch(noise, picture, description, trainer.generator(3, step), progress, averaged)
        return RIVALS[config.objective].loss(network, batch), {}

    return loss
