"""How good pictures of a few classes are, by a classifier that recognises them and has features to compare."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from coalescer_fast.training.classifier import train_classifier
from coalescer_fast.training.data import PictureDataset
from coalescer_fast.training.evaluation import frechet_distance
from coalescer_fast.training.evaluation.samplers import CHUNK
from coalescer_fast.training.pictures import to_tensor

from ..harness.results import Row


class Recognition:
    """A classifier of the concepts of a data set, and its features of the training pictures.

    Args:
        data: with its held-out pictures.
        steps: of the classifier's training.
    """

    def __init__(self, data: PictureDataset, steps: int):
        self.classifier = train_classifier(data, steps=steps, kept_heads=("concept",), progress=False)
        images = data.train().images
        parts = [to_tensor(images[i : i + CHUNK]) for i in range(0, len(images), CHUNK)]
        with torch.no_grad():
            self.real = torch.cat([self.classifier.features(part) for part in parts])

    @torch.no_grad()
    def figures(self, pictures: torch.Tensor, names: Sequence[str]) -> Row:
        """The share of pictures (N, 3, H, W) in [-1, 1] that are recognised as what they are of, and their distance."""
        parts = pictures.split(CHUNK)
        features = torch.cat([self.classifier.features(part) for part in parts])
        logits = torch.cat([self.classifier(part)["concept"] for part in parts])
        found = [self.classifier.config.labels["concept"][i] for i in logits.argmax(1).tolist()]
        hits = statistics.fmean(a == b for a, b in zip(found, names))
        return {"accuracy": hits, "frechet_distance": float(frechet_distance(features, self.real))}
