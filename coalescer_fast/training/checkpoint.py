"""Checkpoints of a training: a file of torch.save that ends in a line with the SHA-256 of everything before it.

`torch.load` reads it like any other file. `read` checks the hash before a byte is unpickled, and unpickles only
tensors, numbers and text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch

from .. import files
from ..schema import between, build

FORMAT = 1
HEAD = b"\ncoalescer_fast checkpoint, SHA-256 "
TAIL = len(HEAD) + 64 + 1  # with the hash in hexadecimal and a newline
ANEW = "remove it to begin anew"

Count = Annotated[int, between(0, 2**62)]


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training.

    Attributes:
        step: steps that were taken.
        ema_updates: updates of the averaged weights.
        settings: what decides the training, name -> JSON, see `flat`.
        model: weights.
        ema: averaged weights.
        optimizer: state of the optimizer.
        format: of the file.
    """

    step: Count
    ema_updates: Count
    settings: dict[str, str]
    model: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """Write the checkpoint. Raises ValueError for numbers that are not finite, and leaves the file as it was."""
        for name in ("model", "ema", "optimizer"):
            _check_finite(getattr(self, name), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.writing(path) as file:
            torch.save({field.name: getattr(self, field.name) for field in fields(self)}, file)
            file.seek(0)
            digest = files.sha256(file)
            file.write(HEAD + digest.encode() + b"\n")


def read(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises ValueError for a file that `Checkpoint.write` has not written, or that has changed."""
    if not path.is_file():
        raise ValueError(f"{path} is no file: remove it to begin anew, or train into another folder")
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - TAIL
            file.seek(max(size, 0))
            tail = file.read()
            file.seek(0)
            digest = files.sha256(file, max(size, 0))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({(error.strerror or str(error)).lower()}): {ANEW}") from error
    if not tail.startswith(HEAD):
        raise ValueError(f"{path} is damaged, or of an older version, for it has no checksum at its end: {ANEW}")
    if tail != HEAD + digest.encode() + b"\n":
        raise ValueError(f"{path} is damaged, it is not as it was written: {ANEW}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"it is not in format {FORMAT}")
        found: Checkpoint = build(state, Checkpoint)
        for name in ("model", "ema", "optimizer"):
            _check_finite(getattr(found, name), name)
    except Exception as error:  # the unpickler's are of every kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is no checkpoint that a training can go on from ({reason:.300}): {ANEW}") from error
    return found


def flat(values: Mapping[str, Any], where: str = "") -> dict[str, str]:
    """{"a": {"b": [1, 2]}} -> {"a.b": "[1, 2]"}."""
    out: dict[str, str] = {}
    for key, value in values.items():
        out |= flat(value, f"{where}{key}.") if isinstance(value, Mapping) else {f"{where}{key}": json.dumps(value)}
    return out


def difference(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first setting that has changed, in words, or ""."""
    for name in (*now, *then):
        if then.get(name) != now.get(name):
            if name == "data":
                return "other pictures or descriptions"
            return f"{name} {then.get(name, 'not set'):.80}, which is {now.get(name, 'not set'):.80} now"
    return ""


def _check_finite(state: Any, where: str) -> None:
    if isinstance(state, torch.Tensor):
        if not state.isfinite().all():
            raise ValueError(f"{where} holds numbers that are not finite")
    elif isinstance(state, (dict, list, tuple)):
        for key, each in state.items() if isinstance(state, dict) else enumerate(state):
            _check_finite(each, f"{where}.{key}")
