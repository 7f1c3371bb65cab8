"""What a model's samples are worth: retrieval, Fréchet distance, variety, memorisation, and what its two heads say.

Every sampler is measured by `measure`, on the same prompts and the same noise, against the same real pictures (`RealPictures`). The
columns:

- ``name_top1``, ``name_top10``: over all training concepts, prompt = name: the real training picture nearest to the sample, or one of
  the ten nearest, shows the concept. Nearest in latents by ||a - b||_2; ``name_top1_pixels``: in pictures of 4x4 means instead.
- ``name_style_top1``: the same for "name, style" of random training pictures; ``name_style_all_top1``: of every one.
  ``keyword_top1``, ``keyword_top10``: for three of a concept's keywords. As the concepts were trained on, a hit says that the model
  knows the picture, not that it composes one.
- ``held_out_group``: over concepts kept out of training, the nearest training picture is of the right group; by chance
  ``held_out_group_chance`` = sum_g p_train(g) p_held_out(g).
- ``fd_name``, ``fd_name_style``: `frechet_distance` between samples for the descriptions of random training pictures and all training
  pictures, in a classifier's features; ``fd_floor_real``: random training pictures against the others, ``fd_floor_autoencoder``:
  reconstructions of the same pictures against all, which no sampler that decodes by this autoencoder should expect to beat.
- ``psnr_autoencoder_held_out``, ``psnr_autoencoder_train``: mean dB of reconstructions, without any exclusions.
- ``styles_hit`` of ``styles_real``: distinct styles among a concept's real pictures that are nearest to 8 samples of its name.
- ``nearest_train_ratio``: mean distance of name samples to the nearest training picture, over the mean distance of training pictures
  to the nearest other one; ``below_q5``: share of the samples below the 5 % quantile of the latter (real pictures: 0.05).
- ``direction_length_spearman``: rank correlation of |direction| at the first step with -|final latent - x|, x the latent of the training
  picture that was described; ``distance_r2`` = 1 - sum (distance - |x - R|)^2 / sum (|x - R| - mean |x - R|)^2 at the first step.
- ``seconds_per_picture``: wall clock of a warm batch of four, decoding included, the median of five.

Columns that a data set has nothing for (styles, held-out concepts, ...) are left out.
"""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..folders import WEIGHTS
from ..models import CoalescerAutoencoder, DescriptionEncoder
from ..pipeline import CoalescerPipeline, TraceStep
from .autoencoder import encode, psnr
from .classifier import PictureClassifier
from .config import CONFIGS, tomllib
from .data import PictureDataset
from .losses import mean_square
from .pictures import to_tensor

logger = logging.getLogger(__name__)

# Latents (N, C, h, w) of N descriptions, from noise of that shape; and the first step from there.
Sampler = Callable[[list[str], torch.Tensor], torch.Tensor]
FirstStep = Callable[[list[str], torch.Tensor], TraceStep]
# Pictures (N, 3, H, W), about in [-1, 1], of latents.
Decode = Callable[[torch.Tensor], torch.Tensor]
Row = dict[str, float | int | str]
T = TypeVar("T")

CHUNK = 250
NUM_DESCRIBED = 1000  # training pictures whose descriptions the Fréchet distances are measured with
NUM_FLOOR = 1500
NUM_PSNR = 500
NUM_VARIETY, VARIETY_SEEDS, MIN_STYLES = 60, 8, 4
NUM_KEYWORDS = 3
HELD_OUT_SEEDS = 5
SEED_STRIDE = (
    435  # of the seeds of different kinds of prompt; any number would do, but the committed results were drawn with it
)


