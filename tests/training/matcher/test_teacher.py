from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from coalescer_fast.training.data import Concept
from coalescer_fast.training.matcher.teacher import OF_ALL, OF_NAME, OF_SYNONYM, OF_WORDS, SentenceTransformer, Teacher
from coalescer_fast.training.matcher.wordnet import read
from tests.helpers.wordnet import write_wordnet

CONCEPTS = [Concept("dog", ("bark", "pet")), Concept("cat", ("pet",))]


def bag(texts):
    """Words as directions, each of its own: a transformer that knows no meanings."""
    words = sorted(re.findall(r"\w+", "dog cat bark pet puppy animal domestic tame canine young a living being"))
    out = np.zeros((len(texts), len(words) + 1), np.float32)
    for i, text in enumerate(texts):
        for word in re.findall(r"\w+", text.lower()):
            out[i, words.index(word) if word in words else -1] += 1
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)


@pytest.fixture
def teacher(tmp_path):
    write_wordnet(tmp_path)
    return Teacher(bag, CONCEPTS, read(tmp_path))


def cosine(a, b):
    (x,), (y,) = bag([a]), bag([b])
    return float(x @ y)


def test_scores_are_those_of_the_formula(teacher):
    found = teacher.scores(bag(["dog pet", "tame canine"]))
    for text, row in zip(("dog pet", "tame canine"), found):
        gloss = "dog, dog, domestic dog: a tame canine"
        whole = cosine(text, "dog, bark, pet")
        parts = (
            OF_NAME * cosine(text, "dog"),
            OF_WORDS * max(cosine(text, word) for word in ("dog", "bark", "pet", "domestic dog")),
            OF_ALL * max(whole, (whole + cosine(text, gloss)) / 2),
        )
        assert row[0] == pytest.approx(sum(parts) / (OF_NAME + OF_WORDS + OF_ALL), rel=1e-5)
    # "cat" is not in this WordNet: keywords and the whole alone
    parts = (OF_WORDS * cosine("dog pet", "pet"), OF_ALL * cosine("dog pet", "cat, pet"))
    assert found[0, 1] == pytest.approx(sum(parts) / (OF_NAME + OF_WORDS + OF_ALL), rel=1e-5)


def test_wordnet_says_what_means_the_same_and_what_is_a_kind(teacher):
    nothing = np.zeros((2, bag(["dog"]).shape[1]), np.float32)
    same, kind = teacher.scores_of_words(["domestic dog", "puppy"], nothing, nothing)
    assert same[0] == pytest.approx(OF_SYNONYM)
    assert 0 < kind[0] < same[0]
    assert same[1] == kind[1] == 0


def test_without_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        SentenceTransformer(tmp_path)
