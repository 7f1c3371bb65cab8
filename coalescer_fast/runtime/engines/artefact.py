"""Exported artefacts: a folder with a graph and a manifest that says what it is. What the manifest does not vouch for does not run.

    DIR/manifest.json   `Manifest`, with the SHA-256 of itself and of every other file
    DIR/model.onnx      (or a plan), with its weights or beside model.onnx.data

A folder of such folders, one a part of a model, is given in the same way.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from glob import escape as glob_escape
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ... import files as disk
from ...scheduler import CoalescerScheduler
from ...schema import FileName, Rule, Sha256, between, build, one_of

FORMAT = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 1 << 24  # bytes
KINDS = ("unet", "decoder", "generator")
ENGINES = ("onnx", "tensorrt", "tensorrt_rtx")
BATCH = "batch"  # stands for a size in a `Port`
TOOL = "coalescer-export"
# kind -> networks that the graph holds, and its fewest inputs and its outputs
HOLDS = {"unet": ({"unet"}, 2, 2), "decoder": ({"decoder"}, 1, 1), "generator": ({"unet", "decoder"}, 2, 1)}

Size = Annotated[int, between(1, 2**31 - 1)]
Extent = Annotated[int | str, Rule(lambda n: n == BATCH if isinstance(n, str) else 0 < n < 2**31, "a size or batch")]
Word = Annotated[str, Rule(lambda text: 0 < len(text) <= 10_000, "1 to 10,000 characters")]
Capability = Annotated[str, Rule(lambda text: bool(re.fullmatch(r"\d{1,2}\.\d", text)), "one such as 8.6")]
Batches = Annotated[tuple[Size, Size, Size], Rule(lambda b: b[0] <= b[1] <= b[2], "three numbers from small to large")]


@dataclass(frozen=True)
class Port:
    """An input or output: dtype as in torch ("float32"); shape with "batch" for the number of pictures."""

    name: Word
    dtype: Annotated[str, one_of("float32", "float16", "bfloat16", "int64", "int32", "bool")]
    shape: tuple[Extent, ...]


@dataclass(frozen=True)
class Schedule:
    """What a generator does between noise and picture, see `CoalescerScheduler`; guided: the steps that the scale applies to."""

    etas: tuple[float, ...]
    modes: tuple[Annotated[str, one_of("raw", "unit")], ...]
    eps: Annotated[float, between(0, 1)]
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
        return (
            f"{len(self.etas)} step{'s' * (len(self.etas) != 1)} ({steps}) with guidance {self.guidance_scale:g}{where}"
        )


@dataclass(frozen=True)
class File:
    """Size and hash of a file."""

    bytes: Annotated[int, between(0, 2**63 - 1)]
    sha256: Sha256


@dataclass(frozen=True)
class Plan:
    """What `Manifest.tensorrt` holds."""

    version: Word
    compute_capabilities: tuple[Capability, ...]
    gpu: Word | None
    profile: dict[str, tuple[tuple[Size, ...], tuple[Size, ...], tuple[Size, ...]]]
    source: dict[FileName, Sha256]


@dataclass(frozen=True)
class PlanFlags:
    """What `Manifest.flags` holds of a plan."""

    hardwareCompatibilityLevel: Annotated[str, one_of("none", "ampere+", "sameComputeCapability")] = "none"
    versionCompatible: bool = False
    stripWeights: str = ""


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

    kind: Annotated[str, one_of(*KINDS)]
    engine: Annotated[str, one_of(*ENGINES)]
    target: Annotated[str, one_of("cpu", "tensorrt")]
    precision: Annotated[str, one_of("fp32", "fp16", "int8")]
    recipe: str
    graph: FileName
    model: Word
    weights: dict[str, Sha256]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    batch: Batches
    opset: Annotated[int, between(1, 1000)] | None
    command: tuple[str, ...]
    schedule: Schedule | None = None
    calibration: Sha256 | None = None
    tensorrt: dict[str, Any] | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    files: dict[FileName, dict[str, Any]] = field(default_factory=dict)
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
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is damaged ({' '.join(str(error).split())})") from error
        if not isinstance(content, dict) or "format" not in content:
            raise ValueError("is damaged (it says no format)")
        if content["format"] != FORMAT:
            raise ValueError(f"has format {content['format']!r:.40} where this coalescer_fast reads format {FORMAT}")
        if content.pop("sha256", None) != _digest(content) or set(content) != {each.name for each in fields(cls)}:
            raise ValueError("was changed after it was written")
        try:
            found = build(content, cls)
            found._check()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is damaged ({' '.join(str(error).split())})") from error
        return found

    def _check(self) -> None:
        """Raise ValueError for a field that does not go with the others."""
        for name, facts in self.files.items():
            build(facts, File, f"files.{name}.")
        networks, inputs, outputs = HOLDS[self.kind]
        made, plan = self.schedule, None if self.tensorrt is None else build(self.tensorrt, Plan, "tensorrt.")
        needed = [self.graph]
        if plan is not None:
            given = {key: value for key, value in self.flags.items() if key in PlanFlags.__annotations__}
            needed += [name] if (name := build(given, PlanFlags, "flags.").stripWeights) else []
        ports = (*self.inputs, *self.outputs)
        kind, there = f"it is a {self.kind}", {True: "missing", False: "there"}
        rows = [
            (MANIFEST not in self.files, f"files lists {MANIFEST}, which cannot vouch for itself"),
            *[(name in self.files, f"{name} is not among its files") for name in needed],
            (set(self.weights) == networks, f"weights is of {', '.join(self.weights) or 'nothing'}; {kind}"),
            (len(self.inputs) >= inputs, f"inputs has {len(self.inputs)}; {kind} and takes {inputs} or more"),
            (len(self.outputs) == outputs, f"outputs has {len(self.outputs)}; {kind} and gives {outputs}"),
            (len({port.name for port in ports}) == len(ports), "an input or output is there twice"),
            (all(port.shape[:1] == (BATCH,) for port in ports), "a shape does not begin with the batch"),
            (
                (self.engine == "onnx") == (plan is None),
                f"tensorrt is {there[plan is None]}; its engine is {self.engine}",
            ),
            (self.engine != "onnx" or self.opset is not None, "opset is missing"),
            ((self.kind == "generator") == (made is not None), f"schedule is {there[made is None]}; {kind}"),
        ]
        if made is not None:
            steps = len(made.etas)
            rows.append((0 < steps == len(made.modes), f"schedule has {steps} etas and {len(made.modes)} modes"))
            rows.append((set(made.guided) <= set(range(steps)), "schedule.guided names a step that is not there"))
        if plan is not None:
            inside = set(plan.profile) <= {port.name for port in self.inputs}
            rows.append((inside, "tensorrt.profile is not of its inputs"))
        for holds, sentence in rows:
            if not holds:
                raise ValueError(sentence)


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
        """Raise ValueError unless every file is in the folder as it was written, and the graph needs no other."""
        for name, facts in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{self.folder} is incomplete, {name} is missing: {self.mend}")
            if not _inside(path, self.folder):
                raise ValueError(
                    f"{path} is a link that leads out of its folder: put the file itself there, or {self.mend}"
                )
            if (size := path.stat().st_size) != facts["bytes"]:
                raise ValueError(f"{path} has {size} bytes where its manifest says {facts['bytes']}: {self.mend}")
            if file_sha256(path) != facts["sha256"]:
                raise ValueError(
                    f"{path} was changed after it was written, its SHA-256 is not the manifest's: {self.mend}"
                )
        if self.manifest.engine == "onnx":
            for name in _external(self.graph):
                if name not in self.manifest.files:
                    raise ValueError(
                        f"{self.graph} reads {name!r:.80}, for which its manifest does not vouch: {self.mend}"
                    )

    def check_ports(self, inputs: Sequence[tuple[str, str, int]], outputs: Sequence[tuple[str, str, int]]) -> None:
        """Raise ValueError unless the graph's inputs and outputs, as (name, dtype, number of dimensions), are the manifest's."""
        m = self.manifest
        for what, ports, found in (("inputs", m.inputs, inputs), ("outputs", m.outputs, outputs)):
            if [(port.name, port.dtype, len(port.shape)) for port in ports] != list(found):
                said = ", ".join(f"{name}, {dtype}" for name, dtype, _ in found)
                raise ValueError(f"{self.graph} has other {what} ({said:.200}) than its manifest says: {self.mend}")

    def check_weights(self, pipe: Any) -> None:
        """Raise ValueError unless the graph was made of this pipeline's weights as they are now."""
        now = weights(pipe, self.manifest.kind)
        for network, digest in self.manifest.weights.items():
            if now[network] != digest:
                made, here = f"{self.manifest.model!r}, {digest[:12]}", now[network][:12]
                whose = (
                    f"other weights of the {network} or settings of its layers ({made}) than the pipeline's ({here})"
                )
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
        raise ValueError(
            f"{folder} is no exported artefact, it has no {MANIFEST}: make one with {TOOL} onnx -o {folder}"
        )
    try:
        found = Artefact(folder, _manifest(folder))
    except ValueError as error:
        raise ValueError(f"{path} {error}: remove {folder} and build it again with {TOOL} ... -o {folder}") from error
    found.check_files()
    return found


