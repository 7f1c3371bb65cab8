from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import BertWordPieceTokenizer

from coalescer_fast import DescriptionEncoder
from coalescer_fast.folders import WEIGHTS
from coalescer_fast.models.description import Entry, Match

TOKENS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "octopus",
    "cat",
    "##s",
    "red",
    "style",
    "3d",
    "flat",
    "noto",
    "dog",
    "é",
    "海",
    "cafe",
    "-",
)
STYLES = ("3d", "flat", "noto")
NAMES = ("octopus", "red cat", "dog")
EXISTS = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]])
DIM = 12


def encoder(styles=STYLES, names=NAMES, exists=EXISTS) -> DescriptionEncoder:
    random = np.random.default_rng(0)
    table = random.integers(-127, 128, (len(TOKENS), DIM)).astype(np.int8)
    vocab = np.frombuffer("\n".join(TOKENS).encode("utf-8"), np.uint8)
    return DescriptionEncoder.from_table(table, random.random(DIM).astype(np.float32), vocab, styles, names, exists)


def test_tokenizer_is_that_of_the_vocabulary():
    mine = BertWordPieceTokenizer({token: i for i, token in enumerate(TOKENS)}, lowercase=True)
    for text in ("octopus", "Red CATS", "3d style", "cafe Café", "catsup", "海 é", "cat-dog", "", "  red  "):
        assert encoder().tokenizer.encode(text).ids == mine.encode(text).ids


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("octopus", ["octopus"]),
        ("Red CATS", ["red", "cat", "##s"]),
        ("cat, dog;red", ["cat", "dog", "red"]),  # commas and semicolons only separate
        ("Café", ["cafe"]),  # BERT's normaliser strips accents
        ("cat zebra", ["cat"]),  # the unknown is left out
        ("海海", ["海", "海"]),
        ("[PAD] cat [MASK]", ["cat"]),
        ("", []),
        ("zebra ∞ 🛸", []),
        ("a 🐙, 🐈🐕", ["octopus", "cat", "dog"]),  # emoji are read as their names
    ],
)
def test_token_ids(text, tokens):
    assert encoder().token_ids(text) == [TOKENS.index(token) for token in tokens]


SENSIBLE = (
    "octopus",
    "a red apple",
    "cat face with tears of joy",
    "snowboarder",
    "a house by the sea",
    "broccoli",
    "firefighter in a blue uniform",
    "rocket, 3d style",
    "two people",
    "pizzas",
    "musical instruments",
    "skateboarding",
    "grinning cats",
    "a birthday cake",
    "cupcakes",
    "Unicorn!",
    "steam locomotive; flat style",
    "ice-cream",
    "🐙🔥",
    "100 percent",
)
NONSENSE = (
    "xyzzy",
    "щукабрик",
    "asdf",
    "qwertyuiop",
    "blorp",
    "zzzzz",
    "gribble frotz",
    "kwyjibo",
    "q",
    "dkfj2 vlorgh",
)


@pytest.fixture(scope="module")
def embedded() -> DescriptionEncoder:
    return DescriptionEncoder.from_pretrained(WEIGHTS / "emoji-64" / "description_encoder")


def test_every_style_is_known(embedded):
    for style in embedded.config.styles:
        assert all(embedded.words(f"slug, {style} style").values()), style


@pytest.mark.parametrize("text", SENSIBLE)
def test_words_that_are_known(embedded, text):
    words = embedded.words(text)
    assert words
    assert all(words.values())


@pytest.mark.parametrize("text", NONSENSE)
def test_words_that_are_not(embedded, text):
    words = embedded.words(text)
    assert words
    assert not any(words.values())


def test_words_in_their_order_each_once(embedded):
    found = embedded.words("A blorp cat, xyzzy and a Cat (3d style)")
    assert list(found) == ["a", "blorp", "cat", "xyzzy", "and", "3d", "style"]
    assert [word for word, known in found.items() if not known] == ["blorp", "xyzzy"]


def test_words_of_a_small_vocabulary():
    assert encoder().words("zebra, red cats ∞ 🛸 - [PAD]") == {
        "zebra": False,
        "red": True,
        "cats": True,
        "∞": False,
        "flying": False,
        "saucer": False,
    }
    assert encoder().words(" ,; - ") == {}


