from __future__ import annotations

import unicodedata

import pytest

from coalescer_fast.models import emoji
from coalescer_fast.models.emoji import spell


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("🐙", "octopus"),
        ("🐙🔥", "octopus fire"),
        ("a 🐙 in a 🎩, 3d style", "a octopus in a top hat , 3d style"),
        ("❤", "red heart"),
        ("❤\ufe0f", "red heart"),  # in colour
        ("❤\ufe0e", "red heart"),  # as text
        ("👍🏽", "thumbs up"),
        ("👩🏿\u200d🚒", "woman firefighter"),
        ("👨\u200d👩\u200d👧\u200d👦", "family: man, woman, girl, boy"),
        ("🧑\u200d🐙", "person \u200d octopus"),  # no such emoji; the tokenizer drops what joins them
        ("🇩🇪🇫🇷", "flag: Germany flag: France"),
        ("🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "flag: England"),
        ("🇩", "🇩"),
        ("1\ufe0f\u20e3", "keycap: 1"),
        ("☙", "reversed rotated floral heart bullet"),  # a symbol, and no emoji
        ("🏽", ""),
    ],
)
def test_emoji_are_read_as_their_names(text, words):
    assert spell(text).split() == words.split()


@pytest.mark.parametrize("text", ["", "octopus", "1 # *", "Café 海 осьминог", "∞ − €", "क्\u200dष"])
def test_other_text_stays_as_it_is(text):
    assert spell(text) == text


def test_every_emoji_is_read_whole():
    for characters, name in emoji.names().items():
        assert spell(characters).strip() == name


def test_names_are_those_of_unicode():
    """Where both have one of the same words, which most have."""
    single = {character: name for character, name in emoji.names().items() if len(character) == 1}
    unicode = {character: unicodedata.name(character, "").lower() for character in single}
    assert sum(single[character] == unicode[character] for character in single) > len(single) / 4
