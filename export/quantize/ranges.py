"""The file ``ranges.json`` of an int8 artefact: what was calibrated, on which prompts, and the ranges."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from coalescer_fast.runtime.engines import sealed
from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.manifest import Manifest
from coalescer_fast.schema import Sha256, one_of, table

from .scales import Range

FILE = "ranges.json"
FORMAT = 1
Which = Annotated[str, one_of("input", "output")]


@dataclass(frozen=True)
class Ranges:
    """Ranges of the tensors of a graph.

    Attributes:
        graph: `graph_sha256` of the float graph.
        method: How the ranges were cut: "max", "percentile 99.999" or "entropy".
        seed: Of the noise, and of the choice of prompts.
        prompts: The prompts.
        layers: Smallest and largest value of the "input", and for a CPU of the "output", of each layer.
        format: Version of this schema.
    """

    graph: Sha256
    method: str
    seed: int
    prompts: tuple[str, ...]
    layers: dict[str, dict[Which, Range]]
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of the file."""
        return sealed.dumps(self, indent=1, ensure_ascii=False)

    @property
    def sha256(self) -> str:
        """The hash that ends the file."""
        return sealed.digest(table(self))

    def check_graph(self, source: Artefact, path: Path | str) -> None:
        """Raise ValueError unless it is the graph of this artefact that was calibrated; ``path`` is for the message."""
        if self.graph != (mine := graph_sha256(source.manifest)):
            theirs = f"{path} holds the ranges of another graph ({self.graph[:12]})"
            fix = "leave --ranges away to calibrate this one"
            raise ValueError(f"{theirs} than that of {source.folder} ({mine[:12]}): {fix}")


def read_ranges(path: Path) -> Ranges:
    """Read a file with ranges.

    Raises:
        ValueError: If `Ranges.to_json` did not write it.
    """
    fix = "leave --ranges away to calibrate anew"
    try:
        content = sealed.parse(path.read_text("utf-8", errors="replace"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {fix}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} holds no ranges in format {FORMAT}: give the {FILE} of an int8 artefact")
    try:
        return sealed.build(sealed.unseal(content, Ranges), Ranges)
    except ValueError as error:
        raise ValueError(f"{path} {error}: {fix}") from error


def graph_sha256(manifest: Manifest) -> str:
    """The hash of the graph's file, or if its weights are in a file of their own, of both hashes."""
    hashes = [file.sha256 for name, file in sorted(manifest.files.items()) if name.startswith(manifest.graph)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
