"""The clip art of openclipart.org as a data set: Debian's package openclipart-svg, drawings in the public domain.

`build` draws every SVG file on white, cropped to what it shows, and writes files of the format of `build_data`, which
calls a name an emoji. Drawings have no styles. The name is the file's title, or the file's own name where the title is
that of a collection; the folders are group and subgroup. Whole names are held out. Fonts are not used, for they differ
between machines: two builds from the same files are bit-identical.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .. import files
from .build_data import check_sizes, is_held_out, require_resvg, write_pictures
from .pictures import on_white, sheet

logger = logging.getLogger(__name__)

PACKAGE, INSIDE = "openclipart-svg", "usr/share/openclipart/svg"
NOTICE = f"""Pictures (reduced in size and put on a white background) from:
- The Open Clip Art Library, https://openclipart.org, whose contributors dedicated them to the public domain. Taken from
  Debian's package {PACKAGE}.
"""
SVG, RDF = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
DC, CC = "{http://purl.org/dc/elements/1.1/}", "{http://web.resource.org/cc/}"
RENDER_WIDTH = 512  # before what is drawn is cropped
DPI = 90  # in which the programs that drew them gave lengths in pt, mm and cm
MOST_OF_A_TITLE = 8  # files; a title that more files have is that of a collection
LONGEST_KEYWORD = 30
MEANINGLESS = {"", "hash", "unsorted"}  # what the library's own programs wrote as keywords and folders


@dataclass
class Name:
    """What some of the drawings show.

    Attributes:
        name: of all of them, in lower case.
        group, subgroup: folders of the first.
        keywords: of any of them.
    """

    name: str
    group: str
    subgroup: str
    keywords: set[str] = field(default_factory=set)

    def described(self) -> dict[str, Any]:
        keywords = sorted(self.keywords - {self.name})
        return {"name": self.name, "keywords": keywords, "group": self.group, "subgroup": self.subgroup}


@dataclass(frozen=True)
class Drawing:
    """A file.

    Attributes:
        path: below the folder of them all.
        svg: its root element.
        title: as the file says, "" if it does not.
        keywords: its subjects.
        licence: its address, "" if the file does not say.
    """

    path: Path
    svg: ET.Element
    title: str
    keywords: tuple[str, ...]
    licence: str

    def draw(self) -> Image.Image:
        """The drawing, cropped to what is not transparent. Raises ValueError if there is nothing, or it is damaged."""
        import resvg_py

        if not self.svg.tag.startswith("{"):
            self.svg.set("xmlns", SVG)
        text = ET.tostring(self.svg, encoding="unicode")
        content = resvg_py.svg_to_bytes(svg_string=text, width=RENDER_WIDTH, dpi=DPI, skip_system_fonts=True)
        picture = Image.open(io.BytesIO(bytes(content))).convert("RGBA")
        box = picture.getchannel("A").getbbox()
        if box is None:
            raise ValueError("nothing is drawn")
        return picture.crop(box)


def build(
    out: Path,
    cache: Path,
    sizes: Sequence[int] = (64,),
    source: Path | None = None,
    held_out: float = 0.03,
    progress: bool = True,
) -> Path:
    """Build the data set.

    Args:
        out: folder that it is written to.
        cache: folder that the package is unpacked in; what it already holds is not fetched again.
        sizes: sides of the pictures, each of which gives a file.
        source: folder of the unpacked package, or of any SVG files, instead of fetching it.
        held_out: share of the names whose pictures are marked as held out.
        progress: show a bar.

    Returns:
        The file of the largest size.

    Raises:
        ValueError: for a wrong size, or if there is nothing to draw.
        ImportError: without the package resvg_py.
        OSError: if the package cannot be fetched, or a file cannot be written.
    """
    check_sizes(sizes)
    require_resvg()
    out = Path(out)
    folder = Path(source) if source is not None else fetch(Path(cache))
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give that of the unpacked package {PACKAGE}")
    folder = folder / INSIDE if (folder / INSIDE).is_dir() else folder
    drawings, outcome = read(folder)
    out.mkdir(parents=True, exist_ok=True)
    kept, pictures = draw_all(drawings, sizes, outcome, progress)
    logger.info("%s: %s", folder, ", ".join(f"{count} {what}" for what, count in outcome.most_common()))
    if not kept:
        raise ValueError(f"no SVG file in {folder} can be drawn: give the folder of the unpacked package {PACKAGE}")

    names: dict[str, Name] = {}
    rows = []
    for drawing, called in zip(kept, names_of(kept)):
        parts = [part.replace("_", "-") for part in drawing.path.parts[:-1] if part not in MEANINGLESS]
        group, subgroup = [*parts, "", ""][:2]
        name = names.setdefault(called, Name(called, group, subgroup))
        name.keywords.update(drawing.keywords)
        rows.append(name)
    known, groups = list(names), sorted({name.group for name in rows})
    meta = {
        "emoji": [name.described() for name in names.values()],
        "groups": groups,
        "styles": [],
        "files": [drawing.path.as_posix() for drawing in kept],
        "text": {"package": PACKAGE, "licence": "public domain"},
    }
    index = {name: i for i, name in enumerate(known)}
    arrays: dict[str, Any] = {
        "emoji_id": np.array([index[name.name] for name in rows], np.int32),
        "style_id": np.full(len(rows), -1, np.int8),
        "group_id": np.array([groups.index(name.group) for name in rows], np.int8),
        "split": np.array([is_held_out(name.name, held_out) for name in rows], np.int8),
        "meta_json": np.frombuffer(json.dumps(meta, ensure_ascii=False).encode("utf-8"), np.uint8),
    }
    path = write_pictures(
        out, "openclipart", pictures, arrays, lambda images: contact_sheet(images, [name.name for name in rows])
    )
    files.write_text(out / "NOTICE.txt", NOTICE)
    return path


def fetch(cache: Path) -> Path:
    """Fetch and unpack the package, which takes no rights of an administrator.

    Returns:
        The folder that it is unpacked in.

    Raises:
        OSError: if apt-get or dpkg-deb is missing or fails.
    """
    folder = cache / PACKAGE
    if folder.is_dir():
        return folder
    source = f"give --source, a folder that Debian's package {PACKAGE} is unpacked in"
    if missing := [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]:
        raise FileNotFoundError(f"{' and '.join(missing)} not found, to fetch {PACKAGE} with: {source}")
    fix = f"run 'apt-get update' and try again, or {source}"
    cache.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s", PACKAGE)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        run(["apt-get", "download", PACKAGE], name, fix)
        packages = list(Path(name).glob("*.deb"))
        if not packages:
            raise OSError(f"apt-get fetched no {PACKAGE}: {fix}")
        run(["dpkg-deb", "-x", packages[0].name, PACKAGE], name, fix)
        os.replace(Path(name) / PACKAGE, folder)
    return folder


def run(command: Sequence[str], folder: str, fix: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise OSError(f"{command[0]} could not fetch {PACKAGE} ({reason}): {fix}")


def read(folder: Path) -> tuple[list[Drawing], Counter[str]]:
    """The SVG files below a folder, in the order of their names, and how many were left out for which reason."""
    drawings, outcome = [], Counter[str]()
    for path in sorted(folder.rglob("*.svg")):
        if path.is_symlink():
            outcome["links to another file"] += 1
            continue
        try:
            drawing = read_drawing(path, folder)
        except (ET.ParseError, LookupError, ValueError):  # LookupError: of an unknown encoding
            outcome["damaged"] += 1
            continue
        if drawing.licence and "publicdomain" not in drawing.licence.lower():
            outcome["of another licence"] += 1
        else:
            drawings.append(drawing)
    return drawings, outcome


def read_drawing(path: Path, folder: Path) -> Drawing:
    svg = ET.parse(path).getroot()
    work = next(svg.iter(f"{CC}Work"), ET.Element("none"))
    licence = work.find(f"{CC}license")
    words = (tidy(item.text or "") for item in work.iter(f"{RDF}li"))
    return Drawing(
        path=path.relative_to(folder),
        svg=svg,
        title=tidy(work.findtext(f"{DC}title") or ""),
        keywords=tuple(word for word in words if word not in MEANINGLESS and len(word) <= LONGEST_KEYWORD),
        licence="" if licence is None else licence.get(f"{RDF}resource", ""),
    )


def tidy(text: str) -> str:
    """In lower case, with one space between words."""
    return " ".join(text.lower().replace("_", " ").split())


def names_of(drawings: Sequence[Drawing]) -> list[str]:
    """What each drawing shows: its title without a number at the end, or its file's name."""
    files_of = Counter(drawing.title for drawing in drawings)
    names = []
    for drawing in drawings:
        title = drawing.title
        if not title or title.startswith("clipart by ") or files_of[title] > MOST_OF_A_TITLE:
            title = tidy(drawing.path.stem.replace("-", " "))
        short = re.sub(r"[\s\d.,#]+$", "", title)
        names.append(short if len(re.findall(r"[^\W\d]", short)) > 2 else title)
    return names


