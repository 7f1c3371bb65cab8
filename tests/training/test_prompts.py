from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from coalescer_fast.training.coalescer import description_encoder
from coalescer_fast.training.data import Concept, PictureDataset
from coalescer_fast.training.prompts import PromptConfig, PromptSampler

CONCEPTS = (
    Concept("octopus", ("sea", "animal", "tentacle"), "animals-nature", "marine"),
    Concept("whale", ("sea", "animal"), "animals-nature", "marine"),
    Concept("pizza", ("food", "cheese", "slice"), "food-drink", "prepared"),
)
STYLES = ("3d", "flat")


@pytest.fixture(scope="module")
def data():
    """Octopus in both styles, whale in 3d alone, pizza in flat alone; two pictures of each."""
    rows = [(0, 0), (0, 1), (1, 0), (2, 1)] * 2
    return PictureDataset(
        np.zeros((len(rows), 16, 16, 3), np.uint8),
        CONCEPTS,
        np.array([c for c, _ in rows]),
        STYLES,
        np.array([s for _, s in rows]),
    )


@pytest.fixture(scope="module")
def encoder(data):
    return description_encoder(data)


def groups(data, encoder, **config):
    shares = dict.fromkeys(("name_style", "missing_style", "keyword", "style", "empty"), 0.0)
    return PromptSampler(data, encoder, PromptConfig(**{**shares, "queue_size": 400, **config})).groups(
        random.Random(0)
    )


def test_shares(data, encoder):
    config = PromptConfig(queue_size=1000, min_group=8)
    drawn = PromptSampler(data, encoder, config).groups(random.Random(0))
    empty = sum(len(g.pictures) for g in drawn if not g.phrases)
    assert 0 < empty <= round(config.empty * 1000)
    keyword = sum(
        len(g.pictures) for g in drawn if g.phrases and g.phrases[0] in ("sea", "animal", "animals nature", "marine")
    )
    assert keyword >= 0.9 * config.keyword * 1000


@pytest.mark.parametrize("seed", range(3))
def test_every_kind_has_its_share(data, encoder, seed):
    """By pictures; a kind's last group may go beyond its share, by less than that group."""
    shares = {"name_style": 0.4, "missing_style": 0.1, "keyword": 0.2, "style": 0.1, "empty": 0.2}
    config = PromptConfig(**shares, queue_size=1000, min_group=4, with_keywords=0.0, keywords_only=0.0)
    missing, styles = {("whale", "flat style"), ("pizza", "3d style")}, {("3d style",), ("flat style",)}
    count, largest = dict.fromkeys(shares, 0), dict.fromkeys(shares, 0)
    for g in PromptSampler(data, encoder, config).groups(random.Random(seed)):
        named = bool(g.phrases) and g.phrases[0] in ("octopus", "whale", "pizza")
        kind = "missing_style" if g.phrases in missing else "name_style" if named else "keyword"
        kind = "style" if g.phrases in styles else kind if g.phrases else "empty"
        count[kind] += len(g.pictures)
        largest[kind] = max(largest[kind], len(g.pictures))
    for kind, share in shares.items():
        assert share * 1000 <= count[kind] < share * 1000 + largest[kind], kind


def test_name_and_style_fit_their_pictures(data, encoder):
    for g in groups(data, encoder, name_style=1.0, with_keywords=0.0, keywords_only=0.0):
        name, style = g.phrases
        looks = {(CONCEPTS[data.concept[i]].name, f"{STYLES[data.style[i]]} style") for i in g.pictures}
        assert looks == {(name, style)}
        assert len(g.pictures) == 2  # both pictures of that look


def test_missing_style_names_what_does_not_exist(data, encoder):
    drawn = groups(data, encoder, missing_style=1.0, with_keywords=0.0, keywords_only=0.0)
    assert {g.phrases for g in drawn} == {("whale", "flat style"), ("pizza", "3d style")}
    for g in drawn:
        assert {CONCEPTS[data.concept[i]].name for i in g.pictures} == {g.phrases[0]}


def test_keywords_are_shared_by_concepts(data, encoder):
    drawn = groups(data, encoder, keyword=1.0, min_group=4)
    assert {g.phrases[0] for g in drawn} == {"sea", "animal", "animals nature", "marine"}
    for g in drawn:
        assert {data.concept[i] for i in g.pictures} <= {0, 1}
        assert len(g.pictures) >= 4
        if len(g.phrases) == 2:
            assert {f"{STYLES[data.style[i]]} style" for i in g.pictures} == {g.phrases[1]}


def test_wordings(data, encoder):
    sampler = PromptSampler(data, encoder, PromptConfig())
    rng = random.Random(0)
    drawn = [sampler.wording(0, rng) for _ in range(2000)]
    by_name = sum(words == ["octopus"] for words in drawn) / 2000
    keywords_only = sum("octopus" not in words for words in drawn) / 2000
    assert by_name == pytest.approx(0.45, abs=0.04)  # some three standard deviations of 2,000 draws
    assert keywords_only == pytest.approx(0.3, abs=0.04)
    assert all(set(words) <= {"octopus", "sea", "animal", "tentacle"} for words in drawn)


def test_large_groups_are_cut(data, encoder):
    assert all(len(g.pictures) <= 3 for g in groups(data, encoder, empty=1.0, group_size=3))


def test_vectors_are_the_encoders(data, encoder):
    sampler = PromptSampler(data, encoder, PromptConfig())
    phrases = [("octopus", "3d style"), ("sea", "animal", "flat style"), (), ("pizza",)]
    torch.testing.assert_close(sampler.vectors(phrases), encoder([", ".join(p) for p in phrases]))


def test_encoder_knows_the_names_and_their_styles(encoder):
    assert encoder.known_names == ["octopus", "whale", "pizza"]
    assert encoder.styles_of("octopus") == ["3d", "flat"]
    assert encoder.styles_of("whale") == ["3d"]
    assert encoder.styles_of("pizza") == ["flat"]


def test_same_random_state_same_groups(data, encoder):
    sampler = PromptSampler(data, encoder, PromptConfig(queue_size=100))
    assert sampler.groups(random.Random(3)) == sampler.groups(random.Random(3))
    assert sampler.groups(random.Random(3)) != sampler.groups(random.Random(4))
