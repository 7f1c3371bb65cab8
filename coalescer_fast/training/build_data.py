"""The emoji data set: freely licensed art sets with the names and keywords of Unicode CLDR, all from npm packages.

`build` draws every emoji in every art style on white, and writes for each picture side S ``emoji_S.npz`` with

    images     uint8 (N, S, S, 3)
    emoji_id   int32 (N,)   row of meta["emoji"]: hex, char, name, keywords, group, subgroup, tone
    style_id   int8  (N,)   row of meta["styles"]: id, word (what a prompt calls it), licence, attribution, package
    group_id   int8  (N,)   row of meta["groups"]
    split      int8  (N,)   1 where the emoji is held out of training
    meta_json  uint8 (M,)   UTF-8 JSON

and a contact sheet ``contact_S.png``; once for all sizes ``pairs.tsv``, a line for each picture, and ``NOTICE.txt``,
the attribution that everything derived from the pictures must carry. Package versions are pinned: two builds of one
size are bit-identical.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .. import files
from .pictures import on_white, sheet

logger = logging.getLogger(__name__)

DESCRIPTIONS = "emojibase-data@17.0.0"
ALIASES = "emoji-datasource@16.0.0"


@dataclass(frozen=True)
class Style:
    """An art set.

    Attributes:
        package: npm package, ``name@version``.
        licence: SPDX identifier.
        word: what a prompt calls it.
        attribution: who made it.
    """

    package: str
    licence: str
    word: str
    attribution: str


STYLES = {
    "noto": Style("@iconify-json/noto@1.2.9", "Apache-2.0", "noto", "Noto Emoji, Google LLC"),
    "twemoji": Style(
        "@iconify-json/twemoji@1.2.5",
        "CC-BY-4.0",
        "twemoji",
        "Twemoji, Copyright Twitter, Inc and other contributors; jdecked/twemoji",
    ),
    "fluent": Style(
        "@iconify-json/fluent-emoji-flat@1.2.6", "MIT", "flat", "Fluent Emoji (flat), Microsoft Corporation"
    ),
    "fluent3d": Style(
        "@lobehub/fluent-emoji-3d@1.1.0", "MIT", "3d", "Fluent Emoji (3D), Microsoft Corporation; packed by LobeHub"
    ),
    "blob": Style("@iconify-json/noto-v1@1.2.5", "Apache-2.0", "blob", "Noto Emoji v1 ('blobs'), Google LLC"),
    "fxemoji": Style("@iconify-json/fxemoji@1.2.2", "Apache-2.0", "firefox", "FxEmojis, Mozilla Foundation"),
    "emojione": Style(
        "@iconify-json/emojione@1.2.3",
        "CC-BY-4.0",
        "emojione",
        "EmojiOne 2.3 / EmojiTwo, Ranks.com Inc and EmojiTwo contributors",
    ),
    "openmoji": Style("@iconify-json/openmoji@1.2.29", "CC-BY-SA-4.0", "openmoji", "OpenMoji, HfG Schwaebisch Gmuend"),
}
DEFAULT_STYLES = tuple(
    name for name, style in STYLES.items() if style.licence != "CC-BY-SA-4.0"
)  # share-alike art only where asked for

SKIN_TONES = ("", "light", "medium-light", "medium", "medium-dark", "dark")
RENDER_SIZE = 256  # vector art is drawn at this width, then reduced like all other pictures
# FxEmojis has no code points and is matched by name, which is wrong for waving hand, person bowing and the UP! button.
MISMATCHED = {("fxemoji", "1f44b"), ("fxemoji", "1f647"), ("fxemoji", "1f199")}


@dataclass(frozen=True)
class Emoji:
    """An emoji and how CLDR describes it.

    Attributes:
        hex: code points in hexadecimal, joined by dashes.
        char: the emoji itself.
        name, keywords, group, subgroup: CLDR's.
        tone: index into `SKIN_TONES`.
        order: Unicode's.
        aliases: other names that art sets know it by.
    """

    hex: str
    char: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    tone: int
    order: int
    aliases: tuple[str, ...] = ()

    def described(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("hex", "char", "name", "keywords", "group", "subgroup", "tone")}

    def held_out(self, share: float) -> bool:
        """Whether the emoji is among the ``share`` that is held out: a function of its code points alone."""
        return is_held_out(self.hex, share)


def is_held_out(key: str, share: float) -> bool:
    """Whether ``key`` is among the ``share`` of all keys that is held out."""
    digest = hashlib.sha1(f"split{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < share


def fetch(package: str, cache: Path, *patterns: str) -> dict[str, bytes]:
    """Fetch files of an npm package.

    Args:
        package: ``name@version``.
        cache: folder in which the package's tarball stays.
        patterns: of the paths that are read.

    Returns:
        Contents by path.

    Raises:
        OSError: if npm is missing or cannot fetch the package.
    """
    tarball = cache / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not tarball.exists():
        npm_pack(package, tarball)
    files = {}
    with tarfile.open(tarball) as tar:
        for member in tar:
            path = member.name.partition("/")[2]  # an npm tarball has one folder at its top
            content = tar.extractfile(member) if any(fnmatchcase(path, pattern) for pattern in patterns) else None
            if content is not None:
                files[path] = content.read()
    return files


def npm_pack(package: str, tarball: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            "npm, which fetches the emoji packages, was not found: install Node.js, or copy a filled cache folder here"
        )
    tarball.parent.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s", package)
    with tempfile.TemporaryDirectory(dir=tarball.parent) as folder:
        done = subprocess.run(
            [npm, "pack", "--silent", "--pack-destination", folder, package], capture_output=True, text=True
        )
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode or not packed:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            advice = "check the network and npm's registry setting, then run again"
            raise OSError(f"npm could not fetch {package} ({reason}): {advice}")
        os.replace(packed[0], tarball)


def code_points(text: str) -> str:
    """Code points in hexadecimal joined by dashes, in lower case and without variation selectors."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['\u2019]", "", name.lower())).strip("-")


