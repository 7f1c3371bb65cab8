"""Fit the grading of a model: how likely its pictures show what was asked, see `coalescer_fast.grading`.

Pictures are drawn of wordings of mixed difficulty, made of a data set's names and keywords. A picture is right if the
nearest real picture, by latents, shows one of the concepts that the wording accepts. A logistic regression on
standardised features then tells right pictures from wrong ones. Half of the wordings are kept out of it, to measure it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats
import torch
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from tqdm.auto import tqdm

from .. import files, folders, grading
from ..pipeline import CoalescerPipeline
from .autoencoder import encode
from .data import PictureDataset
from .evaluation import exclusions, quiet
from .evaluation.metrics import nearest

SYLLABLES = ("ba", "ko", "zu", "mi", "fra", "tel", "qua", "xo", "pli", "gor", "nen", "dra")
PENALTY = 1e-3  # of the squares of the weights of standardised features, beside the mean log-loss
SMALLEST = 1e-3  # deviation: a feature that hardly varies says nothing
EASY = 10  # a wording without a word for so many of another kind
CHUNK = 200  # pictures that are drawn at a time


@dataclass(frozen=True)
class Wording:
    """A prompt, and names of the concepts that answer it.

    Attributes:
        kind: of `KINDS`, or another word.
        text: the prompt.
        accepted: names; none where no picture is right.
    """

    kind: str
    text: str
    accepted: frozenset[str]


@dataclass
class Drawn:
    """Pictures of wordings, ``seeds`` of each, one after the other.

    Attributes:
        wordings: of each wording.
        seeds: pictures of a wording.
        texts: as they were encoded, with an art style.
        heads: of two evaluations.
        words: `grading.WORDS` of each wording, (W, 3).
        latents: R after the last step, (N, C, h, w).
        right: whether the picture is right, (N,) bool.
    """

    wordings: list[Wording]
    seeds: int
    texts: list[str]
    heads: list[grading.Heads]
    words: np.ndarray
    latents: torch.Tensor
    right: np.ndarray

    def features(self, evaluations: int = 2) -> np.ndarray:
        """Columns `grading.FEATURES`, (N, F) float64."""
        columns = [column.double().numpy() for one in self.heads[:evaluations] for column in one]
        return np.column_stack([*columns, self.words.repeat(self.seeds, 0)])

    def quality(self, numbers: grading.Grading) -> np.ndarray:
        """What a grading says of each picture, (N,)."""
        odds = grading.log_odds(numbers, self.heads, self.words.repeat(self.seeds, 0).tolist())
        return np.array([grading.probability(each) for each in odds])

    def kinds(self) -> np.ndarray:
        """The kind of each picture's wording, (N,)."""
        return np.repeat(np.array([wording.kind for wording in self.wordings]), self.seeds)


class Words:
    """What wordings are made of.

    Args:
        data: the pictures that the model was trained on, and those held out.
        styles: that the model knows.
    """

    def __init__(self, data: PictureDataset, styles: Sequence[str]):
        self.data = data
        training = data.train()
        self.known = sorted({data.concepts[c].name for c in training.concept.tolist()})
        self.held = sorted({data.concepts[c].name for c in data.held().concept.tolist()} - {*self.known})
        self.keywords = {c.name: c.keywords for c in data.concepts}
        self.having: dict[str, set[str]] = {}  # names by keyword
        for name in self.known:
            for word in self.keywords[name]:
                self.having.setdefault(word, set()).add(name)
        looks = {
            (data.concepts[c].name, s) for c, s in zip(training.concept.tolist(), training.style.tolist()) if s >= 0
        }
        rows = [i for i, style in enumerate(data.styles) if style in styles]
        self.missing = [(name, data.styles[i]) for name in self.known for i in rows if (name, i) not in looks]


Found = tuple[str, "set[str]"]


def of_names(words: Words, rng: random.Random) -> Found:
    name = rng.choice(words.known)
    return name, {name}


def of_keywords(words: Words, rng: random.Random) -> Found:
    name = rng.choice([name for name in words.known if len(words.keywords[name]) >= 3])
    some = rng.sample(words.keywords[name], 3)
    return ", ".join(some), set.intersection(*(words.having[word] for word in some))


def of_one_keyword(words: Words, rng: random.Random) -> Found:
    word = rng.choice(sorted(words.having))
    return word, words.having[word]


