"""Entries of the lexicon: single words and phrases with the name that they mean."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...models.description import Entry, plain
from ...models.emoji import names as emoji_names
from .teacher import Teacher, Vectors

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "ru", "zh", "ja")
SURE = 0.45  # score from which a word of WordNet is an entry
TOLD = 1.0  # similarity of the entries of CLDR


def of_wordnet(teacher: Teacher, lemmas: Sequence[str], scores: Vectors) -> dict[str, Entry]:
    """The words of WordNet that the teacher is sure of.

    Args:
        teacher: whose names the rows are.
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


def of_cldr(folder: Path, known: Sequence[str], languages: Sequence[str] = LANGUAGES) -> dict[str, Entry]:
    """Names in several languages, and those keywords that belong to one known name alone.

    Args:
        folder: ``annotations`` of npm's cldr-annotations-full.
        known: the known names.
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
        names: dict[str, set[int]] = {}
        keywords: dict[str, set[int]] = {}
        for emoji, words in told.items():
            row = rows.get(re.sub("[\ufe0e\ufe0f]", "", emoji))
            if row is not None:
                for name in words.get("tts", ()):
                    names.setdefault(plain(name), set()).add(row)
                for keyword in words.get("default", ()):
                    keywords.setdefault(plain(keyword), set()).add(row)
        # a name goes before a keyword, and an earlier language before a later one
        for table in (names, keywords):
            for text, found in table.items():
                if text and len(found) == 1:
                    out.setdefault(text, Entry(min(found), TOLD))
    return out