def read_emoji(cache: Path, skin_tones: str, flags: bool) -> list[Emoji]:
    """All emoji in Unicode's order; skin_tones and flags as in `build`."""
    files = fetch(DESCRIPTIONS, cache, "en/data.json", "meta/groups.json")
    names = json.loads(files["meta/groups.json"])
    aliases = {
        code_points(entry["unified"]): tuple(sorted({entry["name"] or "", *entry["short_names"]}))
        for entry in json.loads(fetch(ALIASES, cache, "emoji.json")["emoji.json"])
    }
    out = []
    for entry in json.loads(files["en/data.json"]):
        group = names["groups"][str(entry["group"])] if "group" in entry else "component"
        if group == "component" or (group == "flags" and not flags):
            continue
        key = code_points(entry["hexcode"])
        emoji = Emoji(
            hex=key,
            char=entry["emoji"],
            name=entry["label"],
            keywords=tuple(entry.get("tags", ())),
            group=group,
            subgroup=names["subgroups"][str(entry["subgroup"])],
            tone=0,
            order=entry.get("order", 0),
            aliases=aliases.get(key, ()),
        )
        out.append(emoji)
        for skin in entry.get("skins", ()):
            tone = skin.get("tone")  # a list where two people have a tone each
            if isinstance(tone, int) and (skin_tones == "all" or (skin_tones == "medium" and tone == 3)):
                out.append(
                    replace(
                        emoji,
                        hex=code_points(skin["hexcode"]),
                        char=skin["emoji"],
                        name=f"{emoji.name}, {SKIN_TONES[tone]} skin tone",
                        tone=tone,
                        order=skin.get("order", 0),
                        aliases=(),
                    )
                )
    return sorted(out, key=lambda emoji: emoji.order)


class IconSet:
    """Vector art in Iconify's JSON format, found by code points where the set has an index of them, else by name."""

    def __init__(self, files: dict[str, bytes]):
        data = json.loads(files["icons.json"])
        self.icons, self.aliases = data["icons"], data.get("aliases", {})
        self.size = data.get("width", 16), data.get("height", 16)
        self.by_code_points = {
            code_points(key): name for key, name in json.loads(files.get("chars.json", b"{}")).items()
        }
        self.by_letters = {letters(name): name for name in [*self.aliases, *self.icons]}

    def find(self, emoji: Emoji) -> str | None:
        if self.by_code_points:
            return self.by_code_points.get(emoji.hex)
        name = slug(emoji.name)
        for candidate in (name, name.replace("flag-", "flag-for-flag-"), name.replace("flag-", "flag-for-")):
            if candidate in self.icons or candidate in self.aliases:
                return candidate
        known = (self.by_letters.get(letters(name)) for name in (emoji.name, *emoji.aliases) if name)
        return next((name for name in known if name), None)

    def draw(self, emoji: Emoji) -> Image.Image | None:
        name = self.find(emoji)
        while name in self.aliases:
            alias = self.aliases[name]
            if alias.keys() - {"parent"}:  # a turned or mirrored copy of another emoji's picture
                return None
            name = alias["parent"]
        return None if name is None else self.render(self.icons[name])

    def render(self, icon: dict[str, Any]) -> Image.Image:
        import resvg_py

        width, height = icon.get("width", self.size[0]), icon.get("height", self.size[1])
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            f' viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}"'
            f' width="{RENDER_SIZE}" height="{RENDER_SIZE * height / width:g}">{icon["body"]}</svg>'
        )
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))))


