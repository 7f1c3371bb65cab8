from __future__ import annotations

import csv
import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from coalescer_fast.training import build_data
from coalescer_fast.training.build_data import Emoji, IconSet, PictureSet, build, code_points, fetch, read_emoji, slug
from coalescer_fast.training.data import load_npz

SIDE = 16
GROUPS = {
    "groups": {"0": "smileys-emotion", "1": "animals-nature", "2": "component", "9": "flags"},
    "subgroups": {"0": "face", "1": "bug"},
}
ENTRIES = [
    {"hexcode": "1F41C", "emoji": "🐜", "label": "ant", "tags": ["insect"], "group": 1, "subgroup": 1, "order": 2},
    {"hexcode": "2639-FE0F", "emoji": "☹️", "label": "frowning face", "group": 0, "subgroup": 0, "order": 1},
    {"hexcode": "1F3FB", "emoji": "🏻", "label": "light skin tone", "group": 2, "subgroup": 0, "order": 3},
    {"hexcode": "1F1E6", "emoji": "🇦", "label": "regional indicator A"},
    {"hexcode": "1F6A9", "emoji": "🚩", "label": "triangular flag", "group": 9, "subgroup": 1, "order": 6},
    {
        "hexcode": "1F44D",
        "emoji": "👍",
        "label": "thumbs up",
        "group": 0,
        "subgroup": 0,
        "order": 4,
        "skins": [
            {"hexcode": "1F44D-1F3FD", "emoji": "👍🏽", "tone": 3, "order": 5},
            {"hexcode": "1F44D-1F3FB", "emoji": "👍🏻", "tone": 1, "order": 4.5},
            {"hexcode": "1F44D-1F3FB-1F3FD", "emoji": "👍", "tone": [1, 3], "order": 5.5},
        ],
    },
]


def webp(colour: tuple[int, int, int]) -> bytes:
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    pixels[4:12, 4:12] = colour
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", lossless=True)
    return out.getvalue()


