"""The real side of an evaluation: what samples are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...folders import WEIGHTS
from ...models import CoalescerAutoencoder
from ..autoencoder import encode, psnr
from ..classifier import PictureClassifier
from ..data import PictureDataset
from ..pictures import to_tensor
from .frechet import frechet_distance
from .metrics import nearest, shrink
from .prompts import draw_prompts
from .samplers import CHUNK, in_parts

NUM_FLOOR = 1500  # training pictures that the floors of the Fréchet distance are measured with
NUM_PSNR = 500
SEED_STRIDE = (
    435  # between the seeds of kinds of prompt; any number would do, but the committed results were drawn with it
)

Row = dict[str, float | int | str]


def seeded(seed: int, kind: int = 0) -> torch.Generator:
    """A generator for one kind of prompt."""
    return torch.Generator().manual_seed(seed + SEED_STRIDE * kind)


class RealPictures:
    """The training pictures as latents and features, and what is asked for.

    Args:
        data: the whole data set.
        vae: encodes the pictures, and decodes samples.
        classifier: of the features; None is the embedded model's.
        without: pictures left out, arguments of `PictureDataset.without`.
        limit: at most so many prompts of each kind.
        progress: show a bar.
        every_pair: ask for the name and style of every training picture, too.
        wordings: ask for them, too; with the names that are accepted.
        brief: ask for names and wordings alone: half of the samples, and the columns of the others are left out.

    Attributes:
        training: the N training pictures.
        concept, style: theirs, (N,).
        shape: of a latent.
        latents: (N, D), flattened.
        small: (N, P), 4x4 means of the pictures.
        features: (N, 64), of the classifier.
        leave_one_out: (N,), distances to the nearest other latent.
        prompts: what is asked for.
        floors: the columns that do not depend on a sampler.
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
        wordings: Mapping[str, Sequence[str]] | None = None,
        brief: bool = False,
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
        self.prompts = draw_prompts(subset, limit, every_pair, wordings, brief)
        self.floors = self._floors(data, limit)

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
        """The group of each concept."""
        return np.array([self.training.concepts[c].group for c in concepts])
