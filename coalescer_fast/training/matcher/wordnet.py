"""WordNet's files, as Debian's package wordnet-base has them (the format is described in wndb(5WN))."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}


@dataclass(frozen=True)
class Synset:
    """A meaning.

    Attributes:
        lemmas: words and phrases that have it.
        gloss: its definition, without examples.
        hypernyms: keys of the meanings that it is a kind of.
    """

    lemmas: tuple[str, ...]
    gloss: str
    hypernyms: tuple[str, ...]

    def text(self, lemma: str) -> str:
        """The meaning in words, for a sentence transformer."""
        return f"{lemma}, {', '.join(self.lemmas)}: {self.gloss}"


@dataclass
class WordNet:
    """Meanings and the words that have them.

    Attributes:
        synsets: by key, part of speech and place in its file.
        senses: keys of each lemma's meanings, the most frequent first.
        common: lemmas that the tagged texts have.
    """

    synsets: dict[str, Synset] = field(default_factory=dict)
    senses: dict[str, list[str]] = field(default_factory=dict)
    common: set[str] = field(default_factory=set)

    def kinds_of(self, key: str, levels: int) -> set[str]:
        """Keys of the meanings that a meaning is a kind of, up to so many levels above."""
        found, last = set(), {key}
        for _ in range(levels):
            last = {above for k in last for above in self.synsets[k].hypernyms}
            found |= last
        return found


def read(folder: Path) -> WordNet:
    """Read data.* and index.* of a folder.

    Raises:
        FileNotFoundError: if they are not there.
    """
    if not (Path(folder) / "data.noun").is_file():
        raise FileNotFoundError(
            f"there is no data.noun in {folder}: give the folder of WordNet's files, as of Debian's wordnet-base"
        )
    out = WordNet()
    for part, name in FILES.items():
        for words, gloss in _lines(Path(folder) / f"data.{name}"):
            count = int(words[3], 16)
            lemmas = [re.sub(r"\(\w+\)$", "", words[4 + 2 * i]).replace("_", " ") for i in range(count)]
            start = 5 + 2 * count
            pointers = [words[start + 4 * i : start + 4 * i + 4] for i in range(int(words[start - 1]))]
            above = tuple(kind + place for symbol, place, kind, _ in pointers if symbol in ("@", "@i"))
            meaning = re.sub(r';\s*".*', "", gloss).strip()
            out.synsets[part + words[0]] = Synset(tuple(lemmas), meaning, above)
        for words, _ in _lines(Path(folder) / f"index.{name}"):
            count, lemma = int(words[2]), words[0].replace("_", " ")
            out.senses.setdefault(lemma, []).extend(part + place for place in words[-count:])
            if int(words[-count - 1]):
                out.common.add(lemma)
    return out


def _lines(path: Path) -> list[tuple[list[str], str]]:
    """The words of each line, and what is behind its bar; lines of the licence begin with spaces."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith(" ")]
    return [(before.split(), after) for before, _, after in (line.partition(" | ") for line in lines)]
