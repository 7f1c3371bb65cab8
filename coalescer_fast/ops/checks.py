"""Argument checks that the ops share; each raises ValueError with one sentence that names the argument, its value and what is allowed."""

from __future__ import annotations

import torch


def tensor(name: str, value: torch.Tensor | None, expected: tuple[int, ...], device: torch.device) -> None:
    """``value``, unless None, has exactly the shape ``expected`` and lies on ``device``, the first argument's."""
    if value is None or (value.shape == expected and value.device == device):
        return
    if value.shape != expected:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {tuple(expected)}")
    raise ValueError(f"{name} is on {value.device}; expected {device}, where the first argument is")


def floating(name: str, value: torch.Tensor) -> None:
    if not value.dtype.is_floating_point:
        raise ValueError(f"{name} has dtype {value.dtype}; expected a floating-point dtype")


def choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(repr, allowed))}")