def _manifest(folder: Path) -> Manifest:
    """Raises ValueError, as `Manifest.from_json`."""
    path = folder / MANIFEST
    if not _inside(path, folder):
        raise ValueError("is a link that leads out of its folder")
    if (size := path.stat().st_size) > LARGEST_MANIFEST:
        raise ValueError(f"is damaged (it has {size:,} bytes)")
    return Manifest.from_json(path.read_text("utf-8", errors="replace"))


def find(folder: str | Path) -> dict[str, Artefact]:
    """By kind, the artefact in the folder, or those in the folders in it."""
    folder = Path(folder)
    # a folder that bears the name of a kind and has lost its manifest is not passed over
    parts = {path.parent for path in folder.glob(f"*/{MANIFEST}")}
    parts |= {folder / kind for kind in KINDS if parts and os.path.lexists(folder / kind)}
    if (folder / MANIFEST).is_file() or not parts:
        found = read(folder)
        return {found.manifest.kind: found}
    artefacts: dict[str, Artefact] = {}
    for part in sorted(parts):
        found = read(part)
        if (other := artefacts.setdefault(found.manifest.kind, found)) is not found:
            raise ValueError(
                f"{folder} holds two artefacts of the {found.manifest.kind}, {other.folder.name} and {part.name}: name one"
            )
    return {kind: artefacts[kind] for kind in KINDS if kind in artefacts}


