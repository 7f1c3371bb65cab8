"""Tables of characters with which text.js does what Python and the tokenizer do, made from the two.

JavaScript's own Unicode is of another version in every browser.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

from tokenizers import BertWordPieceTokenizer

from coalescer_fast.models import emoji
from coalescer_fast.models.description import ARTICLE

SEPARATOR = "\U00010000"  # a letter that nothing else is normalised to
HANGUL = range(0xAC00, 0xD7A4)  # the tokenizer takes them apart by a formula
SURROGATES = range(0xD800, 0xE000)
MAX_CODE = sys.maxunicode


def tables(tokenizer: BertWordPieceTokenizer) -> dict[str, Any]:
    """Make all tables.

    Returns:
        A dictionary for JSON. ``sets``, each the inside of a character class of a regular expression with the flag u:
        ``space``, ``alphanumeric``, ``decimal``, ``symbol`` as Python has them, ``modifier`` as `emoji.spell`, and of
        the tokenizer ``removed``, ``ideograph`` (set between spaces), ``blank`` and ``punctuation``. And by character:
        ``lower``, ``emoji`` (names of emoji, their sequences and other symbols), ``normalized`` and ``marks``
        (combining classes of what is not removed). And ``article``, a regular expression.
    """
    characters = [chr(code) for code in range(MAX_CODE + 1) if code not in SURROGATES]
    became = dict(zip(characters, _normalized(tokenizer, characters)))
    ideographs = {c for c, text in became.items() if text == f" {c} "}
    removed = {c for c, text in became.items() if not text}
    produced = set("".join(became.values()))
    outputs = list(filter(produced.__contains__, characters))
    blank, punctuation = _split(tokenizer, outputs)
    symbols = (c for c in characters if unicodedata.category(c) == "So" and ord(c) not in emoji._REGIONAL)
    names = {c: unicodedata.name(c).lower() for c in symbols if unicodedata.name(c, "")}
    return {
        "sets": {
            "space": _set(filter(str.isspace, characters)),
            "alphanumeric": _set(filter(str.isalnum, characters)),
            "decimal": _set(filter(str.isdecimal, characters)),
            "symbol": _set(c for c in characters if unicodedata.category(c).startswith("S")),
            "modifier": _set(map(chr, sorted(emoji._MODIFIERS))),
            "removed": _set(sorted(removed)),
            "ideograph": _set(sorted(ideographs)),
            "blank": _set(sorted(blank)),
            "punctuation": _set(sorted(punctuation)),
        },
        "lower": {c: c.lower() for c in characters if c.lower() != c},
        "emoji": {**names, **emoji.names()},
        "normalized": {
            c: text
            for c, text in became.items()
            if text != c and c not in removed and c not in ideographs and ord(c) not in HANGUL
        },
        "article": ARTICLE.pattern,
        "marks": {c: unicodedata.combining(c) for c in outputs if unicodedata.combining(c)},
    }


def _normalized(tokenizer: BertWordPieceTokenizer, characters: list[str]) -> list[str]:
    """What the tokenizer makes of each character by itself."""
    found: list[str] = tokenizer.normalizer.normalize_str(SEPARATOR.join(characters)).split(SEPARATOR)
    here = characters.index(SEPARATOR)
    found[here : here + 2] = [SEPARATOR]  # it came out as two empty ones
    assert len(found) == len(characters)
    return found


def _split(tokenizer: BertWordPieceTokenizer, characters: list[str]) -> tuple[set[str], set[str]]:
    """Characters at which the tokenizer ends a word: those that vanish, and those that are words of their own."""
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("".join(f"a{c}a" for c in characters))
    at = [span for _, span in pieces]
    alone = {start for start, end in at if end - start == 1}
    inside = {i for start, end in at for i in range(start, end)}
    blank = {c for k, c in enumerate(characters) if 3 * k + 1 not in inside}
    return blank, {c for k, c in enumerate(characters) if 3 * k + 1 in alone and c not in blank}


def _set(characters: Iterable[str]) -> str:
    """Rising characters as ranges of a character class."""
    ranges: list[list[int]] = []
    for code in map(ord, characters):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\u{{{a:x}}}" + (f"-\\u{{{b:x}}}" if b > a else "") for a, b in ranges)
