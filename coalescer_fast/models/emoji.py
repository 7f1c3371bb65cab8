"""Emoji in a description, read as their names: "🐙 in a 🎩" says "octopus in a top hat"."""

from __future__ import annotations

import unicodedata
from functools import cache
from importlib.resources import files

# what only chooses a way to draw the character before it: text or colour, and the five skin tones
_MODIFIERS = {code: None for code in (0xFE0E, 0xFE0F, *range(0x1F3FB, 0x1F400))}
_REGIONAL = range(0x1F1E6, 0x1F200)  # halves of flags, which say nothing alone


@cache
def names() -> dict[str, str]:
    """The name in Unicode CLDR of every emoji of Unicode 17, sequences among them, spelled without modifiers."""
    table = files(__package__).joinpath("emoji.tsv").read_text("utf-8")
    return dict(line.split("\t") for line in table.splitlines())


@cache
def _longest() -> dict[str, int]:
    """Of each character that an emoji starts with, the length of the longest such emoji."""
    found: dict[str, int] = {}
    for emoji in names():
        found[emoji[0]] = max(found.get(emoji[0], 0), len(emoji))
    return found


def spell(text: str) -> str:
    """The text with the names of its emoji in their place, between spaces.

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
