from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from coalescer_fast.training.classifier import (
    PictureClassifier,
    accuracies,
    classes_of,
    labels_of,
    shifted,
    train_classifier,
)
from coalescer_fast.training.data import Concept, PictureDataset
from coalescer_fast.training.pictures import to_tensor


def dataset(num: int = 160, styles: tuple[str, ...] = ("day", "night")) -> PictureDataset:
    """16x16 pictures: the group is where the bright half lies, the style how bright the noise is."""
    rng = np.random.default_rng(0)
    concepts = tuple(Concept(f"thing {i}", group=("left", "right")[i % 2], subgroup=f"{i % 3}") for i in range(6))
    concept, style = np.arange(num) % 6, np.arange(num) // 6 % 2
    images = rng.integers(0, 60, (num, 16, 16, 3)) + 60 * style[:, None, None, None]
    for image, c in zip(images, concept):
        image[:, :8] += 90 if c % 2 else 0
        image[:, 8:] += 0 if c % 2 else 90
    return PictureDataset(
        images.astype(np.uint8),
        concepts,
        concept,
        styles,
        style if styles else np.full(num, -1),
        held_out=np.arange(num) % 5 == 4,
    )


@pytest.fixture(scope="module")
def trained() -> PictureClassifier:
    return train_classifier(dataset(), steps=40, batch_size=32, progress=False)


def test_it_learns_what_it_has_not_seen(trained):
    held = accuracies(trained, dataset().held())
    assert set(held) == {"group", "style"}
    assert min(held.values()) > 0.9  # chance: 0.5


def test_only_the_kept_heads_are_part_of_the_model(trained):
    assert trained.config.labels == {"group": ["left", "right"], "style": ["day", "night"]}
    assert not any("concept" in key for key in trained.state_dict())


def test_the_same_arguments_give_the_same_weights():
    state = torch.random.get_rng_state()
    a, b, other = (train_classifier(dataset(40), steps=3, seed=seed, progress=False).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["layers.1.weight"], other["layers.1.weight"])
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's random numbers are left alone


def test_round_trip_in_half_precision_computes_in_float32(trained, tmp_path):
    pictures = to_tensor(dataset().images)
    with torch.no_grad():
        before = trained.features(pictures)
    copy.deepcopy(trained).half().save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = PictureClassifier.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert not loaded.training
    assert loaded.config.labels == trained.config.labels
    with torch.no_grad():
        after = loaded.features(pictures)
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)  # weights of 11 bits


def test_pictures_without_styles_have_no_such_head():
    model = train_classifier(dataset(40, styles=()), steps=2, progress=False)
    assert set(model.config.labels) == {"group"}
    assert set(model(to_tensor(dataset(40).images))) == {"group"}


def test_a_labelling_can_be_kept_on_demand():
    model = train_classifier(dataset(40), steps=2, kept_heads=("concept",), progress=False)
    assert {name: logits.shape for name, logits in model(to_tensor(dataset(40).images)).items()} == {"concept": (40, 6)}


def test_pictures_of_another_size_are_resized(trained):
    assert trained.features(torch.zeros(2, 3, 40, 24)).shape == (2, 64)


def test_nothing_to_classify_is_said():
    data = PictureDataset(np.zeros((4, 16, 16, 3), np.uint8), (Concept("all"),), np.zeros(4, np.int64))
    with pytest.raises(ValueError, match="fewer than two labels"):
        train_classifier(data, steps=1, progress=False)
    with pytest.raises(ValueError, match="multiple of 16"):
        PictureClassifier(size=40)


def test_labels_and_classes():
    data = dataset(8).take(np.array([1, 6]))
    assert labels_of(data)["group"] == ["right", "left"]
    assert labels_of(data)["style"] == ["day", "night"]
    assert classes_of(["b", "", "z", "a"], ["a", "b"]).tolist() == [1, -1, -1, 0]


def test_shift_moves_the_batch_and_continues_its_border():
    torch.manual_seed(0)
    pictures = torch.arange(16.0).view(1, 1, 4, 4).expand(2, 3, 4, 4)
    seen = {tuple(shifted(pictures, 1)[0, 0, 0].tolist()) for _ in range(100)}
    assert {(0, 1, 2, 3), (0, 0, 1, 2), (1, 2, 3, 3), (4, 5, 6, 7)} <= seen
    assert len(seen) == 6  # up and staying show the same first row
