"""Entries of the lexicon: single words and phrases with the name that they mean."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import numpy as np

from ...models.description import Entry, plain
from ...models.emoji import names as emoji_names
from .teacher import Vectors

LANGUAGES = ("de", "fr", "es", "it", "pt", "nl", "pl", "ru", "zh", "ja")
SURE = 0.45  # score from which a word of WordNet is an entry
TOLD = 1.0  # similarity of the entries of CLDR


def of_wordnet(lemmas: Sequence[str], scores: Vectors) -> dict[str, Entry]:
    """The words of WordNet that the teacher is sure of.

    Args:
        lemmas: N words.
        scores: (N, names).
    """
    best = scores.argmax(1)
    score = scores[np.arange(len(best)), best]
    return {
        plain(lemma): Entry(int(row), min(1.0, float(value)))
        for lemma, row, value in zip(lemmas, best, score)
        if value >= SURE
    }


def of_cldr(
    folder: Path, known: Sequence[str], english: Container[str], languages: Sequence[str] = LANGUAGES
) -> dict[str, Entry]:
    """Names and keywords in other languages that mean one known name alone and are no English words.

    Args:
        folder: ``annotations`` of npm's cldr-annotations-full.
        known: the known names.
        english: words that are left out, such as "beer", which is Dutch for "bear".
        languages: folders in it.

    Raises:
        FileNotFoundError: if a language is not there.
    """
    row_of = {plain(name): row for row, name in reversed([*enumerate(known)])}
    rows = {emoji: row_of[plain(name)] for emoji, name in emoji_names().items() if plain(name) in row_of}
    out: dict[str, Entry] = {}
    for language in languages:
        path = Path(folder) / language / "annotations.json"
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}: give the folder annotations of npm's cldr-annotations-full")
        told: Mapping[str, Mapping[str, list[str]]] = json.loads(path.read_text("utf-8"))["annotations"]["annotations"]
        # a name goes before a keyword, and an earlier language before a later one
        for kind in ("tts", "default"):
            meant: dict[str, set[int]] = {}
            for emoji, words in told.items():
                row = rows.get(re.sub("[\ufe0e\ufe0f]", "", emoji))
                if row is None:
                    continue
                for word in words.get(kind, ()):
                    meant.setdefault(plain(word), set()).add(row)
            for text, found in meant.items():
                if text and text not in english and len(found) == 1:
                    out.setdefault(text, Entry(min(found), TOLD))
    return out