def draw_all(
    drawings: Sequence[Drawing], sizes: Sequence[int], outcome: Counter[str], progress: bool
) -> tuple[list[Drawing], dict[int, np.ndarray]]:
    """Draw all, leave out what cannot be drawn, is blank or equals an earlier one, and count that in ``outcome``.

    Returns:
        The drawings that are kept, and their pictures, uint8 (N, S, S, 3), by size S.
    """
    kept: list[Drawing] = []
    pictures: dict[int, list[np.ndarray]] = {size: [] for size in sizes}
    seen: set[bytes] = set()
    for drawing in tqdm(drawings, desc="drawing", unit="", disable=not progress, delay=1.0):
        try:
            picture = drawing.draw()
        except ValueError:
            outcome["that cannot be drawn"] += 1
            continue
        reduced = {size: on_white(picture, size) for size in sizes}
        probe = reduced[max(sizes)]
        digest = hashlib.sha1(probe.tobytes()).digest()
        if probe.std() < 2:
            outcome["blank"] += 1
        elif digest in seen:
            outcome["the same as another"] += 1
        else:
            outcome["drawn"] += 1
            seen.add(digest)
            kept.append(drawing)
            for size in sizes:
                pictures[size].append(reduced[size])
    return kept, {size: np.stack(parts) for size, parts in pictures.items() if parts}


def contact_sheet(images: np.ndarray, names: Sequence[str], count: int = 160) -> Image.Image:
    """A random choice of drawings with their names."""
    chosen = sorted(random.Random(7).sample(range(len(images)), min(count, len(images))))
    pictures = [Image.fromarray(images[i]) for i in chosen]
    return sheet(pictures, [names[i] for i in chosen], columns=16, scale=1)
