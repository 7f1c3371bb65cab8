from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from coalescer_fast.models import DescriptionEncoder
from coalescer_fast.training.data import Concept
from coalescer_fast.training.matcher.phrases import compositions
from coalescer_fast.training.matcher.student import TEMPERATURE, TOP, Matcher, targets, train
from coalescer_fast.training.matcher.wordnet import read
from tests.helpers.wordnet import write_wordnet

WORDS = ("dog", "cat", "puppy", "kitten", "small", "bark")
CONCEPTS = [Concept("dog", ("bark",)), Concept("cat")]


def encoder(matcher=None) -> DescriptionEncoder:
    tokens = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
    table = np.random.default_rng(0).integers(-127, 128, (len(tokens), 16)).astype(np.int8)
    vocab = np.frombuffer("\n".join(tokens).encode("utf-8"), np.uint8)
    return DescriptionEncoder.from_table(
        table, np.ones(16, np.float32), vocab, ("3d",), [c.name for c in CONCEPTS], None, matcher
    )


def test_targets():
    scores = np.array([[0.5, 0.5 - TEMPERATURE, 0.1], [0.1, 0.2, 0.9]], np.float32)
    found = targets(["a", "b"], scores, np.array([[3, 4, 0], [0, 0, 2]], np.float32), np.eye(3, dtype=np.float32))
    assert found.names.shape == (2, min(TOP, 3))
    assert found.names[:, 0].tolist() == [0, 2]
    assert found.shares[0, 1] / found.shares[0, 0] == pytest.approx(np.exp(-1), rel=1e-5)
    assert torch.allclose(found.shares.sum(1), torch.ones(2))
    assert torch.allclose(found.vectors, torch.tensor([[0.6, 0.8, 0], [0, 0, 1]]))


def test_encode_is_the_direction_of_the_sum():
    table = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    matcher = Matcher(table, [[1], [2, 3]])
    expected = torch.stack([table[[5]].sum(0), table[[6, 6, 8]].sum(0)])
    assert torch.allclose(matcher.encode([[5], [6, 6, 8]]), expected / expected.norm(dim=1, keepdim=True), atol=1e-6)
    assert torch.allclose(matcher.names[1], matcher.encode([[2, 3]])[0], atol=1e-6)


def test_wordings_learn_their_names():
    generator = np.random.default_rng(1)
    texts, meant = ["puppy", "small puppy", "kitten", "small kitten"], [0, 0, 1, 1]
    scores = np.array([[0.9, 0.2] if name == 0 else [0.2, 0.9] for name in meant], np.float32)
    # the first token of each text leads the other way to begin with
    vectors = generator.normal(size=(4, 16)).astype(np.float32)
    pools = [(targets(texts, scores, vectors, np.eye(16, dtype=np.float32)), 1.0)]
    table, scale, names = train(encoder(), CONCEPTS, pools, steps=60, learning_rate=0.05, progress=False)
    assert (table.dtype, scale.dtype, names.dtype) == (np.int8, np.float32, np.int8)
    trained = encoder((table, scale, names))
    found = {text: trained.match(text).name for text in (*texts, "dog", "cat", "bark", "small cat")}
    assert found == dict(zip(texts, ["dog", "dog", "cat", "cat"])) | {
        "dog": "dog",
        "cat": "cat",
        "bark": "dog",
        "small cat": "cat",
    }
    again = train(encoder(), CONCEPTS, pools, steps=60, learning_rate=0.05, progress=False)
    assert all(np.array_equal(a, b) for a, b in zip(again, (table, scale, names)))


def test_compositions(tmp_path):
    write_wordnet(tmp_path)
    wordnet = read(tmp_path)
    found = compositions(["pizza", "octopus"], wordnet, 40, random.Random(0))
    assert found == compositions(["pizza", "octopus"], wordnet, 40, random.Random(0)) == sorted(set(found))
    assert len(found) == 40
    assert any("sad" in text for text in found)  # the only common adjective
    assert any(text.startswith("a ") for text in found)
