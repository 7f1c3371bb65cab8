"""Which implementation of an op runs: the explicit backend that was asked for, or the fastest one that supports the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_implementations: dict[str, dict[str, Callable[..., Any]]] = {}


def register(op: str, backend: str, function: Callable[..., Any]) -> None:
    """Make ``function`` the implementation of ``op`` on ``backend``; later ones are preferred by "auto"."""
    _implementations.setdefault(op, {})[backend] = function


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that runs ``op`` on ``backend`` ("auto": the fastest). Raises ValueError for a backend that does not exist."""
    known = _implementations[op]
    if backend == "auto":
        return next(reversed(known.values()))
    if backend not in known:
        raise ValueError(f"backend {backend!r} is unknown to {op}: use auto or {', '.join(known)}")
    return known[backend]


def backends(op: str, *args: Any, **kwargs: Any) -> dict[str, tuple[bool, str]]:
    """For every backend of ``op``: whether it can run the call with these arguments, and if not, why."""
    if op not in _implementations:
        raise ValueError(f"op {op!r} is unknown: use {', '.join(_implementations)}")
    return {name: (True, "") for name in _implementations[op]}
