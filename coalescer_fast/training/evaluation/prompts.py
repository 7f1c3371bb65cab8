"""What is asked for in an evaluation; always the same for the same data and limit."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...schema import conform
from ..data import PictureDataset

NUM_DESCRIBED = 1000  # training pictures whose descriptions the Fréchet distances are measured with
NUM_VARIETY, VARIETY_SEEDS, MIN_STYLES = 60, 8, 4
NUM_KEYWORDS = 3
HELD_OUT_SEEDS = 5
WORDING_SEEDS = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Prompts:
    """The prompts of an evaluation.

    Attributes:
        names: concepts that are asked for by name.
        keywords: concepts, and `NUM_KEYWORDS` of their keywords that they are asked for by.
        described: training pictures whose descriptions are asked for, with a style if there are styles.
        has_styles: whether the training pictures have styles.
        pairs: training pictures whose name and style are asked for, all or none.
        held_out: concepts kept out of training, each `HELD_OUT_SEEDS` times.
        variety: concepts that exist in several styles, asked for by name `VARIETY_SEEDS` times.
        wordings: wordings, and the concepts that are accepted for them, each `WORDING_SEEDS` times.
    """

    names: list[int]
    keywords: list[tuple[int, str]]
    described: list[int]
    has_styles: bool
    pairs: list[int]
    held_out: list[int]
    variety: list[int]
    wordings: list[tuple[str, set[int]]]

    @property
    def count(self) -> int:
        """Samples that are drawn for them."""
        once = len(self.names) + len(self.keywords) + len(self.pairs) + len(self.held_out) + len(self.wordings)
        return once + len(self.described) * (1 + self.has_styles) + len(self.variety) * VARIETY_SEEDS


def read_wordings(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read wordings from a JSON file: {"little kitten": ["cat", "cat face"], ...}, with the names that are accepted.

    Raises:
        ValueError: for another file.
    """
    try:
        wordings: dict[str, tuple[str, ...]] = conform(
            json.loads(Path(path).read_text("utf-8")), dict[str, tuple[str, ...]], "it"
        )
    except (ValueError, RecursionError) as error:
        expected = 'expected JSON of wordings and accepted names, as in {"little kitten": ["cat", "cat face"]}'
        raise ValueError(f"{path} holds no wordings ({' '.join(str(error).split()):.200}); {expected}") from error
    return wordings


def draw_prompts(
    data: PictureDataset,
    limit: int | None = None,
    every_pair: bool = False,
    wordings: Mapping[str, Sequence[str]] | None = None,
    brief: bool = False,
) -> Prompts:
    """Choose the prompts.

    Args:
        data: with its held-out pictures.
        limit: at most so many of each kind.
        every_pair: ask for the name and style of every training picture, too.
        wordings: ask for them, too; with the names that are accepted.
        brief: ask for names and wordings alone, the same as in a whole evaluation.

    Raises:
        ValueError: for a wording none of whose names is trained on.
    """
    rng = random.Random(0)

    def some(items: Sequence[T], most: int | None = None) -> list[T]:
        most = min(x for x in (most, limit, len(items)) if x is not None)
        return list(items) if most == len(items) else rng.sample(items, most)

    training = data.train()
    concepts = sorted(set(training.concept.tolist()))
    names = some(concepts)
    keywords = [
        (c, ", ".join(rng.sample(data.concepts[c].keywords, NUM_KEYWORDS)))
        for c in some([c for c in concepts if len(data.concepts[c].keywords) >= NUM_KEYWORDS])
    ]
    styled = [i for i, style in enumerate(training.style.tolist()) if style >= 0]
    described = some(styled or range(len(training)), NUM_DESCRIBED)
    new = sorted(set(data.held().concept.tolist()) - set(concepts))
    held_out = [c for c in some([c for c in new if data.concepts[c].group]) for _ in range(HELD_OUT_SEEDS)]
    styles_of: dict[int, set[int]] = {}
    for i in styled:
        styles_of.setdefault(int(training.concept[i]), set()).add(int(training.style[i]))
    variety = some([c for c in sorted(styles_of) if len(styles_of[c]) >= MIN_STYLES], NUM_VARIETY)
    concept_of = {data.concepts[c].name: c for c in concepts}
    asked = []
    for wording in some(list(wordings or ())):
        accepted = {concept_of[name] for name in (wordings or {})[wording] if name in concept_of}
        if not accepted:
            raise ValueError(f"no training picture has a name that is accepted for {wording!r}: leave the wording out")
        asked += [(wording, accepted)] * WORDING_SEEDS
    if brief:
        return Prompts(names, [], described, False, [], [], [], asked)
    return Prompts(names, keywords, described, bool(styled), styled if every_pair else [], held_out, variety, asked)
