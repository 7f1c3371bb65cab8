"""Training from a TOML file, whose keys are the fields of the configuration dataclasses, nested ones as tables."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..schema import build
from .data import load

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "configs"
T = TypeVar("T")


def find(name: str | Path) -> Path:
    """The file ``name``, or the committed configuration of that name."""
    for path in (Path(name), CONFIGS / f"{name}.toml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.toml")))
    raise FileNotFoundError(f"there is no configuration {name}: give a TOML file, or {known}")


def read(path: str | Path, kind: type[T], changes: Sequence[str] = ()) -> T:
    """The configuration in a TOML file.

    Args:
        path: the file, or the name of a committed configuration.
        kind: the configuration dataclass.
        changes: settings that differ from the file's, see `changed`.

    Raises:
        ValueError: for a key that is unknown or missing, or whose value has another type; it names the key.
    """
    path = find(path)
    try:
        return build(changed(tomllib.loads(path.read_text("utf-8")), changes), kind)
    except RecursionError as error:
        raise ValueError(f"{path}: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def changed(table: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """A table with other settings.

    Args:
        table: as it was read.
        changes: "key=value" each, as "seed=1" or "schedule.steps=512"; what is no TOML value is text.

    Raises:
        ValueError: for a change of another form.
    """
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"a change is {change!r}; expected key=value, as in schedule.steps=512")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        table = _with(table, key.split("."), value)
    return dict(table)


def _with(table: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    first, *rest = keys
    inner = table.get(first)
    return {**table, first: _with(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def run(
    kind: str,
    config: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    allow_changes: bool = False,
    progress: bool = True,
    init: str | None = None,
    teacher: str | None = None,
    changes: Sequence[str] = (),
    size: int | None = None,
) -> None:
    """Train on a data set, or resume where a training was stopped.

    Args:
        kind: "autoencoder" or "coalescer".
        config: the configuration, as in `find`.
        data: the data set, as in `training.data.load`.
        out: folder of checkpoints and results.
        allow_changes: resume even if the configuration or the data have changed.
        progress: show bars.
        init: of a coalescer, instead of the configuration's.
        teacher: pipeline of a coalescer's teacher, instead of the configuration's.
        changes: settings that differ from the configuration's, as in `changed`.
        size: side in pixels that pictures of a folder are reduced to; None for 64.
    """
    out = Path(out)
    options: Any = {"allow_changes": allow_changes, "progress": progress}
    if kind == "autoencoder":
        if init or teacher:
            raise ValueError("init and teacher are for a coalescer: leave them out")
        from .autoencoder import AutoencoderConfig, train_autoencoder

        train_autoencoder(read(config, AutoencoderConfig, changes), _prepare(data, out, size), out, **options)
    elif kind == "coalescer":
        from .coalescer import CoalescerConfig, train_coalescer
        from .teacher import TeacherConfig

        settings = read(config, CoalescerConfig, changes)
        if init:
            settings = replace(settings, init=init, overrides={})
        if teacher:
            settings = replace(settings, teacher=replace(settings.teacher or TeacherConfig(), pipeline=teacher))
        train_coalescer(settings, _prepare(data, out, size), out, **options)
    else:
        raise ValueError(f"there is no training of a {kind}; use autoencoder or coalescer")


def _prepare(data: str | Path, out: Path, size: int | None) -> Any:
    if size is not None and not Path(data).is_dir():
        raise ValueError(f"size is of a folder of pictures, and {data} has its own: leave --size out")
    pictures = load(data, size)
    out.mkdir(parents=True, exist_ok=True)
    logger.info("%d pictures, %d held out, %d threads", len(pictures), pictures.held_out.sum(), torch.get_num_threads())
    return pictures
