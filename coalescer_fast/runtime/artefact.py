"""Exported artefacts: a folder with a graph and a manifest that says what it is. What the manifest does not vouch for does not run.

    DIR/manifest.json   `Manifest`, with the SHA-256 of itself and of every other file
    DIR/model.onnx      (or a plan), with its weights or beside model.onnx.data

A folder of such folders, one a part of a model, is given in the same way.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..scheduler import CoalescerScheduler

FORMAT = 1
MANIFEST = "manifest.json"
KINDS = ("unet", "decoder", "generator")
BATCH = "batch"  # stands for a size in a `Port`
TOOL = "coalescer-export"


@dataclass(frozen=True)
class Port:
    """An input or output: dtype as in torch ("float32"); shape with "batch" for the number of pictures."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Schedule:
    """What a generator does between noise and picture, see `CoalescerScheduler`; guided: the steps that the scale applies to."""

    etas: tuple[float, ...]
    modes: tuple[str, ...]
    eps: float
    guided: tuple[int, ...]
    guidance_scale: float

    @classmethod
    def of(cls, scheduler: CoalescerScheduler, guidance_scale: float) -> Schedule:
        """``scheduler``: with its steps set."""
        guided = tuple(i for i in range(len(scheduler.etas)) if scheduler.is_guided(i)) if guidance_scale != 1 else ()
        return cls(tuple(scheduler.etas), tuple(scheduler.modes), scheduler.config.eps, guided, float(guidance_scale))

    def __str__(self) -> str:
        steps = ", ".join(f"{eta:g} {mode}" for eta, mode in zip(self.etas, self.modes))
        where = f" in {len(self.guided)} of them" if self.guided else ""
        return f"{len(self.etas)} step{'s' * (len(self.etas) != 1)} ({steps}) with guidance {self.guidance_scale:g}{where}"


@dataclass(frozen=True)
class Manifest:
    """What an artefact is.

    kind: of `KINDS`; engine: what reads the graph, "onnx" or that of a plan, of `tensorrt.TITLES`; target: what the graph is written for,
    "cpu" or "tensorrt"; precision: "fp32", "fp16" or "int8", and recipe, in words, what of it is in which dtype; graph: the file that the
    engine opens. model: the source's name; weights: network -> `network_sha256`, of those that the graph holds.
    batch: least, best and most pictures; schedule: a generator's.
    command: the arguments of coalescer-export that made it, but for the output; flags: further options that decided the result.
    calibration: SHA-256 of the ranges, of int8; measured: figures and the setting they were measured in; packages: name -> version;
    files: name -> {"bytes", "sha256"}, filled in by `write`.
    tensorrt: of a plan, "version", "compute_capabilities" ("8.6") that it is for, "gpu", the name if it is for that model of GPU alone,
    "profile", input -> least, best and largest shape, "source", file -> SHA-256 of the artefact that it was built from.
    """

    kind: str
    engine: str
    target: str
    precision: str
    recipe: str
    graph: str
    model: str
    weights: dict[str, str]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    batch: tuple[int, int, int]
    opset: int | None
    command: tuple[str, ...]
    schedule: Schedule | None = None
    calibration: str | None = None
    tensorrt: dict[str, Any] | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """With ``sha256``, of the rest."""
        content = json.loads(json.dumps(asdict(self)))
        return json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError, which says what is wrong and not where, for anything that `to_json` does not give."""
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"is damaged ({error})") from error
        if not isinstance(content, dict) or "format" not in content:
            raise ValueError("is damaged (it says no format)")
        if content["format"] != FORMAT:
            raise ValueError(f"has format {content['format']!r} where this coalescer_fast reads format {FORMAT}")
        if content.pop("sha256", None) != _digest(content) or set(content) != {each.name for each in fields(cls)}:
            raise ValueError("was changed after it was written")
        for name in ("inputs", "outputs"):
            content[name] = tuple(Port(p["name"], p["dtype"], tuple(p["shape"])) for p in content[name])
        if content["schedule"] is not None:
            made = content["schedule"]
            content["schedule"] = Schedule(**{**made, **{name: tuple(made[name]) for name in ("etas", "modes", "guided")}})
        return cls(**{**content, "batch": tuple(content["batch"]), "command": tuple(content["command"])})


@dataclass(frozen=True)
class Artefact:
    """A folder whose files are those that its manifest says."""

    folder: Path
    manifest: Manifest

    @property
    def graph(self) -> Path:
        return self.folder / self.manifest.graph

    @property
    def mend(self) -> str:
        """How to build it anew."""
        return f"build it again with: {shlex.join([TOOL, *self.manifest.command, '-o', str(self.folder), '--force'])}"

    def check_files(self) -> None:
        """Raise ValueError unless every file is there as it was written."""
        for name, facts in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{self.folder} is incomplete, {name} is missing: {self.mend}")
            if (size := path.stat().st_size) != facts["bytes"]:
                raise ValueError(f"{path} has {size} bytes where its manifest says {facts['bytes']}: {self.mend}")
            if file_sha256(path) != facts["sha256"]:
                raise ValueError(f"{path} was changed after it was written, its SHA-256 is not the manifest's: {self.mend}")

    def check_weights(self, pipe: Any) -> None:
        """Raise ValueError unless the graph was made of this pipeline's weights as they are now."""
        now = weights(pipe, self.manifest.kind)
        for network, digest in self.manifest.weights.items():
            if now[network] != digest:
                made, here = f"{self.manifest.model!r}, {digest[:12]}", now[network][:12]
                whose = f"other weights of the {network} or settings of its layers ({made}) than the pipeline's ({here})"
                raise ValueError(f"{self.folder} was exported from {whose}: load that model, or {self.mend}")

    def check_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Raise ValueError unless the shapes are within the exported ranges."""
        least, _, most = self.manifest.batch
        for port, given in zip(self.manifest.inputs, inputs, strict=True):
            fits = len(port.shape) == given.ndim and all(e in (BATCH, size) for e, size in zip(port.shape, given.shape))
            if not fits or not least <= given.shape[0] <= most:
                batches = f"{least}" if least == most else f"{least} to {most}"
                expected = ", ".join(batches if size == BATCH else str(size) for size in port.shape)
                why = f"{port.name} has shape {tuple(given.shape)} where {self.folder} takes ({expected})"
                words = "export it again with --min-batch and --max-batch"
                if self.manifest.engine != "onnx":
                    words = "build it again with --minShapes and --maxShapes"
                raise ValueError(f"{why}: {words} around the sizes that you need, or call with those")


def read(folder: str | Path) -> Artefact:
    """The artefact in a folder, checked: its manifest and every file. Raises ValueError, in one sentence."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is no exported artefact, it has no {MANIFEST}: make one with {TOOL} onnx -o {folder}")
    try:
        found = Artefact(folder, Manifest.from_json(path.read_text("utf-8", errors="replace")))
    except ValueError as error:
        raise ValueError(f"{path} {error}: build the artefact again with {TOOL} ... -o {folder} --force") from error
    found.check_files()
    return found


