from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from coalescer_fast.training import build_openclipart
from coalescer_fast.training.build_openclipart import build, fetch
from coalescer_fast.training.data import load_npz

HEAD = """<metadata><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
 xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"><cc:Work>
 <dc:title>{title}</dc:title><dc:subject><rdf:Bag>{subjects}</rdf:Bag></dc:subject>
 <cc:license rdf:resource="{licence}"/></cc:Work></rdf:RDF></metadata>"""
SQUARE = '<rect x="10" y="10" width="20" height="20" fill="{colour}"/>'
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"


def write(path, title, colour="red", subjects=(), licence=PUBLIC_DOMAIN, size="100", namespace=True, body=SQUARE):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = HEAD.format(title=title, subjects="".join(f"<rdf:li>{word}</rdf:li>" for word in subjects), licence=licence)
    opening = f'<svg width="{size}" height="{size}"' + ' xmlns="http://www.w3.org/2000/svg"' * namespace
    path.write_text(f"<?xml version='1.0'?>{opening}>{head}{body.format(colour=colour)}</svg>", "utf-8")


@pytest.fixture
def clip_art(tmp_path):
    pytest.importorskip("resvg_py")
    folder = tmp_path / "package" / build_openclipart.INSIDE
    write(folder / "animals" / "big_cats" / "tiger_02.svg", " Tiger_02 ", "orange", ("", "Big_Cat", "hash", "tiger"))
    write(folder / "animals" / "tiger.svg", "tiger", "brown", ("stripes",), size="100pt", namespace=False)
    write(folder / "unsorted" / "pear.svg", "Clipart by Nicu Buculei - piggybank", "green")
    for number in range(9):
        write(folder / "shapes" / f"star-{number}a.svg", "gramastar", f"#0{number}8")
    write(folder / "animals" / "twin.svg", "orange twin", "orange")
    write(folder / "animals" / "paper.svg", "paper", "white")
    write(folder / "animals" / "nothing.svg", "nothing", body="")
    write(folder / "animals" / "gnu.svg", "gnu", "blue", licence="http://creativecommons.org/licenses/GPL/2.0/")
    (folder / "animals" / "cut.svg").write_text("<svg")
    os.symlink("tiger.svg", folder / "animals" / "linked.svg")
    return tmp_path / "package"


def test_build(clip_art, tmp_path, caplog):
    caplog.set_level("INFO")
    path = build(tmp_path / "out", tmp_path / "cache", sizes=(8, 16), source=clip_art, held_out=0.5, progress=False)
    assert path == tmp_path / "out" / "openclipart_16.npz"
    data = load_npz(path)
    named = [data.concepts[i].name for i in data.concept]
    assert named == ["tiger", "tiger", *(f"star {number}a" for number in range(9)), "pear"]
    assert data.images.shape == (12, 16, 16, 3)
    assert np.abs(data.images[0, 1:15, 1:15].astype(int) - [255, 165, 0]).max() < 3  # cropped to what is drawn
    assert np.abs(data.images[1, 1:15, 1:15].astype(int) - [165, 42, 42]).max() < 3
    tiger = data.concepts[0]
    assert (tiger.keywords, tiger.group, tiger.subgroup) == (("big cat", "stripes"), "animals", "big-cats")
    assert data.concepts[-1].group == ""
    assert data.style.tolist() == [-1] * 12
    assert data.held_out[0] == data.held_out[1]  # whole names
    assert 0 < data.held_out.sum() < 12
    assert load_npz(tmp_path / "out" / "openclipart_8.npz").images.shape == (12, 8, 8, 3)
    for count in (
        "12 drawn",
        "1 links to another file",
        "1 damaged",
        "1 of another licence",
        "1 that cannot be drawn",
        "1 blank",
        "1 the same as another",
    ):
        assert count in caplog.text
    assert "public domain" in (tmp_path / "out" / "NOTICE.txt").read_text()
    assert Image.open(tmp_path / "out" / "contact_16.png").width > 12 * 16


def test_two_builds_give_the_same_bits(clip_art, tmp_path):
    paths = [build(tmp_path / name, tmp_path / "cache", source=clip_art, progress=False) for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    folder = clip_art / build_openclipart.INSIDE
    assert build(tmp_path / "c", tmp_path / "cache", source=folder).read_bytes() == paths[0].read_bytes()


def test_text_is_not_drawn(clip_art, tmp_path):
    """Its fonts are those of the machine."""
    write(clip_art / build_openclipart.INSIDE / "text.svg", "text", body='<text x="10" y="40">some words</text>')
    data = load_npz(build(tmp_path / "out", tmp_path / "cache", source=clip_art, progress=False))
    assert "text" not in {c.name for c in data.concepts}


@pytest.mark.usefixtures("clip_art")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (4,)}, "8 pixels or more"),
        ({"source": "absent"}, "no folder .*absent.*openclipart-svg"),
        ({"source": "empty"}, "no SVG file in .*empty can be drawn"),
    ],
)
def test_build_refuses(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(tmp_path / "out", tmp_path / "cache", **options)


def test_fetch_without_apt(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"apt-get and dpkg-deb not found.*give --source"):
        fetch(tmp_path)


def command(folder, name, script):
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_fetch(tmp_path, monkeypatch):
    """Once, into the cache; and nothing stays of what fails."""
    programs, cache = tmp_path / "bin", tmp_path / "cache"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    command(programs, "apt-get", "echo 'E: Unable to locate package' >&2; exit 100")
    command(programs, "dpkg-deb", 'mkdir -p "$3" && cp "$2" "$3/unpacked"')
    with pytest.raises(
        OSError, match=r"could not fetch openclipart-svg \(E: Unable to locate package\): run 'apt-get up"
    ):
        fetch(cache)
    assert list(cache.iterdir()) == []
    command(programs, "apt-get", 'echo "$@" > openclipart-svg_1_all.deb')
    assert fetch(cache) == cache / "openclipart-svg"
    assert (cache / "openclipart-svg" / "unpacked").read_text() == "download openclipart-svg\n"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert fetch(cache) == cache / "openclipart-svg"
    assert np.array_equal([p.name for p in cache.iterdir()], ["openclipart-svg"])
