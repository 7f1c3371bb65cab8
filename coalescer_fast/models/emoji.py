"""Emoji in a description, read as their names: "🐙 in a 🎩" says "octopus in a top hat"."""

from __future__ import annotations

import unicodedata
from functools import cache
from importlib.resources import files

# characters that only choose how the one before them is drawn: text or colour, and the five skin tones
_MODIFIERS = {code: None for code in (0xFE0E, 0xFE0F, *range(0x1F3FB, 0x1F400))}
_REGIONAL = range(0x1F1E6, 0x1F200)  # halves of flags, which mean nothing alone


@cache
def names() -> dict[str, str]:
    """The names in Unicode CLDR of all emoji of Unicode 17 and their sequences, spelled without modifiers."""
    table = files(__package__).joinpath("emoji.tsv").read_text("utf-8")
    return dict(line.split("\t") for line in table.splitlines())


@cache
def _longest() -> dict[str, int]:
    """By its first character, the length of the longest emoji."""
    found: dict[str, int] = {}
    for emoji in names():
        found[emoji[0]] = max(found.get(emoji[0], 0), len(emoji))
    return found


def spell(text: str) -> str:
    """Replace the emoji of a text by their names, between spaces.

    The longest emoji known is taken at each place, so that a flag or a family is one; a sequence that is not known is
    read part by part. Skin tones are left out. Another symbol goes by its name in Unicode, where it has one.
    """
    if text.isascii():
        return text
    plain, out, i = text.translate(_MODIFIERS), [], 0
    while i < len(plain):
        lengths = range(_longest().get(plain[i], 0), 0, -1)
        emoji = next((plain[i : i + n] for n in lengths if plain[i : i + n] in names()), None)
        if emoji is not None:
            out.append(f" {names()[emoji]} ")
        elif unicodedata.category(plain[i]) == "So" and ord(plain[i]) not in _REGIONAL:
            out.append(f" {unicodedata.name(plain[i], plain[i]).lower()} ")
        else:
            out.append(plain[i])
        i += len(emoji or plain[i])
    return "".join(out)
