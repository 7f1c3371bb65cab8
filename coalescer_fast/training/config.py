"""Training from a TOML file: its keys are the fields of the configuration dataclasses, nested ones as tables."""

from __future__ import annotations

import dataclasses
import logging
import sys
import typing
from pathlib import Path
from typing import Any, TypeVar

import torch

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


def read(path: str | Path, kind: type[T]) -> T:
    """The configuration dataclass ``kind`` of a TOML file; ValueError names a key that it does not have, or that is missing."""
    path = find(path)
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        return _build(table, kind, "")
    except (tomllib.TOMLDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _build(table: dict[str, Any], kind: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := set(table) - set(fields):
        raise ValueError(f"unknown key {where}{sorted(unknown)[0]}; known are {', '.join(fields)}")
    required = {name for name, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    if missing := required - set(table):
        raise ValueError(f"key {where}{sorted(missing)[0]} is missing")
    values = {}
    for name, value in table.items():
        nested = next((t for t in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(t)), None)
        if nested is not None:
            if not isinstance(value, dict):
                raise ValueError(f"{where}{name} is {value!r}; expected a table, [{where}{name}]")
            value = _build(value, nested, f"{where}{name}.")
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def run(kind: str, config: str | Path, data: str | Path, out: str | Path) -> None:
    """Train ``kind`` ("autoencoder" or "coalescer") by a configuration on a data set into a folder; goes on where it was stopped."""
    out = Path(out)
    if kind == "autoencoder":
        from .autoencoder import AutoencoderConfig, train_autoencoder

        train_autoencoder(read(config, AutoencoderConfig), _prepare(data, out), out)
    elif kind == "coalescer":
        from .coalescer import CoalescerConfig, train_coalescer

        train_coalescer(read(config, CoalescerConfig), _prepare(data, out), out)
    else:
        raise ValueError(f"there is no training of a {kind}; use autoencoder or coalescer")


def _prepare(data: str | Path, out: Path) -> Any:
    pictures = load(data)
    out.mkdir(parents=True, exist_ok=True)
    logger.info("%d pictures, %d held out, %d threads", len(pictures), pictures.held_out.sum(), torch.get_num_threads())
    return pictures
