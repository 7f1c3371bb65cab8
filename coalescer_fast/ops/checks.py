"""Argument checks that the ops share; each raises ValueError with one sentence that names the argument, its value and what is allowed."""

from __future__ import annotations

import torch


def shape(name: str, tensor: torch.Tensor | None, expected: tuple[int, ...]) -> None:
    """``tensor``, unless None, has exactly the shape ``expected``."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}")


def device(reference: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """All ``tensors`` that are not None lie on the device of ``reference``."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {reference.device}, where the first argument is")


def floating(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype")


def choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(repr, allowed))}")
