"""The tables by which prompts become the inputs of a graph, as arrays that numpy reads, for a program without torch.

A generator's artefact has them beside its graph; `examples/without_torch.py` reads them.
"""

from __future__ import annotations

import io
from importlib.resources import files
from pathlib import Path

import numpy as np

from coalescer_fast import files as disk
from coalescer_fast import models
from coalescer_fast.models import DescriptionEncoder

FILE = "prompts.npz"


def write_tables(encoder: DescriptionEncoder, folder: Path) -> None:
    """Write the encoder's tables into a folder, under the names of its buffers; its art styles, and the names of emoji.

    Texts are UTF-8 in uint8, their lines joined by newlines; a line of ``emoji`` is an emoji, a tab and its name.

    Args:
        encoder: of the pipeline.
        folder: where `FILE` goes, whose bytes depend on the tables alone.
    """
    tables = {name: buffer.cpu().numpy() for name, buffer in encoder.named_buffers()}
    texts = {
        "styles": "\n".join(encoder.config.styles),
        "emoji": files(models).joinpath("emoji.tsv").read_text("utf-8").rstrip("\n"),
    }
    tables |= {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
    file = io.BytesIO()
    np.savez(file, **tables)
    disk.write_bytes(folder / FILE, file.getvalue())
