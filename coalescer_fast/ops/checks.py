"""Checks of arguments that the ops share.

Each raises TypeError or ValueError with one sentence that names the argument, its value and what is allowed.
"""

from __future__ import annotations

import sys
from numbers import Integral, Real

import torch

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


_STRIDED = torch.strided


def floating(name: str, value: torch.Tensor | None) -> torch.Tensor:
    """``value``, a dense tensor of one of `FLOATING`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {shown(value)}; expected a torch.Tensor")
    if value.dtype not in FLOATING:
        raise ValueError(f"{name} has dtype {value.dtype}; expected {', '.join(map(str, FLOATING))}")
    if value.layout is not _STRIDED or value.is_nested:
        found = "nested" if value.is_nested else f"of {value.layout}"
        raise ValueError(f"{name} is {found}; expected a dense tensor, of torch.strided")
    return value


def tensor(
    name: str, value: torch.Tensor | None, expected: tuple[int, ...], device: torch.device, optional: bool = True
) -> None:
    """Check that ``value`` is `floating`, of the shape ``expected``, and on ``device``, the first argument's.

    Args:
        name: of the argument.
        value: the argument; may be None if ``optional``.
        expected: its shape.
        device: its device.
        optional: whether None is allowed.
    """
    if value is None and optional:
        return
    value = floating(name, value)
    if value.shape != expected:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {tuple(expected)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; expected {device}, where the first argument is")


def integer(name: str, value: int) -> int:
    """``value``, an integer of any type but bool, as an int."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        raise TypeError(f"{name} is {shown(value)}; expected an int")
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def number(name: str, value: float) -> float:
    """``value``, a real number that is finite in float64."""
    if not isinstance(value, (float, int, torch.SymFloat, torch.SymInt, Real)):
        raise TypeError(f"{name} is {shown(value)}; expected a number")
    value = value if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)) else float(value)
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name} is {value}; expected a finite number")
    return value


def choice(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    """Check that ``value`` is one of ``allowed``."""
    if not isinstance(value, (str, type(None))) or value not in allowed:
        raise ValueError(f"{name} is {shown(value)}; use one of {', '.join(map(repr, allowed))}")


def shown(value: object) -> str:
    """A value of any type, in a few words."""
    return repr(value) if isinstance(value, (str, bool, int, float, type(None))) else f"of type {type(value).__name__}"
