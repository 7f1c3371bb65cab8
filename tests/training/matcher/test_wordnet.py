from __future__ import annotations

import pytest

from coalescer_fast.training.matcher.wordnet import read
from tests.helpers.wordnet import write_wordnet


def test_what_is_read(tmp_path):
    write_wordnet(tmp_path)
    found = read(tmp_path)
    assert found.senses["dog"] == ["n00000001", "v00000001"]
    assert found.senses["domestic dog"] == ["n00000001"]
    assert found.synsets["n00000001"].lemmas == ("dog", "domestic dog")
    assert found.synsets["n00000001"].gloss == "a tame canine"
    assert found.synsets["n00000003"].gloss == "a living being; one that moves"
    assert found.synsets["a00000009"].lemmas == ("sad",)
    assert found.synsets["n00000001"].text("dog") == "dog, dog, domestic dog: a tame canine"
    assert found.common == {"dog", "sad"}


def test_kinds(tmp_path):
    write_wordnet(tmp_path)
    found = read(tmp_path)
    assert found.kinds_of("n00000002", 1) == {"n00000001"}
    assert found.kinds_of("n00000002", 2) == {"n00000001", "n00000003"}


def test_no_wordnet(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data\.noun in .*wordnet-base"):
        read(tmp_path)
