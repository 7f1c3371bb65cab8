"""The columns of a pipeline on a data set."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ...models import DescriptionEncoder
from ...pipeline import CoalescerPipeline
from ..classifier import PictureClassifier
from ..config import CONFIGS, tomllib
from ..data import PictureDataset
from .measurement import measure
from .real_pictures import RealPictures, Row
from .samplers import CHUNK, coalescer_sampler, first_step_of, in_parts, quiet

logger = logging.getLogger(__name__)


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
    wordings: Mapping[str, Sequence[str]] | None = None,
) -> list[Row]:
    """Measure a pipeline on a data set.

    Args:
        pipe: with its runtime.
        data: the whole data set, held-out pictures included.
        steps: step counts.
        guidance_scale: as in the pipeline's call; None for the model's own.
        seed: of the noise; the choice of prompts is always the same.
        progress: show bars.
        classifier: whose features the Fréchet distances are measured in; None for the embedded model's. Distances
            compare in the same features only.
        without: pictures left out, arguments of `PictureDataset.without`; None for what the model was trained without,
            see `exclusions`.
        limit: at most so many prompts of each kind, for a quick look; Fréchet distances of few samples are too large.
        wordings: ask for them, too; with the names that are accepted, see `read_wordings`.

    Returns:
        A row for each step count, with the columns that the package's docstring defines.
    """
    if without is None:
        without = exclusions(pipe.description_encoder, data)
    real = RealPictures(data, pipe.vae, classifier, without, limit, progress, limit is None, wordings)
    scale = pipe.scheduler.config.guidance_scale if guidance_scale is None else guidance_scale
    most = CHUNK if pipe.runtime.max_batch is None else min(CHUNK, pipe.runtime.max_batch)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return in_parts(pipe.runtime.decode, latents.to(pipe.device), most)

    total = len(steps) * real.prompts.count
    rows: list[Row] = []
    with (
        quiet(pipe),
        tqdm(total=total, desc="evaluate", disable=not progress, mininterval=1.0, delay=1.0) as bar,
    ):
        for count in steps:
            sample = coalescer_sampler(pipe, count, guidance_scale)
            measured = measure(sample, real, seed, first_step_of(pipe), bar, decode, most)
            rows.append({"steps": count, "guidance_scale": float(scale), **measured, **real.floors})
    return rows


def exclusions(encoder: DescriptionEncoder, data: PictureDataset) -> dict[str, Any]:
    """What a model was trained without, as arguments of `PictureDataset.without`.

    It is the table [without] of the first committed configuration that leaves only names that the model knows.
    """
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