def emoji(name: str, hex: str = "1f41c", aliases: tuple[str, ...] = ()) -> Emoji:
    return Emoji(hex, "", name, (), "", "", 0, 0, aliases)


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """A cache with packages of a few emoji, and no npm to fetch more."""
    pictures = {
        "1f41c": webp((255, 0, 0)),
        "2639": webp((0, 0, 255)),
        "1f44d": webp((255, 0, 0)),
        "1f6a9": webp((255, 255, 255)),
    }
    contents = {
        build_data.DESCRIPTIONS: {
            "en/data.json": json.dumps(ENTRIES).encode(),
            "meta/groups.json": json.dumps(GROUPS).encode(),
        },
        build_data.ALIASES: {
            "emoji.json": json.dumps([{"unified": "1F41C", "name": "ANT", "short_names": ["ant", "emmet"]}]).encode()
        },
        build_data.STYLES["fluent3d"].package: {f"assets/{key}.webp": content for key, content in pictures.items()},
    }
    cache = tmp_path / "cache"
    cache.mkdir()
    for package, files in contents.items():
        with tarfile.open(cache / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"), "w:gz") as tar:
            for path, content in files.items():
                member = tarfile.TarInfo(f"package/{path}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr("shutil.which", lambda name: None)
    return cache


@pytest.fixture
def resvg(monkeypatch):
    """An installed resvg_py; returns the list of what it was asked to draw."""
    drawn: list[str] = []

    class Module:
        @staticmethod
        def svg_to_bytes(svg_string: str) -> list[int]:
            drawn.append(svg_string)
            return list(webp((0, 255, 0)))

    monkeypatch.setitem(sys.modules, "resvg_py", Module)
    return drawn


def test_keys():
    assert code_points("2639-FE0F") == "2639"
    assert code_points("1F468-200D-2695-FE0F") == "1f468-200d-2695"
    assert slug("man’s shoe: O'Clock (big)") == "mans-shoe-oclock-big"


def test_fetch_reads_only_what_is_asked_for(packages):
    assert list(fetch(build_data.DESCRIPTIONS, packages, "en/*.json")) == ["en/data.json"]


def test_fetch_without_npm(packages):
    with pytest.raises(OSError, match=r"npm.*not found: install Node\.js"):
        fetch("some-package@1.0.0", packages, "*")


def test_fetch_fails(monkeypatch, tmp_path):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho a reason >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(npm))
    with pytest.raises(OSError, match=r"could not fetch some-package@1\.0\.0 \(a reason\): check"):
        fetch("some-package@1.0.0", tmp_path / "cache", "*")
    assert not list((tmp_path / "cache").iterdir())


def test_emoji_come_in_order_without_components(packages):
    found = read_emoji(packages, "none", flags=True)
    assert [e.name for e in found] == ["frowning face", "ant", "thumbs up", "triangular flag"]
    assert found[1].aliases == ("ANT", "ant", "emmet")
    assert (found[1].keywords, found[1].group, found[1].subgroup) == (("insect",), "animals-nature", "bug")
    assert [e.name for e in read_emoji(packages, "none", flags=False)][-1] == "thumbs up"


def test_skin_tones(packages):
    assert [e.name for e in read_emoji(packages, "medium", flags=False)][2:] == [
        "thumbs up",
        "thumbs up, medium skin tone",
    ]
    toned = read_emoji(packages, "all", flags=False)[3:]
    assert [(e.name, e.hex, e.tone) for e in toned] == [
        ("thumbs up, light skin tone", "1f44d-1f3fb", 1),
        ("thumbs up, medium skin tone", "1f44d-1f3fd", 3),
    ]


def test_held_out_is_a_share_and_a_function_of_the_emoji():
    many = [emoji("", hex=f"{code:x}") for code in range(4000)]
    held = [e.held_out(0.1) for e in many]
    assert 0.08 < np.mean(held) < 0.12
    assert not any(e.held_out(0.0) for e in many)
    assert all(
        a <= b for a, b in zip(held, (e.held_out(0.2) for e in many))
    )  # a larger share adds emoji and removes none


def icon_set(chars: dict[str, str] | None = None) -> IconSet:
    icons = {
        "icons": {
            "ant": {"body": "<a/>"},
            "flag-for-flag-togo": {"body": "<b/>"},
            "wide": {"body": "<c/>", "width": 32, "left": 4},
        },
        "aliases": {"emmet": {"parent": "ant"}, "tna": {"parent": "ant", "hFlip": True}},
        "height": 16,
    }
    return IconSet(
        {"icons.json": json.dumps(icons).encode(), **({"chars.json": json.dumps(chars).encode()} if chars else {})}
    )


def test_icons_are_found_by_code_points_alone_where_there_is_an_index():
    art = icon_set({"1f41c": "ant", "2639-fe0f": "wide"})
    assert art.find(emoji("anything")) == "ant"
    assert art.find(emoji("anything", "2639")) == "wide"
    assert art.find(emoji("ant", "1f600")) is None


def test_icons_are_found_by_name_or_alias():
    art = icon_set()
    assert art.find(emoji("flag: Togo")) == "flag-for-flag-togo"
    assert art.find(emoji("ANT")) == "ant"
    assert art.find(emoji("bug", aliases=("", "W.I.D.E"))) == "wide"
    assert art.find(emoji("bug")) is None


def test_icons_are_drawn_and_turned_copies_left_out(resvg):
    art = icon_set()
    assert art.draw(emoji("emmet")).size == (SIDE, SIDE)
    assert "<a/>" in resvg[0]
    assert art.draw(emoji("tna")) is None
    assert art.draw(emoji("bug")) is None
    art.draw(emoji("wide"))
    assert 'viewBox="4 0 32 16"' in resvg[1]
    assert 'width="256" height="128"' in resvg[1]


def test_pictures_are_found_by_code_points():
    art = PictureSet({"assets/2639-fe0f.webp": webp((1, 2, 3))})
    assert art.draw(emoji("", "2639")).getpixel((8, 8)) == (1, 2, 3)
    assert art.draw(emoji("", "1f600")) is None


@pytest.mark.usefixtures("resvg")
def test_build(packages, tmp_path):
    out = tmp_path / "out"
    path = build(out, packages, sizes=(8, SIDE), styles=["fluent3d"], held_out=0.5)
    assert path == out / "emoji_16.npz"
    data = load_npz(path)
    # the thumb's picture equals the ant's, the flag's is blank
    assert [data.concepts[i].name for i in data.concept] == ["frowning face", "ant"]
    assert data.images.shape == (2, SIDE, SIDE, 3)
    assert data.images[1, 8, 8].tolist() == [255, 0, 0]
    assert data.styles == ("3d",)
    assert load_npz(out / "emoji_8.npz").images.shape == (2, 8, 8, 3)
    with np.load(path) as file:
        assert [file[key].dtype for key in ("emoji_id", "style_id", "group_id", "split", "meta_json")] == [
            "i4",
            "i1",
            "i1",
            "i1",
            "u1",
        ]
        groups = json.loads(file["meta_json"].tobytes())["groups"]
        assert [groups[i] for i in file["group_id"]] == ["smileys-emotion", "animals-nature"]
    with (out / "pairs.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [(row["style"], row["name"], row["keywords"]) for row in rows] == [
        ("fluent3d", "frowning face", ""),
        ("fluent3d", "ant", "insect"),
    ]
    assert [row["split"] == "held" for row in rows] == data.held_out.tolist()
    assert (
        "Fluent Emoji (3D), Microsoft Corporation; packed by LobeHub. Licence: MIT." in (out / "NOTICE.txt").read_text()
    )
    assert Image.open(out / "contact_16.png").size[0] > 3 * SIDE
    again = build(tmp_path / "again", packages, sizes=(8, SIDE), styles=["fluent3d"], held_out=0.5)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("resvg")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"styles": ["noto", "cubist"]}, "cubist.*choose among noto"),
        ({"styles": []}, "none given"),
        ({"sizes": (0,)}, "8 pixels or more"),
        ({"sizes": ()}, "at least one"),
        ({"skin_tones": "dark"}, "none, medium or all"),
    ],
)
def test_build_refuses(packages, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", packages, **options)


def test_build_without_resvg(packages, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match="pip install resvg_py"):
        build(tmp_path / "out", packages)