@pytest.mark.parametrize(
    "spoil", [lambda v: v.fill_(0xFF), lambda v: v.fill_(ord("\n"))], ids=["no text", "other lines"]
)
def test_a_damaged_vocabulary_is_refused(spoil):
    model = encoder()
    spoil(model.vocab)
    with pytest.raises(ValueError, match=r"vocab .*: load the description encoder anew"):
        model(["octopus"])


def test_vector_is_the_normalised_sum_of_scaled_rows():
    model = encoder()
    rows = model.table.double() * model.scale.double()
    total = rows[TOKENS.index("red")] + rows[TOKENS.index("cat")] + rows[TOKENS.index("##s")]
    expected = total / total.square().mean().sqrt()
    torch.testing.assert_close(model(["red cats"])[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_vectors_have_rms_one():
    vectors = encoder()(["octopus", "red cat, 3d style", "海", "dog " * 500])
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.square().mean(1).sqrt(), torch.ones(4))


@pytest.mark.parametrize("text", ["", "   ", ",;,", "zebra", "∞ 🛸", "[CLS]"])
def test_nothing_known_is_the_zero_vector(text):
    assert torch.equal(encoder()([text]), torch.zeros(1, DIM))


def test_order_does_not_matter():
    a, b = encoder()(["red cat, 3d style", "style 3d cat red"])
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # a float32 sum in another order


def test_batch_equals_single_descriptions():
    texts = ["octopus", "", "red cat", "dog " * 100]
    model = encoder()
    assert torch.equal(model(texts), torch.cat([model([text]) for text in texts]))


def test_very_long_descriptions():
    model = encoder()
    torch.testing.assert_close(
        model(["cat " * 20_000]), model(["cat"]), rtol=1e-4, atol=1e-4
    )  # 20,000 float32 additions
    rows, mask = model.token_rows(["cat " * 20_000])
    assert rows.shape == (1, 77, DIM)
    assert mask.all()


def test_token_rows_and_mask():
    model = encoder()
    rows, mask = model.token_rows(["red cats", "", "zebra", "dog"], max_length=5)
    assert rows.shape == (4, 5, DIM)
    assert rows.dtype == torch.float32
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [3, 1, 1, 1]
    assert mask[:, 0].all()
    ids = [TOKENS.index(token) for token in ("red", "cat", "##s")]
    assert torch.equal(rows[0, :3], model.table[ids].float() * model.scale)
    assert not rows[0, 3:].any()
    assert not rows[1:3].any()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("cat, 3d style", True),
        ("3D Style cat", True),
        ("noto style", True),
        ("cat", False),
        ("3d cat", False),
        ("x3d style", False),
        ("flat stylestone", False),
        ("pixel style", False),
        ("", False),
    ],
)
def test_names_style(text, named):
    assert encoder().names_style(text) is named


def test_style_words_are_no_patterns():
    model = encoder(styles=("a.b", "c++"), exists=np.ones((3, 2)))
    assert model.names_style("cat, a.b style")
    assert not model.names_style("cat, axb style")


def test_match_by_the_table_of_descriptions():
    model = encoder()
    assert model.match("octopus") == Match("octopus", "octopus", 1.0, "octopus")
    assert model.match(" Octopus, 3d style") == Match(" Octopus, 3d style", "octopus", 1.0, " Octopus, 3d style")
    vectors = model(["red", "octopus", "red cat", "dog"])
    cosines = (vectors[1:] * vectors[:1]).mean(1)
    nearest = NAMES[int(cosines.argmax())]
    assert model.match("red, FLAT style") == Match(
        "red, FLAT style", nearest, pytest.approx(float(cosines.max())), f"{nearest}, flat style"
    )
    assert model.match("") is model.match("zzz") is model.match("3d style") is None
    assert encoder(names=(), exists=None).match("octopus") is None


def matching(names=((1, 0), (0, 1), (-1, 0)), lexicon=None) -> DescriptionEncoder:
    """An encoder whose table for matching has "cat" near the first name and "red" near the second."""
    plain = encoder()
    table = np.zeros((len(TOKENS), 2), np.int8)
    table[TOKENS.index("cat")] = 100, 10
    table[TOKENS.index("red")] = -10, 40
    vectors = np.array(names, np.int8) * 127
    matcher = (table, np.array([0.5, 1.0], np.float32), vectors)
    arrays = (plain.table.numpy(), plain.scale.numpy(), plain.vocab.numpy())
    return DescriptionEncoder.from_table(*arrays, STYLES, NAMES, EXISTS, matcher, lexicon)


