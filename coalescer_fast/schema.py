"""Checks of what was read from JSON or TOML against type annotations.

    conform({"steps": 10}, Schedule, "schedule")      a dataclass, from a table of its fields
    conform([1, 4], tuple[Batch, ...], "batches")     where Batch = Annotated[int, between(1, 1024)]

Annotations may be str, int, float (which takes an int), bool, None, Any, unions, dict[str, X], dataclasses, other
classes, for lists Sequence[X], tuple[X, ...] and tuple[X, Y], and Annotated with a `Rule`. A bool is not a number, and
a number is finite.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union

MAX_DEPTH = 12  # levels of what is annotated as Any
OMITTED = {"omitted": True}  # metadata of a dataclass field that `table` leaves out while it is None


@dataclass(frozen=True)
class Rule:
    """A condition on a value that has the right type.

    Attributes:
        holds: whether it is fulfilled.
        expected: what the error says was expected.
    """

    holds: Callable[[Any], bool]
    expected: str


def between(least: float, most: float) -> Rule:
    """A number in a closed interval."""
    return Rule(lambda value: least <= value <= most, f"a number from {least:,} to {most:,}")


def one_of(*values: str) -> Rule:
    """One of some words."""
    return Rule(lambda value: value in values, f"one of {', '.join(values)}")


def _is_plain(name: str) -> bool:
    return bool(re.fullmatch(r"[^/\\:\x00-\x1f\x7f]{1,200}", name)) and not name.startswith(".") and name.isprintable()


# the name of a file in a folder: not hidden, and no path that leads out of it
FileName = Annotated[str, Rule(_is_plain, "the plain name of a file, without separators")]
Sha256 = Annotated[str, Rule(lambda text: bool(re.fullmatch("[0-9a-f]{64}", text)), "a SHA-256, 64 hexadecimal digits")]
WORDS = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", type(None): "nothing"}


def conform(value: Any, hint: Any, where: str) -> Any:
    """Convert a value to the type of an annotation: tables to dataclasses, lists to tuples.

    Args:
        value: as it was read.
        hint: the annotation.
        where: names the value in an error.

    Raises:
        ValueError: if the value does not have the type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        result = conform(value, arguments[0], where)
        for rule in arguments[1:]:
            if result is not None and not rule.holds(result):
                raise _wrong(value, rule.expected, where)
        return result
    if hint is Any:
        _check_depth(value, where, MAX_DEPTH)
        return value
    if origin in (Union, types.UnionType):
        return _conform_union(value, arguments, where)
    if dataclasses.is_dataclass(hint):
        return build(_table(value, where), typing.cast(type, hint), f"{where}.")
    if origin in (dict, collections.abc.Mapping):
        key_hint, hint = arguments
        items = _table(value, where).items()
        return {
            conform(key, key_hint, f"a key of {where}"): conform(each, hint, f"{where}.{key}") for key, each in items
        }
    if origin in (tuple, list, collections.abc.Sequence):
        return _conform_list(value, arguments, where)
    if hint not in WORDS:
        if not isinstance(value, hint):
            raise _wrong(value, f"a {hint.__name__}", where)
        return value
    if hint is float and type(value) is int:
        value = _to_float(value, where)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise _wrong(value, WORDS[hint], where)
    if hint is str and not _is_unicode(value):
        raise _wrong(value, "text without halves of characters", where)
    return value


def build(table: Mapping[str, Any], kind: type, where: str = "") -> Any:
    """Make a dataclass from a table of its fields.

    Args:
        table: values by the names of fields.
        kind: the dataclass.
        where: stands before a field's name in an error.

    Raises:
        ValueError: for an unknown or a missing field, or a value that does not have the type.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(table) - set(fields)):
        raise ValueError(f"unknown key {where}{unknown[0]:.80}; known are {', '.join(fields)}")
    for name, field in fields.items():
        if name not in table and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"key {where}{name} is missing")
    return kind(**{name: conform(value, hints[name], f"{where}{name}") for name, value in table.items()})


def table(value: Any) -> Any:
    """The reverse of `build`: dataclasses as tables of their fields, tuples as lists, ready for JSON."""
    if dataclasses.is_dataclass(value):
        pairs = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {
            field.name: table(each)
            for field, each in pairs
            if each is not None or OMITTED.keys().isdisjoint(field.metadata)
        }
    if isinstance(value, dict):
        return {key: table(each) for key, each in value.items()}
    return list(map(table, value)) if isinstance(value, (list, tuple)) else value


def check_arguments(table: Mapping[str, Any], function: Callable[..., Any], where: str) -> None:
    """Raise ValueError unless the table's values are arguments that the function's annotations take."""
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function, include_extras=True)
    known = [name for name in parameters if name not in ("self", "cls")]
    for name, value in _table(table, where).items():
        if name not in known:
            raise ValueError(f"unknown key {where}.{name}; known are {', '.join(known)}")
        conform(value, hints[name], f"{where}.{name}")


def _conform_union(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    failures = []
    for hint in hints:
        try:
            return conform(value, hint, where)
        except ValueError as error:
            failures.append((hint, error))
    # None aside, one error is left of an optional value; a table is compared with dataclasses alone
    there = [error for hint, error in failures if hint is not type(None)]
    there = [
        error for hint, error in failures if isinstance(value, Mapping) and dataclasses.is_dataclass(hint)
    ] or there
    if len(there) == 1:
        raise there[0]
    raise _wrong(value, " or ".join(WORDS.get(hint, "a table") for hint, _ in failures), where)


def _conform_list(value: Any, hints: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(value, "a list", where)
    if len(hints) == 1 or (len(hints) == 2 and hints[1] is Ellipsis):
        hints = (hints[0],) * len(value)
    if len(value) != len(hints):
        raise _wrong(value, f"a list of {len(hints)}", where)
    return tuple(conform(each, hint, f"{where}[{i}]") for i, (each, hint) in enumerate(zip(value, hints)))


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong(value, "a table", where)
    return value


def _to_float(value: int, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise _wrong("a number of many digits", WORDS[float], where) from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_depth(value: Any, where: str, left: int) -> None:
    """Raise ValueError for lists and tables too deep in each other to be walked."""
    if isinstance(value, (dict, list, tuple)):
        if not left:
            raise ValueError(f"{where} is nested too deeply; expected at most {MAX_DEPTH} levels")
        for each in value.values() if isinstance(value, dict) else value:
            _check_depth(each, where, left - 1)


def _wrong(value: Any, expected: str, where: str) -> ValueError:
    return ValueError(f"{where} is {shown(value)}; expected {expected}")


def shown(value: Any) -> str:
    """Show a value in a message: short and in one line, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
