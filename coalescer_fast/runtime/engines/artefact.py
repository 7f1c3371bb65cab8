"""An exported artefact: a folder with a graph and a manifest. What is not listed in the manifest does not run.

    DIR/manifest.json   a `Manifest`, with the SHA-256 of itself and of every other file
    DIR/model.onnx      the graph (or an engine) with its weights, which may be in model.onnx.data instead

A folder of such folders, one for each part of a model, is accepted wherever an artefact is.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ... import files as disk
from .hashes import network_hashes
from .manifest import BATCH, KINDS, MANIFEST, TOOL, Manifest

if TYPE_CHECKING:
    from ...pipeline import CoalescerPipeline

LARGEST_MANIFEST = 1 << 24  # bytes


@dataclass(frozen=True)
class Artefact:
    """An exported artefact.

    Attributes:
        folder: The folder.
        manifest: What its manifest says.
    """

    folder: Path
    manifest: Manifest

    @property
    def graph(self) -> Path:
        """The file that the engine opens."""
        return self.folder / self.manifest.graph

    @property
    def fix(self) -> str:
        """What an error message tells the user to do: how to build this artefact again."""
        return f"build it again with: {shlex.join([TOOL, *self.manifest.command, '-o', str(self.folder), '--force'])}"

    def check_files(self) -> None:
        """Raise ValueError unless every file is as it was written, and the graph reads no other file."""
        for name, file in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{self.folder} is incomplete, {name} is missing: {self.fix}")
            if not is_inside(path, self.folder):
                where = f"{path} is a link that leads out of its folder"
                raise ValueError(f"{where}: put the file itself there, or {self.fix}")
            if (size := path.stat().st_size) != file.bytes:
                raise ValueError(f"{path} has {size} bytes where its manifest says {file.bytes}: {self.fix}")
            if file_sha256(path) != file.sha256:
                reason = "was changed after it was written, its SHA-256 is not the manifest's"
                raise ValueError(f"{path} {reason}: {self.fix}")
        if self.manifest.engine == "onnx":
            for name in _external_files(self.graph):
                if name not in self.manifest.files:
                    reason = f"reads {name!r:.80}, for which its manifest does not vouch"
                    raise ValueError(f"{self.graph} {reason}: {self.fix}")

    def check_ports(self, inputs: Sequence[tuple[str, str, int]], outputs: Sequence[tuple[str, str, int]]) -> None:
        """Compare the inputs and outputs of the opened graph with those in the manifest.

        Args:
            inputs: Name, dtype and number of dimensions of each input.
            outputs: The same of each output.

        Raises:
            ValueError: If they differ.
        """
        m = self.manifest
        for what, ports, found in (("inputs", m.inputs, inputs), ("outputs", m.outputs, outputs)):
            if [(port.name, port.dtype, len(port.shape)) for port in ports] != list(found):
                said = ", ".join(f"{name}, {dtype}" for name, dtype, _ in found)
                raise ValueError(f"{self.graph} has other {what} ({said:.200}) than its manifest says: {self.fix}")

    def check_weights(self, pipe: CoalescerPipeline) -> None:
        """Raise ValueError unless the graph was made from this pipeline's networks as they are now."""
        now = network_hashes(pipe, self.manifest.kind)
        for network, digest in self.manifest.weights.items():
            if now[network] != digest:
                made, here = f"{self.manifest.model!r}, {digest[:12]}", now[network][:12]
                what = f"other weights of the {network} or settings of its layers ({made}) than the pipeline's ({here})"
                raise ValueError(f"{self.folder} was exported from {what}: load that model, or {self.fix}")

    def check_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Raise ValueError unless the shapes of the inputs are within the exported ranges."""
        least, _, most = self.manifest.batch
        for port, given in zip(self.manifest.inputs, inputs, strict=True):
            fits = len(port.shape) == given.ndim and all(e in (BATCH, size) for e, size in zip(port.shape, given.shape))
            if not fits or not least <= given.shape[0] <= most:
                batches = f"{least}" if least == most else f"{least} to {most}"
                expected = ", ".join(batches if size == BATCH else str(size) for size in port.shape)
                why = f"{port.name} has shape {tuple(given.shape)} where {self.folder} takes ({expected})"
                fix = "export it again with --min-batch and --max-batch"
                if self.manifest.engine != "onnx":
                    fix = "build it again with --minShapes and --maxShapes"
                raise ValueError(f"{why}: {fix} around the sizes that you need, or call with those")


def read(folder: str | Path) -> Artefact:
    """Read the artefact in a folder, and check its manifest and every file.

    Raises:
        ValueError: If there is none, or if it is damaged or was changed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        reason = f"{folder} is no exported artefact, it has no {MANIFEST}"
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, and an exported artefact is a folder: name the folder")
        raise ValueError(f"{reason}: make one with {TOOL} onnx -o {folder}")
    try:
        found = Artefact(folder, read_manifest(folder))
    except ValueError as error:
        raise ValueError(f"{path} {error}: remove {folder} and build it again with {TOOL} ... -o {folder}") from error
    found.check_files()
    return found


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest in a folder, but none of the other files.

    Raises:
        ValueError: As `Manifest.from_json` does.
    """
    path = folder / MANIFEST
    if not is_inside(path, folder):
        raise ValueError("is a link that leads out of its folder")
    if (size := path.stat().st_size) > LARGEST_MANIFEST:
        raise ValueError(f"is damaged (it has {size:,} bytes)")
    return Manifest.from_json(path.read_text("utf-8", errors="replace"))


def find(folder: str | Path) -> dict[str, Artefact]:
    """Read the artefact in a folder, or those in the folders in it.

    Returns:
        The artefacts by kind, in the order of `KINDS`.

    Raises:
        ValueError: As `read` does, and if two artefacts are of the same kind.
    """
    folder = Path(folder)
    parts = {path.parent for path in folder.glob(f"*/{MANIFEST}")}
    # a folder named after a kind that has lost its manifest is an error, not something to skip
    parts |= {folder / kind for kind in KINDS if parts and os.path.lexists(folder / kind)}
    if (folder / MANIFEST).is_file() or not parts:
        found = read(folder)
        return {found.manifest.kind: found}
    artefacts: dict[str, Artefact] = {}
    for part in sorted(parts):
        found = read(part)
        kind = found.manifest.kind
        if (other := artefacts.setdefault(kind, found)) is not found:
            two = f"{other.folder.name} and {part.name}"
            raise ValueError(f"{folder} holds two artefacts of the {kind}, {two}: name one")
    return {kind: artefacts[kind] for kind in KINDS if kind in artefacts}


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, its links followed, is directly in a folder."""
    return path.resolve().parent == folder.resolve()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return disk.sha256(file)


def _external_files(graph: Path) -> list[str]:
    """Names of the files that hold an ONNX graph's weights, found without the package onnx.

    In the serialized protobuf they are the values that follow the key "location" among pairs of strings.
    """
    names = []
    for found in re.finditer(rb"\x0a\x08location\x12(?P<size>[\x80-\xff]*[\x00-\x7f])", content := graph.read_bytes()):
        size = sum((byte & 127) << 7 * i for i, byte in enumerate(found["size"]))  # a varint
        names.append(content[found.end() : found.end() + size].decode("utf-8", "replace"))
    return list(dict.fromkeys(names))