def of_parts(words: Words, rng: random.Random) -> Found:
    """A name of which one word is left out; every name that has the others is right."""
    parts = rng.choice([name for name in words.known if " " in name]).split()
    parts.pop(rng.randrange(len(parts)))
    return " ".join(parts), {name for name in words.known if {*parts} <= {*name.split()}}


def of_two_names(words: Words, rng: random.Random) -> Found:
    """The words of two names, shuffled; either is right."""
    names = rng.sample(words.known, 2)
    mixed = " ".join(names).split()
    rng.shuffle(mixed)
    return " ".join(mixed), {*names}


def of_missing_styles(words: Words, rng: random.Random) -> Found:
    name, style = rng.choice(words.missing)
    return f"{name}, {style} style", {name}


def of_held_out_names(words: Words, rng: random.Random) -> Found:
    name = rng.choice(words.held)
    return name, {name}


def of_no_words(words: Words, rng: random.Random) -> Found:
    return " ".join("".join(rng.sample(SYLLABLES, rng.randint(2, 3))) for _ in range(rng.randint(1, 2))), set()


KINDS: dict[str, Callable[[Words, random.Random], Found]] = {
    "name": of_names,
    "three keywords": of_keywords,
    "one keyword": of_one_keyword,
    "name with a word left out": of_parts,
    "words of two names": of_two_names,
    "style that does not exist": of_missing_styles,
    "held-out name": of_held_out_names,
    "no word": of_no_words,
}


def draw_wordings(data: PictureDataset, styles: Sequence[str], count: int, seed: int = 0) -> list[Wording]:
    """Make wordings of all kinds that the data set has words for, no text twice.

    Args:
        data: as for `Words`.
        styles: as for `Words`.
        count: of each kind, or fewer where there are no more; of those without a word a tenth, for they are easy.
        seed: of the choice.
    """
    words, rng, out = Words(data, styles), random.Random(seed), {}
    for kind, make in KINDS.items():
        most = -(-count // EASY) if kind == "no word" else count
        made: dict[str, Wording] = {}
        for _ in range(4 * most):
            try:
                text, accepted = make(words, rng)
            except IndexError:  # there is nothing to choose from
                break
            if text not in out and len(made) < most:
                made.setdefault(text, Wording(kind, text, frozenset(accepted)))
        out.update(made)
    return list(out.values())


def listed_wordings(accepted: Mapping[str, Sequence[str]], kind: str = "free wording") -> list[Wording]:
    """The wordings of a JSON file, {wording: [accepted names]}."""
    return [Wording(kind, text, frozenset(names)) for text, names in accepted.items()]


class Judge:
    """Says what the nearest real picture shows.

    Args:
        pipe: whose latents they are.
        data: the real pictures, held-out ones included.
    """

    def __init__(self, pipe: CoalescerPipeline, data: PictureDataset):
        self.names = [data.concepts[c].name for c in data.concept.tolist()]
        self.latents = encode(pipe.vae, data).flatten(1)

    def __call__(self, latents: torch.Tensor) -> list[str]:
        """Names (N,) for latents (N, C, h, w)."""
        return [self.names[i] for i in nearest(latents.flatten(1), self.latents, 1)[1][:, 0].tolist()]


@torch.no_grad()
def draw(
    pipe: CoalescerPipeline,
    judge: Judge,
    wordings: Sequence[Wording],
    seeds: int = 4,
    seed: int = 0,
    progress: bool = True,
    prompt_matching: bool = True,
    **options: Any,
) -> Drawn:
    """Draw pictures of wordings by two steps, and judge them.

    Args:
        pipe: the model.
        judge: of its pictures.
        wordings: to draw.
        seeds: pictures of each.
        seed: of the noise.
        progress: show a bar.
        prompt_matching: as in the call.
        options: further ones of the call.
    """
    generator = torch.Generator().manual_seed(seed)
    asked = [wording.text for wording in wordings for _ in range(seeds)]
    texts: list[str] = []
    latents, lengths, distances = [], [], []
    with quiet(pipe), tqdm(total=len(asked), desc="grading", disable=not progress, delay=1.0) as bar:
        for i in range(0, len(asked), CHUNK):
            some = asked[i : i + CHUNK]
            noise = pipe.initial_noise(len(some), generator)
            out: Any = pipe(
                some, latents=noise, output_type="latent", return_trace=True, prompt_matching=prompt_matching, **options
            )
            latents.append(out.images.cpu())
            lengths.append([step.direction_length.cpu() for step in out.trace])
            distances.append([step.distance.cpu() for step in out.trace])
            texts += (pipe.as_drawn if prompt_matching else pipe.with_styles)(some, noise)
            bar.update(len(some))
    heads = [
        (torch.cat([part[i] for part in lengths]), torch.cat([part[i] for part in distances]))
        for i in range(grading.HEADS)
    ]
    final = torch.cat(latents)
    accepted = (wording.accepted for wording in wordings for _ in range(seeds))
    right = np.array([name in names for name, names in zip(judge(final), accepted)])
    words = np.array(grading.of_words(pipe.description_encoder, [wording.text for wording in wordings]))
    return Drawn(list(wordings), seeds, texts, heads, words, final, right)


def fit(drawn: Drawn) -> grading.Grading:
    """Fit the grading to pictures.

    Raises:
        ValueError: if all are right, or none.
    """
    if drawn.right.all() or not drawn.right.any():
        raise ValueError("all pictures are right or none is: there is nothing to fit a grading to; give other wordings")
    return {count: logistic(drawn.features(int(count)), drawn.right) for count in grading.FEATURES}


def logistic(features: np.ndarray, right: np.ndarray) -> list[float]:
    """Fit a logistic regression.

    Args:
        features: (N, F).
        right: (N,) bool.

    Returns:
        (b, *w), for the features as they are.
    """
    mean, deviation = features.mean(0), np.maximum(features.std(0), SMALLEST)
    x, sign = np.column_stack([np.ones(len(right)), (features - mean) / deviation]), np.where(right, 1.0, -1.0)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ w)
        error = np.logaddexp(0, -margin).mean() + PENALTY * np.square(w[1:]).sum()
        slope = x.T @ (-sign * np.exp(-np.logaddexp(0, margin))) / len(sign)
        return error, slope + 2 * PENALTY * np.r_[0.0, w[1:]]

    bias, *weights = scipy.optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="BFGS").x
    raw = np.array(weights) / deviation
    return [float(bias - raw @ mean), *map(float, raw)]


