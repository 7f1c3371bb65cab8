"""Close pictures from a teacher: where a diffusion model's deterministic sampler leads noise, for a description.

The teacher is a diffusers pipeline with a `unet` and a `scheduler` that has ``alphas_cumprod``. One with a text encoder
(`encode_prompt`, as StableDiffusionPipeline) reads descriptions by itself; a UNet without one attends to the token rows
of the coalescer's own description encoder, or to nothing. Or it is the network of a training with the objective
flow_matching (`training.rivals`), by Euler steps.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from .. import files
from ..dtypes import DTYPES
from ..models import DescriptionEncoder
from ..pipeline import DTYPE
from ..runtime.engines.hashes import network_sha256
from .checkpoint import difference, flat
from .items import Items
from .loop import Trainer, generator
from .prompts import PromptSampler
from .rivals import TimeConditionedUNet, euler

FLOATS = ("float32", "bfloat16", "float16")
CHUNK = 256  # pictures in a file
STREAM = 4  # of the random draws, beside those of `training.coalescer`


@dataclass(frozen=True)
class TeacherConfig:
    """How a teacher draws.

    Attributes:
        pipeline: folder or Hub id of a diffusers pipeline, or folder of a training of flow matching.
        steps: evaluations of its UNet a picture, by DDIM or Euler; twice as many with guidance.
        guidance_scale: as in diffusers, 1 for none.
        pictures: how many are drawn, once.
        folder: where they are kept; in the folder of the training if empty.
        dtype: of its networks, "float32", "bfloat16" or "float16".
        batch_size: pictures that are drawn at a time.
    """

    pipeline: str = ""
    steps: int = 20
    guidance_scale: float = 1.0
    pictures: int = 4096
    folder: str = ""
    dtype: str = "float32"
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise ValueError(f"teacher.dtype is {self.dtype!r}; use one of {', '.join(FLOATS)}")
        for name in ("steps", "pictures", "batch_size"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"teacher.{name} is {getattr(self, name)}; expected a whole number from 1 to 2^31 - 1")


def load_pipeline(name: str, dtype: str = "float32") -> DiffusionPipeline:
    """Load a diffusers pipeline, safetensors only. Raises ValueError for what is none."""
    try:
        return DiffusionPipeline.from_pretrained(name, use_safetensors=True, **{DTYPE: DTYPES[dtype]})
    except Exception as error:  # of every kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} cannot be loaded as a diffusers pipeline ({reason:.300})") from error


def load_teacher(config: TeacherConfig) -> DiffusionPipeline | TimeConditionedUNet:
    """What `make_teacher` makes a teacher of. Raises ValueError if it cannot be loaded."""
    folder = Path(config.pipeline)
    if not (folder / "flow_matching.pt").is_file():
        return load_pipeline(config.pipeline, config.dtype)
    if not (folder / "unet").is_dir():
        raise ValueError(f"{folder} holds a training of flow matching that has not finished: finish it first")
    return TimeConditionedUNet.from_pretrained(folder / "unet").to(DTYPES[config.dtype])


class Teacher:
    """Draws latents by DDIM, which is deterministic: the picture is a function of noise and description.

    Args:
        pipe: the pipeline; its UNet and text encoder are moved to the device.
        encoder: reads descriptions where the pipeline has no text encoder.
        config: steps and guidance; the default if None.
        device: where it runs.

    Raises:
        ValueError: for a pipeline that it cannot draw with.
    """

    def __init__(
        self,
        pipe: Any,
        encoder: DescriptionEncoder | None = None,
        config: TeacherConfig | None = None,
        device: torch.device | str = "cpu",
    ):
        kind = type(pipe).__name__
        scheduler: Any = getattr(pipe, "scheduler", None)
        if getattr(pipe, "unet", None) is None or not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(f"teacher is a {kind}; expected a diffusers pipeline with a unet and a scheduler of DDPM")
        self.unet, self.encoder, self.device = pipe.unet, encoder, torch.device(device)
        self.config = config or TeacherConfig()
        self.attends = pipe.unet.config.get("cross_attention_dim")
        self.reads = hasattr(pipe, "encode_prompt")
        if pipe.unet.config.get("addition_embed_type"):
            raise ValueError(
                f"teacher is a {kind}, whose UNet takes added conditions; give one that takes prompts only"
            )
        width = None if encoder is None else encoder.config.dim
        if self.attends and not self.reads and self.attends != width:
            rows = f"token rows of width {self.attends}, and the description encoder has {width}"
            raise ValueError(f"teacher is a {kind} without a text encoder; its UNet attends to {rows}")
        self.pipe = pipe
        for name, part in pipe.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(self.device)
        self.unet.to(self.device).eval().requires_grad_(False)
        # the first step is at the last timestep, where noise is all that there is
        self.scheduler: Any = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")

    def settings(self) -> dict[str, Any]:
        """What its pictures depend on, beside noise and descriptions."""
        scheduler = {name: value for name, value in self.scheduler.config.items() if not name.startswith("_")}
        how = {name: getattr(self.config, name) for name in ("steps", "guidance_scale")}
        return {"unet": network_sha256(self.unet, self.unet.config), "scheduler": scheduler, **how}

    @torch.no_grad()
    def describe(self, texts: Sequence[str]) -> list[Tensor]:
        """Compute what a coalescer takes of N descriptions.

        Returns:
            Vectors (N, D) of RMS 1, or 0 for the empty description; for cross-attention token rows (N, L, D') and, of a
            description encoder, their mask (N, L). A text encoder's vector is the mean of its rows.
        """
        if not self.reads:
            assert self.encoder is not None
            return described(self.encoder, bool(self.attends), texts)
        rows = self.pipe.encode_prompt(list(texts), self.device, 1, False)[0].float()
        vectors = rows.mean(1)
        vectors = vectors / vectors.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)
        says_something = torch.tensor([bool(text.strip()) for text in texts], dtype=torch.bool, device=vectors.device)
        return [vectors * says_something[:, None], rows]

    @torch.no_grad()
    def draw(self, noise: Tensor, texts: Sequence[str]) -> Tensor:
        """Draw a latent for each noise (N, C, h, w) and text; float32, on the CPU."""
        scale, n = self.config.guidance_scale, len(texts)
        guided = scale != 1
        given: dict[str, Tensor] = {}
        if self.attends:
            _, *rows = self.describe([*texts, *[""] * (n * guided)])
            names = ("encoder_hidden_states", "encoder_attention_mask")
            given = {name: x.to(self.device) for name, x in zip(names, rows)}
            given["encoder_hidden_states"] = given["encoder_hidden_states"].to(self.unet.dtype)
        self.scheduler.set_timesteps(self.config.steps)
        x = noise.to(self.device)
        for t in self.scheduler.timesteps:
            both = torch.cat([x, x]) if guided and self.attends else x
            predicted = self.unet(both.to(self.unet.dtype), t, **given, return_dict=False)[0].float()
            if len(both) > n:
                wanted, empty = predicted.chunk(2)
                predicted = empty + scale * (wanted - empty)
            x = self.scheduler.step(predicted, t, x, return_dict=False)[0]
        return x.float().cpu()


class FlowMatchingTeacher(Teacher):
    """Draws latents by Euler steps of a network that was trained by flow matching, from the same noise.

    Args:
        unet: the network.
        encoder: reads descriptions.
        config: steps and guidance.
        device: where it runs.
    """

    def __init__(
        self,
        unet: TimeConditionedUNet,
        encoder: DescriptionEncoder,
        config: TeacherConfig,
        device: torch.device | str = "cpu",
    ):
        self.unet, self.encoder, self.config, self.device = unet, encoder, config, torch.device(device)
        self.attends, self.reads = None, False
        self.unet.to(self.device).eval().requires_grad_(False)

    def settings(self) -> dict[str, Any]:
        how = {name: getattr(self.config, name) for name in ("steps", "guidance_scale")}
        return {"unet": network_sha256(self.unet, self.unet.config), **how}

    @torch.no_grad()
    def draw(self, noise: Tensor, texts: Sequence[str]) -> Tensor:
        assert self.encoder is not None
        description, config = self.encoder(texts).to(self.device), self.config
        return euler(self.unet, noise.to(self.device), description, config.steps, config.guidance_scale).float().cpu()


def make_teacher(
    source: Any, encoder: DescriptionEncoder, config: TeacherConfig, device: torch.device | str = "cpu"
) -> Teacher:
    """Make a teacher of a diffusers pipeline or of a network that was trained by flow matching."""
    kind = FlowMatchingTeacher if isinstance(source, TimeConditionedUNet) else Teacher
    return kind(source, encoder, config, device)


def described(encoder: DescriptionEncoder, attends: bool, texts: Sequence[str]) -> list[Tensor]:
    """Vectors (N, D) of N texts by a description encoder and, for cross-attention, token rows and their mask."""
    if not attends:
        return [encoder(texts)]
    rows, mask = encoder.token_rows(texts)
    length = int(mask.any(0).sum())
    return [encoder(texts), rows[:, :length], mask[:, :length]]


@dataclass(frozen=True)
class Pairs:
    """Noise, descriptions and where the teacher leads.

    Attributes:
        noise: (N, C, h, w).
        texts: N descriptions.
        latents: (N, C, h, w).
    """

    noise: Tensor
    texts: list[str]
    latents: Tensor


def draw_pairs(
    teacher: Teacher,
    sampler: PromptSampler,
    shape: tuple[int, int, int],
    folder: Path,
    seed: int,
    progress: bool = True,
) -> Pairs:
    """Draw the teacher's pictures of descriptions of a data set, or read those that have been drawn.

    Args:
        teacher: draws.
        sampler: draws the descriptions, in the shares of its configuration.
        shape: (C, h, w) of a latent.
        folder: where they are kept, a file for every 256; what is there is not drawn again.
        seed: of noise and descriptions.
        progress: show a bar.

    Raises:
        ValueError: for a file that is damaged, or of other settings.
    """
    config = teacher.config
    size = min(CHUNK, config.pictures)
    settings = flat(
        {
            "teacher": teacher.settings(),
            "prompts": asdict(sampler.config),
            "data": sampler.data.fingerprint(),
            "shape": shape,
            "pictures of a file": size,
            "seed": seed,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Pairs] = []
    count = -(-config.pictures // size)
    with tqdm(total=count * size, desc="teacher", disable=not progress, mininterval=2.0, delay=1.0) as bar:
        for i in range(count):
            path = folder / f"{i:05d}.safetensors"
            if not path.exists():
                _write(path, _draw(teacher, sampler, shape, size, generator(seed, STREAM, i), bar), settings)
            else:
                bar.update(size)
            found.append(_read(path, shape, settings))
    noise, latents = (torch.cat([getattr(p, name) for p in found])[: config.pictures] for name in ("noise", "latents"))
    return Pairs(noise, [text for p in found for text in p.texts][: config.pictures], latents)


def _draw(
    teacher: Teacher, sampler: PromptSampler, shape: tuple[int, ...], size: int, draws: torch.Generator, bar: tqdm[Any]
) -> Pairs:
    rng = random.Random(int(torch.randint(2**62, (), generator=draws)))
    said = [text for group in sampler.groups(rng) for text in [", ".join(group.phrases)] * len(group.pictures)]
    texts = rng.choices(said, k=size)
    noise = torch.randn(size, *shape, dtype=torch.float32, generator=draws)
    latents = []
    for start in range(0, size, teacher.config.batch_size):
        part = slice(start, start + teacher.config.batch_size)
        latents.append(teacher.draw(noise[part], texts[part]))
        bar.update(len(latents[-1]))
    return Pairs(noise, texts, torch.cat(latents))


def _write(path: Path, pairs: Pairs, settings: dict[str, str]) -> None:
    if not pairs.latents.isfinite().all():
        raise ValueError("the teacher's pictures are not finite: load it in float32, or lower its guidance_scale")
    about = {"texts": json.dumps(pairs.texts), "settings": json.dumps(settings)}
    files.write_bytes(path, save({"noise": pairs.noise, "latents": pairs.latents}, about))


def _read(path: Path, shape: tuple[int, ...], settings: dict[str, str]) -> Pairs:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            then, texts = json.loads(about["settings"]), json.loads(about["texts"])
            noise, latents = file.get_tensor("noise"), file.get_tensor("latents")
        fits = noise.shape == latents.shape == (len(texts), *shape) and noise.dtype == latents.dtype == torch.float32
        if not fits or not isinstance(then, dict) or not all(isinstance(text, str) for text in texts):
            raise ValueError("its tensors are of other shapes")
        if not (noise.isfinite().all() and latents.isfinite().all()):
            raise ValueError("it holds numbers that are not finite")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split()):.200}): remove it, to draw anew") from error
    if what := difference(then, settings):
        raise ValueError(f"{path} was drawn with {what}: train into another folder, or remove the folder {path.parent}")
    return Pairs(noise, texts, latents)


class TeacherItems:
    """The items of each step of a training with a teacher: R on the way from a pair's noise to its picture.

    Every pair is used once before any is used again.

    Args:
        trainer: whose random draws they are.
        pairs: of the teacher.
        prior_share: share of R that is drawn from the prior.
        key: of the random draws.
    """

    def __init__(self, trainer: Trainer, pairs: Pairs, prior_share: float, key: int):
        self.trainer, self.pairs, self.prior_share, self.key = trainer, pairs, prior_share, key
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64)

    def at(self, step: int) -> Items:
        """The batch of a step; the description vectors are left to whoever reads the texts."""
        n, size = len(self.pairs.texts), self.trainer.schedule.batch_size
        index = torch.tensor([self._index(i, n) for i in range(step * size, (step + 1) * size)], dtype=torch.int64)
        draws = self.trainer.generator(self.key, step)
        prior, mixed = (torch.rand(size, dtype=torch.float32, generator=draws) for _ in range(2))
        radius = torch.where(prior < self.prior_share, torch.ones_like(mixed), mixed)
        texts = [self.pairs.texts[i] for i in index.tolist()]
        return Items(self.pairs.noise[index], torch.empty(size, 0, dtype=torch.float32), radius, index, index, texts)

    def _index(self, item: int, n: int) -> int:
        epoch = item // n
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = torch.randperm(n, generator=self.trainer.generator(self.key + 1, epoch))
        return int(self.order[item % n])
