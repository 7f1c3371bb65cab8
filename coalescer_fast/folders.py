"""Folders of saved pipelines: where they are, what is written beside diffusers' files, and checks before a load.

A stranger's folder runs no code here. It may name no class but ours (or one derived from ours that this process has
imported already), its weights are safetensors, and whatever does not fit is an error in one sentence.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from . import files
from .models import CoalescerAutoencoder, CoalescerUNet, DescriptionEncoder
from .runtime.engines.artefact import file_sha256
from .scheduler import CoalescerScheduler

COMPONENTS: dict[str, type] = {
    "unet": CoalescerUNet,
    "scheduler": CoalescerScheduler,
    "description_encoder": DescriptionEncoder,
    "vae": CoalescerAutoencoder,
}
WEIGHTS = Path(__file__).parent / "weights"  # a folder for each embedded model
NETWORKS = ("unet", "description_encoder", "vae")
INDEX_END = ".safetensors.index.json"
INDEX, CHECKSUMS, CODE = "model_index.json", "checksums.json", "pipeline.py"
# safetensors' names of dtypes: those that a file may have for a floating-point tensor, and must have for integers
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = {torch.int8: "I8", torch.uint8: "U8", torch.int64: "I64"}
# settings that count layers; every layer has tensors
COUNTS = ("layers_per_block", "encoder_blocks", "decoder_blocks", "transformer_layers_per_block")


def embedded_models() -> list[str]:
    """Names of the models that the package carries."""
    return sorted(p.parent.name for p in WEIGHTS.glob(f"*/{INDEX}"))


def locate(name: str) -> Path | None:
    """Find the folder that a name stands for.

    Args:
        name: an embedded model, a folder or a Hub id.

    Returns:
        The folder, or None for a Hub id.

    Raises:
        ValueError: for a name that can be none of them.
    """
    if name in embedded_models():
        return WEIGHTS / name
    folder = Path(name)
    try:
        if folder.is_dir():
            return folder
    except OSError as error:  # a name that is too long
        raise ValueError(f"there is no model {name!r:.80}: {(error.strerror or str(error)).lower()}") from error
    if folder.is_file():
        raise ValueError(f"{name!r} is a file, and a model is a folder: give the folder")
    if name.count("/") != 1 or folder.exists() or name.startswith((".", "/", "~")):
        known = ", ".join(embedded_models())
        raise ValueError(f"there is no model {name!r}: give {known}, a folder, or a Hub id such as owner/name")
    return None


def public_name(name: str) -> str:
    """A model's name for others: of a folder its last part alone, for where it lies is nobody else's business."""
    return Path(name).name if Path(name).is_dir() else name


def complete(folder: Path, pipeline: type[DiffusionPipeline]) -> None:
    """Write what a saved folder has beside diffusers' files: code by which diffusers finds the class, and checksums.

    ``model_index.json`` then names the class as diffusers names those of a ``pipeline.py``.

    Args:
        folder: as diffusers has saved it.
        pipeline: the class.
    """
    index = read_json(folder / INDEX)
    index["_class_name"] = [Path(CODE).stem, pipeline.__name__]
    files.write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    module = "coalescer_fast" if pipeline.__module__ == f"{__package__}.pipeline" else pipeline.__module__
    files.write_text(
        folder / CODE,
        '"""For DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)."""\n\n'
        f"from {module} import {pipeline.__name__}  # noqa: F401\n",
    )
    parts = [folder / name for name in index if (folder / name).is_dir()]
    for stale in [path for part in parts for path in part.glob(f"*{INDEX_END}")]:
        # where whole weights replace shards, diffusers removes the shards and leaves their index, which would be read
        whole = stale.with_name(stale.name.removesuffix(INDEX_END) + ".safetensors")
        shards = set(read_json(stale).get("weight_map", {}).values())
        if whole.is_file() and not all((stale.parent / shard).is_file() for shard in shards):
            stale.unlink()
    saved = [folder / INDEX, folder / CODE, *(path for part in parts for path in part.rglob("*") if path.is_file())]
    sums = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(saved)
    }
    files.write_text(folder / CHECKSUMS, json.dumps(sums, indent=2) + "\n")


def check(
    folder: Path, pipeline: type[DiffusionPipeline], given: Collection[str] = (), variant: str | None = None
) -> None:
    """Check that a folder is a saved pipeline that can be loaded as it was saved.

    Args:
        folder: the folder.
        pipeline: the class that is to be loaded.
        given: components that need not be there.
        variant: of the weights, as in diffusers.

    Raises:
        ValueError: if it is not.
    """
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} is not a saved pipeline: it has no {INDEX}")
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"\w+", variant)):
        raise ValueError(f"variant is {variant!r}; expected a word, such as 'fp16'")
    index = read_json(folder / INDEX)
    _check_class(folder, index, pipeline)
    _check_names(folder, index, pipeline)
    needed = [folder / INDEX]
    for name, base in COMPONENTS.items():
        if name not in index and name not in given:
            raise ValueError(f"{folder / INDEX} is damaged: it names no {name}")
        kind = _class_of(f"{name} in {folder / INDEX}", index[name], base) if name in index else base
        if name not in given:
            needed += _check_component(folder / name, kind, variant)
    _check_sums(folder, needed)


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file. Raises ValueError if there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error!s:.300}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(found).__name__}, not a JSON object")
    return found


def _check_class(folder: Path, index: dict[str, Any], pipeline: type[DiffusionPipeline]) -> None:
    named = index.get("_class_name")
    name = named[-1] if isinstance(named, list) and named else named
    allowed = [
        each.__name__
        for each in pipeline.__mro__
        if issubclass(each, DiffusionPipeline) and each is not DiffusionPipeline
    ]
    if name not in allowed:
        raise ValueError(f"{folder} holds a {name!s:.80}, not a {' or '.join(allowed)}")


def _check_names(folder: Path, index: dict[str, Any], pipeline: type[DiffusionPipeline]) -> None:
    """Raise ValueError for a name that the pipeline does not have, or a component of a subclass that brings code."""
    modules, settings = pipeline._get_signature_keys(pipeline)
    for name, entry in index.items():
        if name.startswith("_") or name in COMPONENTS or name in settings:
            continue
        if name not in modules:
            raise ValueError(f"{folder / INDEX} is damaged: it names {name:.80}, which no {pipeline.__name__} has")
        library = str(entry[0]).partition(".")[0] if isinstance(entry, list) and entry else ""
        if entry != [None, None] and library not in ("diffusers", "transformers"):
            _class_of(f"{name} in {folder / INDEX}", entry, object)


def _class_of(where: str, entry: Any, base: type) -> type:
    """Find the class that an entry [module, class] names among what is imported already."""
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
        raise ValueError(f"{where} is {entry!r:.80}; expected [module, class]")
    module, name = entry
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    if not (isinstance(found, type) and issubclass(found, base)):
        named = f"{module:.80}.{name:.80}"
        raise ValueError(
            f"{where} is {named}, which is not a {base.__name__} that is imported here; no other is loaded"
        )
    return found


def _check_component(folder: Path, kind: type, variant: str | None) -> list[Path]:
    """Check a component, and return the files that diffusers will read of it."""
    if kind.config_name != CONFIG_NAME:  # type: ignore[attr-defined]
        path = _file(folder, kind.config_name)  # type: ignore[attr-defined]
        _check_config(path, kind)
        return [path]
    path, weights = _file(folder, CONFIG_NAME), list(_weights(folder, variant))
    config = _check_config(path, kind)
    _check_weights(folder, kind, config, [each for each in weights if each.suffix != ".json"])
    return [path, *weights]


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ValueError(f"{folder.parent} is incomplete: {folder.name}/{name} is missing")
    return folder / name


def _weights(folder: Path, variant: str | None) -> Iterator[Path]:
    """The files of weights that diffusers will choose, and before them their index if there are several."""
    has_variant = variant is not None and any(
        path.name.partition(".")[2].startswith(variant) for path in folder.iterdir()
    )
    end = f".{variant}" if has_variant else ""
    stem, _, suffix = SAFE_WEIGHTS_INDEX_NAME.rpartition(".")
    index = folder / f"{stem}{end}.{suffix}"
    if not index.is_file():
        stem, _, suffix = SAFETENSORS_WEIGHTS_NAME.rpartition(".")
        yield _file(folder, f"{stem}{end}.{suffix}")
        return
    table = read_json(index)
    names = table.get("weight_map")
    if not isinstance(table.get("metadata"), dict) or not isinstance(names, dict) or not names:
        raise ValueError(f"{index} is damaged: it has no metadata or no weight_map")
    if odd := [
        name for name in names.values() if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name)
    ]:
        raise ValueError(f"{index} is damaged: it names {odd[0]!r:.80}, which is no file of weights in this folder")
    yield index
    for name in sorted(set(names.values())):
        yield _file(folder, name)


def _check_config(path: Path, kind: type) -> dict[str, Any]:
    config = read_json(path)
    if (named := config.get("_class_name", kind.__name__)) != kind.__name__:
        raise ValueError(f"{path} is of a {named!s:.80}, not a {kind.__name__}")
    hints = get_type_hints(kind.__init__)  # type: ignore[misc]
    for name, value in config.items():
        if name.startswith("_"):
            continue
        if name not in hints:
            raise ValueError(
                f"{path} has {name:.80}, which no {kind.__name__} has: it is damaged, or from a later version"
            )
        if not _fits(value, hints[name]):
            raise ValueError(f"{path} is damaged: {name} is {value!r:.80}")
    return config


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of a type. Only types that configurations of networks have are checked."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(_fits(each, get_args(hint)[0]) for each in value)
    return type(value) is hint if hint in (int, bool, str, NoneType) else True


def _check_weights(folder: Path, kind: type, config: dict[str, Any], files: list[Path]) -> None:
    """Compare the tensors in the files with those of an empty network of the configuration; no tensor is read."""
    found: dict[str, tuple[str, list[int], Path]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    part = file.get_slice(name)
                    found[name] = part.get_dtype(), part.get_shape(), path
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {' '.join(str(error).split()):.300}") from error
    _check_sizes(folder, config, found)
    try:
        with torch.device("meta"):
            expected = kind.from_config(config).state_dict()  # type: ignore[attr-defined]
    except Exception as error:  # whatever a layer raises for sizes that it cannot have
        raise ValueError(
            f"{folder / CONFIG_NAME} is damaged: {' '.join(str(error).split())[:300] or type(error).__name__}"
        ) from error
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{files[0] if len(files) == 1 else folder} lacks {missing[0]}")
    if extra := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{found[extra[0]][2]} has {extra[0]:.80}, which no {kind.__name__} of this configuration has")
    for name, (dtype, shape, path) in found.items():
        dtypes = FLOATS if expected[name].is_floating_point() else (INTEGERS[expected[name].dtype],)
        if dtype not in dtypes or shape != list(expected[name].shape):
            raise ValueError(
                f"{path}: {name} is {dtype} {shape}; expected {' or '.join(dtypes)} {list(expected[name].shape)}"
            )


def _check_sizes(folder: Path, config: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise ValueError for sizes that the weights cannot have, and that could take forever to build."""
    numbers = sum(torch.Size(shape).numel() for _, shape, _ in found.values())
    for name, value in config.items():
        most = len(found) if name in COUNTS else numbers
        counts = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]
        if len(counts) > len(found) or not all(0 <= each <= most for each in counts):
            raise ValueError(
                f"{folder / CONFIG_NAME} is damaged: {name} is {value!r:.80}, which the weights beside it are not of"
            )


def _check_sums(folder: Path, files: list[Path]) -> None:
    if not (folder / CHECKSUMS).exists():
        return
    sums = read_json(folder / CHECKSUMS)
    for path in files:
        name = path.relative_to(folder).as_posix()
        said = sums.get(name)
        if said != {"bytes": path.stat().st_size, "sha256": file_sha256(path)}:
            what = "is not the file that was saved" if name in sums else "was not saved with the rest"
            raise ValueError(
                f"{folder / name} {what}: save the pipeline anew, or delete {CHECKSUMS} there if the file is meant"
            )