def split(wordings: Sequence[Wording]) -> tuple[list[Wording], list[Wording]]:
    """Every other wording of each kind: those to fit to, and those to measure by."""
    halves: tuple[list[Wording], list[Wording]] = [], []
    counts: dict[str, int] = {}
    for wording in wordings:
        counts[wording.kind] = n = counts.get(wording.kind, 0) + 1
        halves[1 - n % 2].append(wording)
    return halves


def calibrate(
    pipe: CoalescerPipeline, data: PictureDataset, count: int = 300, seeds: int = 4, progress: bool = True
) -> tuple[grading.Grading, Drawn]:
    """Fit a model's grading, and set it.

    Args:
        pipe: the model; its scheduler has the grading afterwards.
        data: the whole data set that it was trained on, held-out pictures included.
        count: wordings of each kind.
        seeds: pictures of each wording.
        progress: show a bar.

    Returns:
        The grading, and pictures of the wordings that it was not fitted to.
    """
    subset = data.without(**exclusions(pipe.description_encoder, data))
    judge = Judge(pipe, subset)
    fitted, others = split(draw_wordings(subset, pipe.description_encoder.config.styles, count))
    numbers = fit(draw(pipe, judge, fitted, seeds, 0, progress))
    pipe.scheduler.register_to_config(grading=numbers)
    return numbers, draw(pipe, judge, others, seeds, 1, progress)


def store(pipe: CoalescerPipeline, folder: Path) -> None:
    """Write a pipeline's scheduler, with its grading, into the folder that the pipeline was loaded from."""
    files.write_text(folder / "scheduler" / SCHEDULER_CONFIG_NAME, pipe.scheduler.to_json_string())
    if (folder / folders.CHECKSUMS).exists():
        folders.complete(folder, type(pipe))


def area_under_curve(score: np.ndarray, right: np.ndarray) -> float:
    """The chance that a right picture scores higher than a wrong one; NaN where there are none of either."""
    positive, negative = int(right.sum()), int((~right).sum())
    if not positive or not negative:
        return float("nan")
    ranks = scipy.stats.rankdata(score)
    return float((ranks[right].sum() - positive * (positive + 1) / 2) / (positive * negative))


def reliability(quality: np.ndarray, right: np.ndarray, bins: int = 10) -> Iterator[tuple[float, float, int]]:
    """Yield mean quality, share of right pictures and their number, by equal intervals of quality."""
    of = np.minimum((quality * bins).astype(int), bins - 1)
    for i in range(bins):
        if (of == i).any():
            yield float(quality[of == i].mean()), float(right[of == i].mean()), int((of == i).sum())
