"""A few pictures in the files of Fashion-MNIST."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

LABELS = {"train": [*range(10)] * 4, "t10k": [*range(10)] * 2}


def idx(content: np.ndarray) -> bytes:
    """The bytes of an idx file of bytes."""
    return bytes((0, 0, 8, content.ndim)) + struct.pack(f">{content.ndim}I", *content.shape) + content.tobytes()


def write_fashion(folder: Path) -> np.ndarray:
    """Write the four files, those of the training gzipped, and return all pictures (N, 28, 28)."""
    rng, pictures = np.random.default_rng(0), []
    for split, labels in LABELS.items():
        pictures.append(rng.integers(0, 256, (len(labels), 28, 28), np.uint8))
        for name, content in (("images-idx3", pictures[-1]), ("labels-idx1", np.array(labels, np.uint8))):
            if split == "train":
                (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(idx(content)))
            else:
                (folder / f"t10k-{name}-ubyte").write_bytes(idx(content))
    return np.concatenate(pictures)
