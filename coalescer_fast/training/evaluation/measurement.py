"""The columns of any sampler, on the same prompts and the same noise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from tqdm.auto import tqdm

from ..losses import mean_square
from .frechet import frechet_distance
from .metrics import chance, density_and_coverage, hits, median_seconds, nearest, r_squared, shrink, spearman
from .prompts import VARIETY_SEEDS
from .real_pictures import RealPictures, Row, seeded
from .samplers import CHUNK, Decode, FirstStep, Sampler


class Kind(IntEnum):
    """Kinds of prompt, each with noise of its own."""

    NAMES = 0
    DESCRIBED_BY_NAME = 1
    DESCRIBED = 2
    KEYWORDS = 3
    HELD_OUT = 4
    VARIETY = 5
    TIMED = 6
    PAIRS = 7
    WORDINGS = 8


@dataclass
class Run:
    """The sampling of an evaluation.

    Attributes:
        sample: what is measured.
        real: what it is compared with.
        seed: of the noise.
        most: samples at a time.
        bar: is told of every sample.
    """

    sample: Sampler
    real: RealPictures
    seed: int
    most: int
    bar: tqdm | None

    def noise(self, count: int, kind: Kind) -> torch.Tensor:
        generator = seeded(self.seed, kind)
        return torch.randn(count, *self.real.shape, dtype=torch.float32, generator=generator)

    def draw(self, prompts: Sequence[str], kind: Kind) -> torch.Tensor:
        """Latents (n, C, h, w) of the prompts, float32 on the CPU."""
        parts = []
        for some, noise in zip(self.split(prompts), self.noise(len(prompts), kind).split(self.most)):
            parts.append(self.sample(some, noise).float().cpu())
            if self.bar is not None:
                self.bar.update(len(some))
        return torch.cat(parts)

    def draw_names(self, concepts: Sequence[int], kind: Kind) -> torch.Tensor:
        return self.draw([self.real.training.concepts[c].name for c in concepts], kind)

    def split(self, prompts: Sequence[str]) -> list[list[str]]:
        return [list(prompts[i : i + self.most]) for i in range(0, len(prompts), self.most)]

    def nearest_concepts(self, samples: torch.Tensor, k: int) -> torch.Tensor:
        """Concepts (n, k) of the training pictures nearest to the samples."""
        return self.real.concept[nearest(samples.flatten(1), self.real.latents, k)[1]]


def measure(
    sample: Sampler,
    real: RealPictures,
    seed: int = 0,
    first_step: FirstStep | None = None,
    bar: tqdm | None = None,
    decode: Decode | None = None,
    most: int = CHUNK,
) -> Row:
    """Measure a sampler.

    Args:
        sample: the sampler.
        real: what it is compared with.
        seed: of the noise.
        first_step: what the heads say first; without it, the columns on the heads are left out.
        bar: is told of every sample.
        decode: decodes the samples; None for ``real.decode``.
        most: samples at a time.

    Returns:
        The columns that `coalescer_fast.training.evaluation` defines, but the floors.
    """
    decode = decode or real.decode
    run, asked = Run(sample, real, seed, most, bar), real.prompts
    out, memorised = of_names(run, decode)
    described = real.training.concept[asked.described].tolist()
    by_name = run.draw_names(described, Kind.DESCRIBED_BY_NAME)
    by_style = run.draw(real.prompts_of(asked.described), Kind.DESCRIBED) if asked.has_styles else None
    if by_style is not None:
        out["name_style_top1"], _ = hits(run.nearest_concepts(by_style, 1), as_tensor(described))
    out |= {**of_pairs(run), **of_keywords(run), **of_held_out(run), **of_wordings(run)}
    features = real.features_of(decode(by_name))
    out["fd_name"] = frechet_distance(features, real.features)
    out["density"], out["coverage"] = density_and_coverage(real.features[asked.described], features)
    if by_style is not None:
        out["fd_name_style"] = frechet_distance(real.features_of(decode(by_style)), real.features)
    out |= {**of_variety(run), **memorised}
    if first_step is not None and by_style is not None:
        out |= of_heads(run, first_step, by_style)
    four = [real.training.concepts[c].name for c in (asked.names * 4)[:4]]
    noise = run.noise(4, Kind.TIMED)
    out["seconds_per_picture"] = median_seconds(lambda: decode(sample(four, noise))) / 4
    return out


def of_names(run: Run, decode: Decode) -> tuple[Row, Row]:
    """The columns of retrieval by name, and those of memorisation."""
    real, names = run.real, run.real.prompts.names
    samples, wanted = run.draw_names(names, Kind.NAMES), as_tensor(names)
    distance, index = nearest(samples.flatten(1), real.latents, 10)
    top1, top10 = hits(real.concept[index], wanted)
    _, by_pixels = nearest(shrink(decode(samples)), real.small, 1)
    retrieved: Row = {"name_top1": top1, "name_top10": top10}
    retrieved["name_top1_pixels"], _ = hits(real.concept[by_pixels], wanted)
    near = distance[:, 0]
    return retrieved, {
        "nearest_train_ratio": float(near.mean() / real.leave_one_out.mean()),
        "below_q5": float((near < real.leave_one_out.quantile(0.05)).double().mean()),
    }


def of_pairs(run: Run) -> Row:
    pairs = run.real.prompts.pairs
    if not pairs:
        return {}
    samples = run.draw(run.real.prompts_of(pairs), Kind.PAIRS)
    return {"name_style_all_top1": hits(run.nearest_concepts(samples, 1), run.real.concept[pairs])[0]}


def of_keywords(run: Run) -> Row:
    keywords = run.real.prompts.keywords
    if not keywords:
        return {}
    samples = run.draw([prompt for _, prompt in keywords], Kind.KEYWORDS)
    top1, top10 = hits(run.nearest_concepts(samples, 10), as_tensor([c for c, _ in keywords]))
    return {"keyword_top1": top1, "keyword_top10": top10}


def of_held_out(run: Run) -> Row:
    real, held_out = run.real, run.real.prompts.held_out
    if not held_out:
        return {}
    samples = run.draw_names(held_out, Kind.HELD_OUT)
    found = real.groups_of(run.nearest_concepts(samples, 1)[:, 0].tolist())
    groups, wanted = real.groups_of(real.training.concept.tolist()), real.groups_of(held_out)
    return {"held_out_group": float((found == wanted).mean()), "held_out_group_chance": chance(groups, wanted)}


def of_wordings(run: Run) -> Row:
    wordings = run.real.prompts.wordings
    if not wordings:
        return {}
    found = run.nearest_concepts(run.draw([text for text, _ in wordings], Kind.WORDINGS), 1)[:, 0].tolist()
    return {"free_wording": statistics.mean(c in accepted for c, (_, accepted) in zip(found, wordings))}


def of_variety(run: Run) -> Row:
    variety = run.real.prompts.variety
    if not variety:
        return {}
    samples = run.draw_names([c for c in variety for _ in range(VARIETY_SEEDS)], Kind.VARIETY)
    parts = samples.flatten(1).split(VARIETY_SEEDS)
    hit, real = zip(*(styles_hit(part, run.real, c) for part, c in zip(parts, variety)))
    return {"styles_hit": statistics.mean(hit), "styles_real": statistics.mean(real)}


def styles_hit(samples: torch.Tensor, real: RealPictures, concept: int) -> tuple[int, int]:
    """Distinct styles of the concept's real pictures nearest to the samples (n, D), and the number of its styles."""
    own = torch.nonzero((real.concept == concept) & (real.style >= 0)).flatten()
    _, index = nearest(samples, real.latents[own], 1)
    return len(real.style[own][index].unique()), len(real.style[own].unique())


def of_heads(run: Run, first_step: FirstStep, by_style: torch.Tensor) -> Row:
    """The columns on the heads, for the samples of the described pictures."""
    described = run.real.prompts.described
    target = run.real.latents[described]
    noise = run.noise(len(described), Kind.DESCRIBED)
    prompts = run.split(run.real.prompts_of(described))
    steps = [first_step(some, z) for some, z in zip(prompts, noise.split(run.most))]
    length, distance = (
        torch.cat([getattr(step, name).float().cpu() for step in steps]) for name in ("direction_length", "distance")
    )
    return {
        "direction_length_spearman": spearman(length, -mean_square(by_style.flatten(1) - target)),
        "distance_r2": r_squared(distance, mean_square(target - noise.flatten(1)).sqrt()),
    }


def as_tensor(concepts: Sequence[int]) -> torch.Tensor:
    return torch.tensor(concepts, dtype=torch.int64)