class PictureSet:
    """Pictures in files named by code points."""

    def __init__(self, files: dict[str, bytes]):
        self.by_code_points = {code_points(PurePosixPath(path).stem): files[path] for path in sorted(files)}

    def draw(self, emoji: Emoji) -> Image.Image | None:
        content = self.by_code_points.get(emoji.hex)
        return None if content is None else Image.open(io.BytesIO(content))


def open_style(name: str, cache: Path) -> IconSet | PictureSet:
    package = STYLES[name].package
    if package.startswith("@iconify-json/"):
        return IconSet(fetch(package, cache, "icons.json", "chars.json"))
    return PictureSet(fetch(package, cache, "assets/*.webp"))


def draw_all(
    emoji: Sequence[Emoji], styles: Sequence[str], sizes: Sequence[int], cache: Path, progress: bool = True
) -> tuple[list[tuple[int, int]], dict[int, np.ndarray]]:
    """Draw all emoji in all styles.

    Blank pictures are left out, and pictures that equal, at the largest size, an earlier one of another emoji.

    Returns:
        Indices (emoji, style) of the N pictures that are kept, and the pictures, uint8 (N, S, S, 3), by size S.
    """
    rows: list[tuple[int, int]] = []
    pictures: dict[int, list[np.ndarray]] = {size: [] for size in sizes}
    owner: dict[bytes, str] = {}
    with tqdm(total=len(styles) * len(emoji), desc="drawing", unit="", disable=not progress, delay=1.0) as bar:
        for style, name in enumerate(styles):
            art, outcome = open_style(name, cache), Counter[str]()
            for i, one in enumerate(emoji):
                bar.update()
                picture = None if (name, one.hex) in MISMATCHED else art.draw(one)
                if picture is None:
                    outcome["absent"] += 1
                    continue
                reduced = {size: on_white(picture, size) for size in sizes}
                probe = reduced[max(sizes)]
                if probe.std() < 2:
                    outcome["blank"] += 1
                elif owner.setdefault(hashlib.sha1(probe.tobytes()).digest(), one.hex) != one.hex:
                    outcome["the same as another emoji"] += 1
                else:
                    outcome["drawn"] += 1
                    rows.append((i, style))
                    for size in sizes:
                        pictures[size].append(reduced[size])
            logger.info("%s: %s", name, ", ".join(f"{count} {what}" for what, count in outcome.most_common()))
    if not rows:
        raise ValueError(f"none of the art styles {', '.join(styles)} has a picture: ask for other styles")
    return rows, {size: np.stack(pictures[size]) for size in sizes}


def contact_sheet(rows: Sequence[tuple[int, int]], images: np.ndarray, styles: int, count: int = 96) -> Image.Image:
    """A random choice of emoji, three in a row, each in all styles; white where a style does not have it."""
    at = {row: n for n, row in enumerate(rows)}
    emoji = sorted({i for i, _ in rows})
    chosen = sorted(random.Random(7).sample(emoji, min(count, len(emoji))))
    white = np.full_like(images[0], 255)
    cells = [images[at[i, style]] if (i, style) in at else white for i in chosen for style in range(styles)]
    return sheet([Image.fromarray(cell) for cell in cells], columns=3 * styles, scale=1, pad=2)