def write(folder: Path, manifest: Manifest) -> Artefact:
    """Vouch for all that is in a folder that `creating` gave, or in a folder in it: write its manifest."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())
    }
    files.pop(MANIFEST, None)
    manifest = replace(manifest, files=files)
    text = manifest.to_json()
    Manifest.from_json(text)  # what could not be read is not written
    disk.write_text(folder / MANIFEST, text)
    return Artefact(folder, manifest)


@contextmanager
def creating(folder: Path, force: bool = False) -> Iterator[Path]:
    """A new folder beside ``folder``, which takes its name when the block ends, and vanishes if it fails or is interrupted.

    With ``force`` an artefact that is there is replaced, or a folder of them; of it, the files go that its manifests list. Raises
    ValueError for a folder that is there and not ``force``, or that holds anything else, which is looked at again when the block ends: what
    came meanwhile stays, and what was made is left beside it.
    """
    if folder.name in ("", ".."):
        raise ValueError(f"{folder} is no name of a folder to make: give one, such as exported")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _recover(folder)
        _check_free(folder, force)
        new = disk.new_folder(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield new
        disk.sync(new)
        _take_place(new, folder, force)
    except OSError as error:
        named = error.filename is not None and not str(error.filename).startswith(str(new))
        if named or (error.errno is None and error.filename is None):
            raise
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"{folder} cannot be written ({(error.strerror or str(error)).lower()}): free some space, or name a folder elsewhere"
    )


def _check_free(folder: Path, force: bool) -> None:
    """Raise ValueError unless the folder is not there, or may be replaced."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir() or not _holds_artefacts(folder):
        raise ValueError(f"{folder} exists and is no exported artefact: name another folder")
    if not force:
        raise ValueError(f"{folder} exists: name another folder, or add --force to replace it")
    _listed(folder)


