from __future__ import annotations

import json

import numpy as np
import pytest

from coalescer_fast.models.description import Entry
from coalescer_fast.training.matcher.lexicon import SURE, of_cldr, of_wordnet

KNOWN = ("dog", "bear", "octopus")


def write_cldr(folder, language, told):
    (folder / language).mkdir()
    text = json.dumps({"annotations": {"annotations": told}}, ensure_ascii=False)
    (folder / language / "annotations.json").write_text(text, "utf-8")


def test_words_that_the_teacher_is_sure_of():
    scores = np.array([[0.9, 0.1, 0.2], [0.1, SURE - 0.01, 0.2], [0.2, 0.3, SURE + 0.01]], np.float32)
    found = of_wordnet(["Doggy", "thing", "devil fish"], scores)
    assert set(found) == {"doggy", "devil fish"}
    assert found["doggy"] == Entry(0, pytest.approx(0.9))
    assert found["devil fish"].name == 2


def test_other_languages(tmp_path):
    write_cldr(
        tmp_path,
        "de",
        {
            "🐕": {"tts": ["Hund"], "default": ["Tier", "Hund", "Leine"]},
            "🐻": {"tts": ["Bär"], "default": ["Tier"]},
            "🐙": {"tts": ["Oktopus"], "default": ["Krake"]},
            "🍕": {"tts": ["Pizza"], "default": ["Pizza"]},
        },
    )
    write_cldr(tmp_path, "nl", {"🐻": {"tts": ["beer"], "default": ["hund"]}})
    found = of_cldr(tmp_path, KNOWN, english={"beer"}, languages=("de", "nl"))
    # "Tier" is of two names, "beer" is English, "hund" is said already, and pizza is no known name
    assert {text: entry.name for text, entry in found.items()} == {
        "hund": 0,
        "leine": 0,
        "bär": 1,
        "oktopus": 2,
        "krake": 2,
    }
    assert {entry.similarity for entry in found.values()} == {1.0}


def test_a_language_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*annotations\.json: give the folder annotations of npm's"):
        of_cldr(tmp_path, KNOWN, set(), ("de",))