def build(
    out: Path,
    cache: Path,
    sizes: Sequence[int] = (64,),
    styles: Sequence[str] = DEFAULT_STYLES,
    skin_tones: str = "none",
    flags: bool = True,
    held_out: float = 0.03,
    progress: bool = True,
) -> Path:
    """Build the data set.

    Args:
        out: folder that it is written to.
        cache: folder of the fetched packages (55 MB); what it already holds is not fetched again.
        sizes: sides of the pictures, each of which gives a file.
        styles: names out of `STYLES`.
        skin_tones: "none", "medium" or "all": the skin tones that become emoji of their own.
        flags: whether to keep national and other flags.
        held_out: share of the emoji whose pictures are marked as held out.
        progress: show a bar.

    Returns:
        The file of the largest size.

    Raises:
        ValueError: for an unknown style, size or skin tone.
        ImportError: without the package resvg_py.
        OSError: if npm fails, or a file cannot be written.
    """
    styles = list(dict.fromkeys(styles))
    if not styles or set(styles) - set(STYLES):
        unknown = ", ".join(sorted(set(styles) - set(STYLES))) or "none given"
        raise ValueError(f"unknown art styles ({unknown}): choose among {', '.join(STYLES)}")
    check_sizes(sizes)
    if skin_tones not in ("none", "medium", "all"):
        raise ValueError(f"unknown skin tones {skin_tones!r}: choose none, medium or all")
    require_resvg()
    out, cache = Path(out), Path(cache)
    out.mkdir(parents=True, exist_ok=True)

    emoji = read_emoji(cache, skin_tones, flags)
    groups = sorted({one.group for one in emoji})
    logger.info("%d emoji in %d groups", len(emoji), len(groups))
    rows, pictures = draw_all(emoji, styles, sizes, cache, progress)

    meta = {
        "emoji": [one.described() for one in emoji],
        "groups": groups,
        "styles": [
            {
                "id": name,
                "word": style.word,
                "licence": style.licence,
                "attribution": style.attribution,
                "package": style.package,
            }
            for name, style in ((name, STYLES[name]) for name in styles)
        ],
        "text": {"package": DESCRIPTIONS, "licence": "MIT AND Unicode-3.0"},
    }
    emoji_id = np.array([i for i, _ in rows], np.int32)
    arrays: dict[str, Any] = {
        "emoji_id": emoji_id,
        "style_id": np.array([style for _, style in rows], np.int8),
        "group_id": np.array([groups.index(emoji[i].group) for i in emoji_id], np.int8),
        "split": np.array([emoji[i].held_out(held_out) for i in emoji_id], np.int8),
        "meta_json": np.frombuffer(json.dumps(meta, ensure_ascii=False).encode("utf-8"), np.uint8),
    }
    path = write_pictures(out, "emoji", pictures, arrays, lambda images: contact_sheet(rows, images, len(styles)))
    write_pairs(out / "pairs.tsv", [(emoji[i], styles[style]) for i, style in rows], held_out)
    write_notice(out / "NOTICE.txt", styles)
    return path


def write_pictures(
    out: Path,
    name: str,
    pictures: Mapping[int, np.ndarray],
    arrays: Mapping[str, Any],
    contact: Callable[[np.ndarray], Image.Image],
) -> Path:
    """Write ``name_S.npz`` and the contact sheet of every size S, and return the file of the largest."""
    for size, images in pictures.items():
        path = out / f"{name}_{size}.npz"
        with files.writing(path) as file:
            np.savez_compressed(file, images=images, **arrays)
        files.write_picture(out / f"contact_{size}.png", contact(images))
        concepts = len(np.unique(arrays["emoji_id"]))
        held_out = arrays["split"].sum()
        logger.info("%s: %d pictures of %d names, %d held out", path, len(images), concepts, held_out)
    return out / f"{name}_{max(pictures)}.npz"


def write_pairs(path: Path, pairs: Sequence[tuple[Emoji, str]], held_out: float) -> None:
    text = io.StringIO(newline="")
    table = csv.writer(text, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
    table.writerow(["row", "style", "hex", "name", "keywords", "group", "subgroup", "split"])
    for row, (one, style) in enumerate(pairs):
        split = "held" if one.held_out(held_out) else "train"
        table.writerow([row, style, one.hex, one.name, "|".join(one.keywords), one.group, one.subgroup, split])
    files.write_text(path, text.getvalue())


def write_notice(path: Path, styles: Sequence[str]) -> None:
    lines = ["Pictures (reduced in size and put on a white background) from:"]
    for style in (STYLES[name] for name in styles):
        lines.append(f"- {style.attribution}. Licence: {style.licence}. Taken from npm {style.package}.")
    lines.append(
        f"Names, keywords and groups: Unicode CLDR (Unicode-3.0), as packed in npm {DESCRIPTIONS} (MIT, Miles Johnson)."
    )
    files.write_text(path, "\n".join(lines) + "\n")


def check_sizes(sizes: Sequence[int]) -> None:
    if not sizes or min(sizes) < 8:
        raise ValueError(f"picture sizes {list(sizes)}: give at least one, of 8 pixels or more")


def require_resvg() -> None:
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "drawing the vector art sets needs the package resvg_py: run 'pip install resvg_py'"
        ) from error