def _take_place(new: Path, folder: Path, force: bool) -> None:
    """Give the new folder its name, and remove what had it."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.replaced")
    try:
        _check_free(folder, force)
        if force:
            with suppress(FileNotFoundError):
                folder.rename(old)
        if old.exists():
            _listed(old)  # nobody finds it by its name any more
        new.rename(folder)  # fails where a folder with files has come
    except BaseException as error:
        if old.exists():
            _put_back(old, folder)
        taken = isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
        if not taken and not isinstance(error, ValueError):
            raise
        reason = f"{folder} exists" if taken else str(error).partition(": ")[0]
        kept = _move_aside(new, folder)
        raise ValueError(
            f"{folder} changed while this ran ({reason}) and stays as it is: what was made is in {kept}"
        ) from error
    if old.exists():
        _remove(old)


def _move_aside(new: Path, folder: Path) -> Path:
    """The first free name of NAME-2, NAME-3, ..., which the new folder has now."""
    number = 2
    while True:
        kept = folder.with_name(f"{folder.name}-{number}")
        if not os.path.lexists(kept):
            new.rename(kept)
            return kept
        number += 1


def _recover(folder: Path) -> None:
    """`_put_back` what a process that was killed while it replaced the folder has put aside."""
    for path in folder.parent.glob(f".{glob_escape(folder.name)}.*.replaced"):
        pid = path.name[len(folder.name) + 2 :].partition(".")[0]
        if pid.isdecimal() and not disk.alive(int(pid)):
            _put_back(path, folder)


def _put_back(old: Path, folder: Path) -> None:
    """What was put aside: in its place again, or removed if another artefact has taken that."""
    if not os.path.lexists(folder):
        old.rename(folder)
    else:
        with suppress(ValueError, OSError):
            _remove(old)


def _holds_artefacts(folder: Path) -> bool:
    """An artefact, a folder that has one in it, or an empty one."""
    parts = list(folder.iterdir())
    return not parts or (folder / MANIFEST).is_file() or any((path / MANIFEST).is_file() for path in parts)


def _listed(folder: Path) -> list[Path]:
    """All files of an artefact, or of several in a folder, if their manifests list them all. Raises ValueError for anything else."""
    parts, names = sorted(folder.iterdir()), set[str]()
    if (folder / MANIFEST).is_file():
        try:
            names = {*_manifest(folder).files, MANIFEST}
        except ValueError as error:
            reason = f"{folder / MANIFEST} {error}, and so does not say which files are its own"
            raise ValueError(f"{reason}: remove {folder} yourself") from error
    found = []
    for path in parts:
        if not names and not path.is_symlink() and (path / MANIFEST).is_file():
            found += _listed(path)
        elif path.name in names and not path.is_dir():
            found.append(path)
        else:
            raise ValueError(
                f"{folder} holds {path.name}, which {TOOL} did not write: move it elsewhere, or name another folder"
            )
    return found


def _remove(folder: Path) -> None:
    for path in _listed(folder):
        path.unlink()
    for path in (*(each for each in folder.iterdir() if each.is_dir()), folder):
        path.rmdir()


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().parent == folder.resolve()


def _external(graph: Path) -> list[str]:
    """The files that an ONNX graph names for its weights: the value of every "location" among its pairs of strings."""
    names = []
    for found in re.finditer(rb"\x0a\x08location\x12(?P<size>[\x80-\xff]*[\x00-\x7f])", content := graph.read_bytes()):
        size = sum((byte & 127) << 7 * i for i, byte in enumerate(found["size"]))
        names.append(content[found.end() : found.end() + size].decode("utf-8", "replace"))
    return list(dict.fromkeys(names))


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
        settings = {
            key: value for key, value in module.__dict__.items() if not key.startswith("_") and _is_setting(value)
        }
        for of_the_moment in ("training", "backend", "gradient_checkpointing"):
            settings.pop(of_the_moment, None)
        digest.update(json.dumps([name, type(module).__qualname__, settings], sort_keys=True).encode())
    return digest.hexdigest()


def _is_setting(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, (bool, int, float, str))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return disk.sha256(file)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