def test_match_by_a_table_of_its_own():
    model = matching()
    found = model.match("cat")  # (50, 10) against (1, 0), (0, 1), (-1, 0)
    assert (found.name, found.similarity) == ("octopus", pytest.approx(50 / (50**2 + 10**2) ** 0.5))
    assert model.match("red").name == "red cat"
    assert model.match("dog").name == "dog"  # a known name is itself, whatever its vector
    assert model.styles_of("red") == ["noto"]
    assert torch.equal(model(["cat"]), encoder()(["cat"]))  # the vectors of descriptions are as before


def test_closeness_is_of_the_table_alone():
    model = matching(lexicon={"kraken": Entry(0, 1.0), "cat": Entry(2, 0.5)})
    cosines = [50 / (50**2 + 10**2) ** 0.5, 10 / (50**2 + 10**2) ** 0.5, -50 / (50**2 + 10**2) ** 0.5]
    # the lexicon says "dog", which the table has opposite
    assert model.closeness("cat, 3d style") == (pytest.approx(cosines[2]), pytest.approx(cosines[2] - cosines[0]))
    assert matching().closeness("cat") == (pytest.approx(cosines[0]), pytest.approx(cosines[0] - cosines[1]))
    for text in ("", "zzz", "kraken", "3d style"):  # no token is known
        assert model.closeness(text) == (0.0, 0.0)
    one = encoder(names=NAMES[:1], exists=EXISTS[:1])
    assert one.closeness(NAMES[0]) == (pytest.approx(1.0), 0.0)


def test_closeness_of_a_word_that_the_table_does_not_know():
    model = matching(lexicon={"katze": Entry(1, 0.9), "cat": Entry(1, 0.9)})
    assert model.closeness("katze") == model.closeness("katze, 3d style") == model.closeness("red cat")
    assert model.closeness("red cat")[0] > 0.5
    assert model.closeness("cat") != model.closeness("red cat")  # the table has a say in what it knows


def test_the_lexicon_goes_before_the_tables():
    model = matching(lexicon={"kraken": Entry(0, 1.0), "cat": Entry(2, 0.5), "glass": Entry(1, 0.8)})
    assert model.match("cat") == Match("cat", "dog", pytest.approx(0.5, abs=0.002), "dog")
    for text in ("kraken", "a Kraken!", "the krakens", "Krakens"):
        assert model.match(text).name == "octopus", text
        assert all(model.words(text).values()), text
    assert model.match("glasses, 3d style").description == "red cat, 3d style"
    assert model.match("kraken red").name == "red cat"  # not an entry: by the table
    assert not model.words("kraken red")["kraken"]


def test_names_beyond_the_first_256_are_in_the_lexicon():
    names = [f"name {i}" for i in range(700)]
    plain = encoder()
    matcher = (np.zeros((len(TOKENS), 2), np.int8), np.ones(2, np.float32), np.ones((700, 2), np.int8))
    arrays = (plain.table.numpy(), plain.scale.numpy(), plain.vocab.numpy())
    model = DescriptionEncoder.from_table(*arrays, (), names, None, matcher, {"far": Entry(699, 1.0)})
    assert model.match("far").name == "name 699"


def test_a_matcher_is_saved_and_loaded(tmp_path):
    model = matching(lexicon={"kraken": Entry(0, 1.0)})
    model.save_pretrained(tmp_path)
    loaded = DescriptionEncoder.from_pretrained(tmp_path)
    for text in ("kraken", "cat", "red", "cat red"):
        assert loaded.match(text) == model.match(text)


def test_styles_of_the_nearest_name():
    model = encoder()
    assert model.styles_of("octopus") == ["3d", "flat"]
    assert model.styles_of("cat red") == ["noto"]
    assert model.styles_of("dog") == ["3d", "flat", "noto"]  # none is recorded: all are allowed
    assert encoder(names=(), exists=None).styles_of("octopus") == ["3d", "flat", "noto"]


