"""text.js against the encoder that it is made from."""

from __future__ import annotations

import base64
import functools
import random
import sys
import unicodedata

import pytest
from safetensors.torch import save

import coalescer_fast as cf
from coalescer_fast import grading
from coalescer_fast.export.web.tables import SURROGATES, tables
from coalescer_fast.models.description import _key, plain
from coalescer_fast.models.emoji import names, spell
from coalescer_fast.prompts import warnings

from ...helpers.pages import open_scripts
from ...helpers.pipelines import tiny_pipeline

CODES = [code for code in range(sys.maxunicode + 1) if code not in SURROGATES]
TEXTS = [
    "",
    " ",
    "octopus",
    "an Octopus!",
    "octopuses",
    "eine Katze",
    "une pieuvre",
    "cat, FİREFOX style",
    "cat, fıre style, FIRE style",
    "Crème brûlée, 3d style",
    "🐙 in a 🎩",
    "👩🏽‍🚀 astronaut",
    "#️⃣ and ✅",
    "🇩🇪 flag, 🏴‍☠️",
    "a red apple; FLAT STYLE",
    "two red apples",
    "snowboarder",
    "zzqx frobnicate",
    "sad robot, noto style, blob style",
    "ΣΊΣΥΦΟΣ ς",
    "İstanbul ıçş ǅ",
    "한국어 海 日本",
    "[UNK] [MASK] and [CLS]octopus[SEP]",
    "a\u0301\u0323 e\u200b\u00ad f\x07g\x0bh",
    "x" * 101,
    "x" * 100,
    "ﬁre Ⅷ ½ ① ٣",
    "𝕆𝕔𝕥𝕠𝕡𝕦𝕤",
    "1 2 3 c b",
    "hot weather",
    "man riding a bicycle",
    "the houses at night...",
    "\U0001d165\U0001d16d\u302e",
    "my dog's -- 3D  style?",
    "unicorn ㊙ ⌚ ©",
]


@functools.cache
def made() -> dict:
    """The tables, which are the same for every vocabulary."""
    return tables(tiny_pipeline().description_encoder.tokenizer)


@pytest.fixture(scope="module")
def encoder():
    return cf.CoalescerPipeline.from_pretrained("emoji-64").description_encoder


@pytest.fixture(scope="module")
def load(page, tmp_path_factory):
    """Opens text.js with an encoder, `encoder` in the page."""

    def call(encoder, **data):
        config = {name: encoder.config[name] for name in ("dim", "match_dim", "lexicon_size")}
        open_scripts(
            page,
            tmp_path_factory.mktemp("text"),
            ("text.js",),
            packed=base64.b64encode(save(encoder.state_dict())).decode(),
            config={**config, "styles": list(encoder.config.styles)},
            tables=made(),
            **data,
        )
        page.evaluate(
            "globalThis.encoder = new DescriptionEncoder("
            "readSafetensors(Uint8Array.from(atob(packed), (c) => c.charCodeAt(0)).buffer), config, tables); 0"
        )

    return call


def jumbled(encoder, count: int) -> list[str]:
    """Texts of known words, emoji and any characters, in which nothing is right."""
    draw = random.Random(0)
    words = [*encoder.known_names, *names(), "style", "3d style", "[UNK]", "an", "S", "Σ", ",", "\u0301", "\x1c"]

    def part() -> str:
        word = draw.choice(words) if draw.random() < 0.7 else chr(draw.choice(CODES))
        return word + draw.choice((" ", " ", "", ", ", "-"))

    return ["".join(part() for _ in range(draw.randrange(1, 7))) for _ in range(count)]


@pytest.mark.parametrize("which", ["embedded", "tiny"])
def test_everything_of_a_description_is_that_of_python(page, load, encoder, which):
    encoder = encoder if which == "embedded" else tiny_pipeline().description_encoder
    texts = TEXTS + jumbled(encoder, 200)
    load(encoder, texts=texts)
    found = page.evaluate(
        """texts.map((text) => ({
          ids: encoder.tokenIds(text), words: [...encoder.words(text)], match: encoder.match(text),
          style: [0, 0.3, 0.99].map((u) => encoder.withStyle(text, u)), plain: encoder.plain(text),
          spelled: encoder.spell(text), grade: encoder.ofWords(text), vector: [...encoder.vector(text)],
          warnings: encoder.warnings(text).length,
        }))"""
    )
    for text, one in zip(texts, found, strict=True):
        assert one["ids"] == encoder.token_ids(text), ascii(text)
        assert one["words"] == [[*item] for item in encoder.words(text).items()], ascii(text)
        assert one["plain"] == plain(text), ascii(text)
        assert one["spelled"] == spell(text), ascii(text)
        assert one["style"] == encoder.with_styles([text] * 3, [0, 0.3, 0.99]), ascii(text)
        expected = encoder.match(text)
        assert (one["match"] is None) == (expected is None), ascii(text)
        if expected is not None:
            assert (one["match"]["name"], one["match"]["description"]) == (expected.name, expected.description), ascii(
                text
            )
            assert one["match"]["similarity"] == pytest.approx(expected.similarity, abs=1e-6)
        assert one["grade"] == pytest.approx(grading.of_words(encoder, [text])[0], abs=1e-6), ascii(text)
        assert one["vector"] == pytest.approx(encoder([text])[0].tolist(), abs=2e-6), ascii(text)
        assert (one["warnings"] > 0) == bool(warnings(encoder, [text], None, 1.5)), ascii(text)


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_every_character_is_read_as_in_python(page, load, encoder, which):
    """In a word and alone: the ids of all code points, the words that they make, and their capitals."""
    codes = CODES if which == "all" else [c for c in CODES if unicodedata.category(chr(c)) not in ("Lo", "Cn", "Co")]
    texts = [" ".join(f"a{chr(c)}b {chr(c)}" for c in codes[i : i + 64]) for i in range(0, len(codes), 64)]
    load(encoder, texts=texts)
    found = page.evaluate(
        "texts.map((text) => [encoder.tokenIds(text), [...encoder.words(text)], encoder.plain(text)])"
    )
    for i, (ids, words, said) in enumerate(found):
        where = f"U+{codes[64 * i]:04X} and the 63 after it"
        assert ids == encoder.token_ids(texts[i]), where
        assert words == [[*item] for item in encoder._words(texts[i]).items()], where
        assert said == plain(texts[i]), where


def test_hashes_are_those_of_the_lexicon(page, load, encoder):
    texts = ["", "octopus", "é" * 64, "x" * 127, "x" * 128, "x" * 129, "🐙" * 100]
    load(encoder, texts=texts)
    found = page.evaluate("texts.map((text) => blake2b8(new TextEncoder().encode(text)).toString())")
    assert found == [str(_key(text)) for text in texts]
