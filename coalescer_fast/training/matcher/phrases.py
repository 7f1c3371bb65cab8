"""Phrases of the kind that people type, made of names, keywords and common words."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .wordnet import WordNet

# fmt: off
QUALITIES = (
    "red", "blue", "green", "yellow", "purple", "pink", "black", "white", "brown", "orange", "grey", "big", "small",
    "little", "tiny", "huge", "old", "young", "happy", "sad", "angry", "cute", "funny", "scary", "fast", "slow",
    "hot", "cold", "new", "wet", "baby", "two", "three", "broken", "flying", "sleeping", "golden", "pretty", "evil",
    "magic", "giant", "wooden",
)
# fmt: on
PREPOSITIONS = ("with", "and", "on", "in", "under", "of", "for", "at")


def compositions(things: Sequence[str], wordnet: WordNet, count: int, rng: random.Random) -> list[str]:
    """Different phrases of two or three words about things, in alphabetical order.

    Args:
        things: names and keywords.
        wordnet: whose common words are used, too.
        count: of the phrases.
        rng: draws them.
    """
    common = sorted(wordnet.common)
    nouns = [word for word in common if wordnet.senses[word][0].startswith("n")]
    adjectives = [word for word in common if wordnet.senses[word][0].startswith("a")]
    out: set[str] = set()
    while len(out) < count:
        thing = rng.choice(things if rng.random() < 0.6 else nouns)
        quality = rng.choice(QUALITIES if rng.random() < 0.6 else adjectives)
        other = rng.choice(things if rng.random() < 0.5 else nouns)
        article = rng.choice(("a ", "the ", "", ""))
        kinds = (
            f"{quality} {thing}",
            f"a {thing}",
            f"a {quality} {thing}",
            f"{thing} {rng.choice(PREPOSITIONS)} {article}{other}",
            f"{thing} {other}",
            thing if thing.endswith("s") else f"{thing}s",
        )
        out.add(rng.choices(kinds, (5, 1, 1, 1, 1, 1))[0])
    return sorted(out)
