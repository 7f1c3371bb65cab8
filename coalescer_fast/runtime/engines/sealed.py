"""Dataclasses as JSON with the SHA-256 of the rest in the field ``sha256``: a file that was edited is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from ...schema import build as build_dataclass
from ...schema import table

T = TypeVar("T")


def dumps(value: Any, indent: int, ensure_ascii: bool = True) -> str:
    """The JSON text of a dataclass, sealed."""
    content = table(value)
    return json.dumps({**content, "sha256": digest(content)}, indent=indent, ensure_ascii=ensure_ascii) + "\n"


def parse(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: If it is not JSON, or nested too deeply; in one line.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def unseal(content: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The fields of the dataclass ``kind`` without their hash.

    Raises:
        ValueError: If the hash is not that of the rest, or the fields are not those of ``kind``.
    """
    rest = {name: value for name, value in content.items() if name != "sha256"}
    if content.get("sha256") != digest(rest) or set(rest) != {field.name for field in fields(kind)}:
        raise ValueError("was changed after it was written")
    return rest


def build(content: Mapping[str, Any], kind: type[T]) -> T:
    """The dataclass ``kind`` with these fields.

    Raises:
        ValueError: If a field has another type than its annotation, or is nested too deeply.
    """
    try:
        found: T = build_dataclass(content, kind)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    return found


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a table, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