def find(folder: str | Path) -> dict[str, Artefact]:
    """By kind, the artefact in the folder, or those in the folders in it."""
    folder = Path(folder)
    if (folder / MANIFEST).is_file() or not (parts := sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))):
        found = read(folder)
        return {found.manifest.kind: found}
    artefacts: dict[str, Artefact] = {}
    for part in parts:
        found = read(part)
        if (other := artefacts.setdefault(found.manifest.kind, found)) is not found:
            raise ValueError(f"{folder} holds two artefacts of the {found.manifest.kind}, {other.folder.name} and {part.name}: name one")
    return {kind: artefacts[kind] for kind in KINDS if kind in artefacts}


def write(folder: Path, manifest: Manifest) -> Artefact:
    """Vouch for all that is in a folder that `creating` gave, or in a folder in it: write its manifest."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())}
    files.pop(MANIFEST, None)
    manifest = replace(manifest, files=files)
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return Artefact(folder, manifest)


@contextmanager
def creating(folder: Path, force: bool = False) -> Iterator[Path]:
    """A new folder beside ``folder``, which takes its name when the block ends, and vanishes if it fails or is interrupted.

    Raises ValueError if there is a folder already and not ``force``, or one that holds anything but artefacts.
    """
    if folder.is_symlink() or (folder.exists() and not _is_ours(folder)):
        raise ValueError(f"{folder} exists and is no exported artefact: name another folder")
    if folder.exists() and not force:
        raise ValueError(f"{folder} exists: name another folder, or add --force to replace it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("partial", "old.partial"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """An artefact, a folder of artefacts, or an empty one."""
    return folder.is_dir() and ((folder / MANIFEST).is_file() or all((path / MANIFEST).is_file() for path in folder.iterdir()))


def weights(pipe: Any, kind: str) -> dict[str, str]:
    """`network_sha256` of the networks that an artefact of this kind holds."""
    digests = {}
    if kind in ("unet", "generator"):
        digests["unet"] = network_sha256(pipe.unet, pipe.unet.config)
    if kind in ("decoder", "generator"):
        names = ("patch_size", "latent_channels", "width", "decoder_blocks")
        digests["decoder"] = network_sha256(pipe.vae.decoder, {name: pipe.vae.config[name] for name in names})
    return digests


def network_sha256(network: nn.Module, config: Mapping[str, Any]) -> str:
    """Of its configuration, its structure, and name, dtype, shape and bytes of its tensors."""
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode())
    digest.update(structure_sha256(network).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().resolve_neg().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def structure_sha256(network: nn.Module) -> str:
    """Of what else a forward depends on: every module's name, class, and public attributes that are numbers, words or sequences of them
    (eps, num_heads, stride, negative_slope, ...). One module in two places counts in both."""
    digest = hashlib.sha256()
    for name, module in network.named_modules(remove_duplicate=False):
        settings = {key: value for key, value in module.__dict__.items() if not key.startswith("_") and _is_setting(value)}
        for of_the_moment in ("training", "backend", "gradient_checkpointing"):
            settings.pop(of_the_moment, None)
        digest.update(json.dumps([name, type(module).__qualname__, settings], sort_keys=True).encode())
    return digest.hexdigest()


def _is_setting(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, (bool, int, float, str))


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