UNIFORM = (0.0, 0.25, 0.4999, 0.5, 0.75, 1 - 1e-9)


def test_styles_are_drawn_among_those_that_exist():
    drawn = encoder().with_styles(["octopus"] * len(UNIFORM), UNIFORM)
    assert drawn == ["octopus, 3d style"] * 3 + ["octopus, flat style"] * 3
    assert encoder().with_styles(["red cat"] * len(UNIFORM), UNIFORM) == ["red cat, noto style"] * len(UNIFORM)


def test_uniform_numbers_cover_all_styles_evenly():
    drawn = encoder().with_styles(["dog"] * 300, [i / 300 for i in range(300)])
    assert {text: drawn.count(text) for text in drawn} == {f"dog, {style} style": 100 for style in STYLES}


def test_a_named_style_is_kept_even_if_it_does_not_exist():
    texts = ["octopus, noto style", "red cat in flat style", "3d style"]
    assert encoder().with_styles(texts, [0.9] * 3) == texts


@pytest.mark.parametrize("text", ["", "zebra", "   "])
def test_nothing_known_stays_without_a_style(text):
    assert encoder().with_styles([text], [0.5]) == [text]


def test_without_styles_nothing_is_added():
    assert encoder(styles=(), names=(), exists=None).with_styles(["octopus"], [0.5]) == ["octopus"]


def test_named_styles_move_the_vector():
    model = encoder()
    plain, styled = model(["octopus", *model.with_styles(["octopus"], [0.0])])
    assert not torch.allclose(plain, styled)


def test_saved_and_loaded(tmp_path):
    model = encoder()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = DescriptionEncoder.from_pretrained(tmp_path)
    assert loaded.table.dtype == torch.int8
    assert tuple(loaded.config.styles) == STYLES
    texts = ["octopus", "Red cats, 3d style", "海", ""]
    assert torch.equal(loaded(texts), model(texts))
    assert loaded.with_styles(texts, [0.1, 0.2, 0.3, 0.4]) == model.with_styles(texts, [0.1, 0.2, 0.3, 0.4])


def test_names_of_other_scripts_survive(tmp_path):
    model = encoder(names=("海", "café", "dog"))
    model.save_pretrained(tmp_path)
    loaded = DescriptionEncoder.from_pretrained(tmp_path)
    assert loaded.styles_of("海") == ["3d", "flat"]
    assert loaded.styles_of("Café") == ["noto"]


def test_lower_precision_does_not_touch_the_table():
    model = encoder()
    expected = model(["red cat"])
    half = model.to(torch.bfloat16)
    assert half.table.dtype == torch.int8
    vectors = half(["red cat"])
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(
        vectors, expected, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps
    )  # only the 12 scales are rounded


@pytest.mark.gpu
def test_moving_after_use_takes_everything_along():
    """What was computed from the names on one device is not used on another."""
    model = encoder()
    texts = ["octopus", "red cat", "dog"]
    expected = [model.styles_of(text) for text in texts]
    assert [model.to("cuda").styles_of(text) for text in texts] == expected
    assert [model.to("cpu").styles_of(text) for text in texts] == expected


def test_a_text_is_encoded_once_a_call(monkeypatch):
    encode, summed = encoder(), []
    token_sum = DescriptionEncoder.token_sum
    monkeypatch.setattr(DescriptionEncoder, "token_sum", lambda *args: (summed.append(args[1]), token_sum(*args))[1])
    found = encode(["cat", "red cat", "cat", "cat"])
    assert summed == ["cat", "red cat"]
    assert torch.equal(found, torch.cat([encode([text]) for text in ("cat", "red cat", "cat", "cat")]))
    rows, mask = encode.token_rows(["cat", "red cat", "cat", ""])
    for n, text in enumerate(("cat", "red cat", "cat", "")):
        of_text = encode.token_rows([text])
        assert torch.equal(rows[n : n + 1], of_text[0])
        assert torch.equal(mask[n : n + 1], of_text[1])
    assert torch.equal(encode(iter(["cat"])), encode(["cat"]))
    assert encode.with_styles(iter(["cat", "dog"]), [0.5, 0.5]) == encode.with_styles(["cat", "dog"], [0.5, 0.5])