def evaluate(
    pipe: CoalescerPipeline,
    data: PictureDataset,
    steps: Sequence[int] = (1, 2, 4),
    guidance_scale: float | None = None,
    seed: int = 0,
    progress: bool = True,
    *,
    classifier: PictureClassifier | None = None,
    without: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> list[Row]:
    """The module's columns for a pipeline on a data set, one row a step count.

    Args:
        data: the whole data set, its held-out pictures included.
        guidance_scale: as in the pipeline's call; None is the model's own.
        seed: of the noise; the choice of prompts is always the same.
        classifier: whose features serve the Fréchet distances; None is the package's own. Distances compare in the same features only.
        without: pictures left out, arguments of `PictureDataset.without`; None is what the model was trained without, see `exclusions`.
        limit: at most so many prompts of each kind, for a quick look; Fréchet distances of few samples are too large.
    """
    if without is None:
        without = exclusions(pipe.description_encoder, data)
    real = RealPictures(data, pipe.vae, classifier, without, limit, progress, every_pair=limit is None)
    scale = pipe.scheduler.config.guidance_scale if guidance_scale is None else guidance_scale
    most = CHUNK if pipe.runtime.max_batch is None else min(CHUNK, pipe.runtime.max_batch)
    rows: list[Row] = []
    with (
        quiet(pipe),
        tqdm(
            total=len(steps) * real.num_samples, desc="evaluate", disable=not progress, mininterval=1.0, delay=1.0
        ) as bar,
    ):
        for count in steps:
            sample = coalescer_sampler(pipe, count, guidance_scale)
            measured = measure(
                sample,
                real,
                seed,
                first_step_of(pipe),
                bar,
                lambda x: in_parts(pipe.runtime.decode, x.to(pipe.device), most),
                most,
            )
            rows.append({"steps": count, "guidance_scale": float(scale), **measured, **real.floors})
    return rows


def coalescer_sampler(pipe: CoalescerPipeline, steps: int, guidance_scale: float | None = None) -> Sampler:
    """The pipeline as a `Sampler`."""

    def sample(prompts: list[str], noise: torch.Tensor) -> torch.Tensor:
        call: Any = pipe(
            prompts, num_inference_steps=steps, guidance_scale=guidance_scale, latents=noise, output_type="latent"
        )
        return call.images

    return sample


def first_step_of(pipe: CoalescerPipeline) -> FirstStep:
    """What the pipeline's two heads say at R = noise."""

    def first_step(prompts: list[str], noise: torch.Tensor) -> TraceStep:
        call: Any = pipe(
            prompts, num_inference_steps=1, guidance_scale=1.0, latents=noise, output_type="latent", return_trace=True
        )
        return call.trace[0]

    return first_step


@contextmanager
def quiet(pipe: CoalescerPipeline) -> Iterator[None]:
    """No progress bars of the pipeline's own."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def exclusions(encoder: DescriptionEncoder, data: PictureDataset) -> dict[str, Any]:
    """What a model was trained without: the ``[without]`` of the first committed configuration that leaves only names it knows."""
    known = set(encoder.known_names)
    if not known:
        return {}
    tables = [tomllib.loads(path.read_text("utf-8")).get("without", {}) for path in sorted(CONFIGS.glob("*.toml"))]
    for without in ({}, *tables):
        training = data.train().without(**without)
        if {training.concepts[c].name.replace("\n", " ") for c in training.concept.tolist()} <= known:
            return without
    logger.warning("the data set has training concepts that the model does not know by name: measured on all of them")
    return {}


class RealPictures:
    """The real side of an evaluation: latents, features and distances of the training pictures, and the prompts.

    N training pictures; latents: (N, D), flattened from ``shape``; small: (N, P), the pictures' 4x4 means; features: (N, 64);
    leave_one_out: (N,), distance to the nearest other latent; floors: the columns that do not depend on a sampler.
    """

    def __init__(
        self,
        data: PictureDataset,
        vae: CoalescerAutoencoder,
        classifier: PictureClassifier | None = None,
        without: Mapping[str, Any] | None = None,
        limit: int | None = None,
        progress: bool = True,
        every_pair: bool = False,
    ):
        self.vae = vae.eval()
        self.classifier = (classifier or PictureClassifier.from_pretrained(WEIGHTS / "emoji-64" / "classifier")).eval()
        subset = data.without(**(without or {}))
        self.training = training = subset.train()
        if len(training) < 4:
            raise ValueError(f"the data set has {len(training)} training pictures: there is nothing to measure against")
        self.concept = torch.from_numpy(training.concept)
        self.style = torch.from_numpy(training.style)

        chunks = [training.take(np.arange(i, min(i + CHUNK, len(training)))) for i in range(0, len(training), CHUNK)]
        latents, small, features = [], [], []
        for chunk in tqdm(chunks, desc="real pictures", disable=not progress, delay=1.0):
            pictures = to_tensor(chunk.images)
            latents.append(encode(self.vae, chunk))
            small.append(shrink(pictures))
            features.append(self.features_of(pictures))
        stacked = torch.cat(latents)
        self.shape = stacked.shape[1:]
        self.latents, self.small, self.features = stacked.flatten(1), torch.cat(small), torch.cat(features)
        self.leave_one_out = nearest(self.latents, self.latents, 2)[0][:, 1]
        self._draw_prompts(subset, limit, every_pair)
        self.floors = self._floors(data, limit)

    def _draw_prompts(self, data: PictureDataset, limit: int | None, every_pair: bool) -> None:
        """names, keywords, described, pairs, held_out, variety: what is asked for; always the same for the same data and limit."""
        rng = random.Random(0)

        def some(items: list[T], most: int | None = None) -> list[T]:
            most = min(x for x in (most, limit, len(items)) if x is not None)
            return items if most == len(items) else rng.sample(items, most)

        concepts = sorted(set(self.concept.tolist()))
        self.names = some(concepts)
        self.keywords = [
            (c, ", ".join(rng.sample(data.concepts[c].keywords, NUM_KEYWORDS)))
            for c in some([c for c in concepts if len(data.concepts[c].keywords) >= NUM_KEYWORDS])
        ]
        styled = torch.nonzero(self.style >= 0).flatten().tolist()
        self.has_styles = bool(styled)
        self.described = some(styled or list(range(len(self.training))), NUM_DESCRIBED)
        self.pairs = styled if every_pair else []
        new = sorted(set(data.held().concept.tolist()) - set(concepts))
        self.held_out = [c for c in some([c for c in new if data.concepts[c].group]) for _ in range(HELD_OUT_SEEDS)]
        styles_of = {
            c: self.style[(self.concept == c) & (self.style >= 0)].unique() for c in (concepts if styled else [])
        }
        self.variety = some([c for c, styles in styles_of.items() if len(styles) >= MIN_STYLES], NUM_VARIETY)
        lists = (self.names, self.keywords, self.described, self.described * self.has_styles, self.pairs, self.held_out)
        self.num_samples = sum(map(len, lists)) + len(self.variety) * VARIETY_SEEDS

    @torch.no_grad()
    def _floors(self, data: PictureDataset, limit: int | None) -> Row:
        n = len(self.training)
        order = torch.randperm(n, generator=seeded(0))
        chosen, others = order[: min(NUM_FLOOR, n // 2)], order[min(NUM_FLOOR, n // 2) :]
        reconstructed = self.features_of(self.decode(self.latents[chosen].unflatten(1, self.shape)))
        out: Row = {
            "fd_floor_real": frechet_distance(self.features[chosen], self.features[others]),
            "fd_floor_autoencoder": frechet_distance(reconstructed, self.features),
        }
        train = data.train()
        some = train.take(torch.randperm(len(train), generator=seeded(1))[:NUM_PSNR].numpy())
        for split, pictures in (("held_out", data.held()), ("train", some)):
            if limit is not None:
                pictures = pictures.take(np.arange(min(limit, len(pictures))))
            if len(pictures):
                error = psnr(self.decode(encode(self.vae, pictures)), to_tensor(pictures.images))
                out[f"psnr_autoencoder_{split}"] = float(error.mean())
        return out

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] of latents (N, C, h, w), float32 on the CPU."""
        return in_parts(lambda part: self.vae.decode(part.to(self.vae.dtype)).sample, latents.to(self.vae.device))

    @torch.no_grad()
    def features_of(self, pictures: torch.Tensor) -> torch.Tensor:
        """The classifier's features (N, 64), float32 on the CPU, of pictures (N, 3, H, W) in [-1, 1]."""
        device = next(self.classifier.parameters()).device
        return torch.cat([self.classifier.features(part.to(device)).float().cpu() for part in pictures.split(CHUNK)])

    def prompts_of(self, pictures: Sequence[int]) -> list[str]:
        """ "name, style" of training pictures that have a style."""
        t = self.training
        return [
            f"{t.concepts[c].name}, {t.styles[s]} style"
            for c, s in zip(t.concept[pictures].tolist(), t.style[pictures].tolist())
        ]

    def groups_of(self, concepts: Sequence[int]) -> np.ndarray:
        return np.array([self.training.concepts[c].group for c in concepts])


def measure(
    sample: Sampler,
    real: RealPictures,
    seed: int = 0,
    first_step: FirstStep | None = None,
    bar: tqdm | None = None,
    decode: Decode | None = None,
    most: int = CHUNK,
) -> Row:
    """The module's columns for any sampler; those on the heads where ``first_step`` is given. ``bar`` is told of every sample; ``decode``:
    of samples, by ``real`` if None; ``most``: samples at a time."""
    decode = decode or real.decode

    def draw(prompts: list[str], key: int, name: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(len(prompts), *real.shape, dtype=torch.float32, generator=seeded(seed, key))
        parts = []
        for i in range(0, len(prompts), most):
            parts.append(sample(prompts[i : i + most], noise[i : i + most]).float().cpu())
            if bar is not None:
                bar.update(len(parts[-1]))
        return torch.cat(parts), noise

    training, out = real.training, Row()
    name = [c.name for c in training.concepts]

    samples, _ = draw([name[c] for c in real.names], 0)
    wanted = torch.tensor(real.names, dtype=torch.int64)
    distance, index = nearest(samples.flatten(1), real.latents, 10)
    out["name_top1"], out["name_top10"] = hits(real.concept[index], wanted)
    _, index = nearest(shrink(decode(samples)), real.small, 1)
    out["name_top1_pixels"], _ = hits(real.concept[index], wanted)
    memorised = {
        "nearest_train_ratio": float(distance[:, 0].mean() / real.leave_one_out.mean()),
        "below_q5": float((distance[:, 0] < real.leave_one_out.quantile(0.05)).double().mean()),
    }

    described = training.concept[real.described].tolist()
    by_name, _ = draw([name[c] for c in described], 1)
    if real.has_styles:
        prompts = real.prompts_of(real.described)
        by_style, noise = draw(prompts, 2)
        _, index = nearest(by_style.flatten(1), real.latents, 1)
        out["name_style_top1"], _ = hits(real.concept[index], torch.tensor(described, dtype=torch.int64))

    if real.pairs:
        samples, _ = draw(real.prompts_of(real.pairs), 7)
        _, index = nearest(samples.flatten(1), real.latents, 1)
        out["name_style_all_top1"], _ = hits(real.concept[index], real.concept[real.pairs])

    if real.keywords:
        samples, _ = draw([prompt for _, prompt in real.keywords], 3)
        _, index = nearest(samples.flatten(1), real.latents, 10)
        wanted = torch.tensor([c for c, _ in real.keywords], dtype=torch.int64)
        out["keyword_top1"], out["keyword_top10"] = hits(real.concept[index], wanted)

    if real.held_out:
        samples, _ = draw([name[c] for c in real.held_out], 4)
        _, index = nearest(samples.flatten(1), real.latents, 1)
        groups, wanted_groups = real.groups_of(training.concept.tolist()), real.groups_of(real.held_out)
        out["held_out_group"] = float((groups[index[:, 0].numpy()] == wanted_groups).mean())
        out["held_out_group_chance"] = chance(groups, wanted_groups)

    out["fd_name"] = frechet_distance(real.features_of(decode(by_name)), real.features)
    if real.has_styles:
        out["fd_name_style"] = frechet_distance(real.features_of(decode(by_style)), real.features)

    if real.variety:
        samples, _ = draw([name[c] for c in real.variety for _ in range(VARIETY_SEEDS)], 5)
        hit, exist = zip(
            *(styles_hit(part, real, c) for part, c in zip(samples.flatten(1).split(VARIETY_SEEDS), real.variety))
        )
        out["styles_hit"], out["styles_real"] = statistics.mean(hit), statistics.mean(exist)
    out |= memorised

    if first_step is not None and real.has_styles:
        target = real.latents[real.described]
        steps = [first_step(prompts[i : i + most], noise[i : i + most]) for i in range(0, len(prompts), most)]
        length, far = (
            torch.cat([getattr(s, key).float().cpu() for s in steps]) for key in ("direction_length", "distance")
        )
        out["direction_length_spearman"] = spearman(length, -mean_square(by_style.flatten(1) - target))
        out["distance_r2"] = r_squared(far, mean_square(target - noise.flatten(1)).sqrt())

    four = [name[c] for c in (real.names * 4)[:4]]
    noise = torch.randn(4, *real.shape, dtype=torch.float32, generator=seeded(seed, 6))
    out["seconds_per_picture"] = median_seconds(lambda: decode(sample(four, noise))) / 4
    return out


@torch.no_grad()
def in_parts(decode: Decode, latents: torch.Tensor, most: int = CHUNK) -> torch.Tensor:
    """Pictures (N, 3, H, W) in [-1, 1], float32 on the CPU, of latents, so many at a time."""
    return torch.cat([decode(part).float().clamp(-1, 1).cpu() for part in latents.split(most)])


def seeded(seed: int, kind: int = 0) -> torch.Generator:
    """A generator for one kind of prompt."""
    return torch.Generator().manual_seed(seed + SEED_STRIDE * kind)


def shrink(pictures: torch.Tensor) -> torch.Tensor:
    """4x4 means as vectors, (N, 3, H, W) -> (N, 3 * H/4 * W/4)."""
    return F.avg_pool2d(pictures, 4).flatten(1)


def nearest(queries: torch.Tensor, references: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances ||q - r||_2 and indices, both (n, min(k, m)), of the rows of (m, D) nearest to each row of (n, D), nearest first."""
    k = min(k, len(references))
    found = [torch.cdist(part, references).topk(k, largest=False) for part in queries.split(1000)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def hits(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Shares of rows whose first, and any, of the labels found (n, k) is the one wanted (n,)."""
    hit = found == wanted[:, None]
    return float(hit[:, 0].double().mean()), float(hit.any(1).double().mean())


def chance(labels: np.ndarray, wanted: np.ndarray) -> float:
    """Expected share of hits when each answer is a random element of ``labels``: sum_g p_labels(g) p_wanted(g)."""
    return float(sum((labels == g).mean() * (wanted == g).mean() for g in np.unique(wanted)))


def styles_hit(samples: torch.Tensor, real: RealPictures, concept: int) -> tuple[int, int]:
    """Distinct styles of the concept's real pictures nearest to the samples (n, D), and the number of styles that it has."""
    own = torch.nonzero((real.concept == concept) & (real.style >= 0)).flatten()
    _, index = nearest(samples, real.latents[own], 1)
    return len(real.style[own][index].unique()), len(real.style[own].unique())


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    r"""The Fréchet distance between normal distributions fitted to features (n, D) and (m, D), in float64.

    ``|mu_a - mu_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2))`` with means mu and unbiased covariances A, B (Heusel et al.,
    arXiv 1706.08500, in other features).
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # the trace of a root is the sum of the roots of the eigenvalues
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of (n,) and (n,), ties in the order in which they stand."""
    ranks = torch.stack([x.argsort(stable=True).argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def r_squared(predicted: torch.Tensor, true: torch.Tensor) -> float:
    """1 - sum (predicted - true)^2 / sum (true - mean true)^2: 0 is as good as the best constant, 1 is perfect."""
    return float(1 - (predicted - true).square().sum() / (true - true.mean()).square().sum())


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median wall clock of a call after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
