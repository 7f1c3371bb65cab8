"""Checks that nothing becomes a picture which is not a finite number."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from .ops.checks import floating


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. True of integers, and of a tensor without data."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.layout != torch.strided:
        return True
    found = tensor.detach()
    # torch has no isfinite of 8-bit floats
    return bool(torch.isfinite(found if found.element_size() > 1 else found.float()).all())


def check_readable(name: str, tensor: object) -> None:
    """Check that something is a dense floating-point tensor with data, of 16 bits or more.

    Raises:
        TypeError, ValueError: if it is not; the message begins with ``name``.
    """
    floating(name, tensor)  # type: ignore[arg-type]
    if tensor.is_meta:  # type: ignore[attr-defined]
        raise ValueError(f"{name} is on device meta, without data; expected a tensor with data")


def check_finite(module: nn.Module, name: str) -> None:
    """Raise ValueError if a weight or buffer of ``module`` is not finite; the message begins with ``name``."""
    for key, tensor in chain(module.named_parameters(), module.named_buffers()):
        if not is_finite(tensor):
            raise ValueError(f"{name}.{key} holds a number that is not finite: load or train its weights anew")


def first_not_finite(batch: Tensor) -> int | None:
    """Index of the first sample of a batch (N, ...) that is not finite, or None."""
    bad = ~batch.isfinite().flatten(1).all(1)
    return int(bad.nonzero()[0]) if bad.any() else None


def nan_where_not_finite(pictures: Tensor, latents: Tensor) -> Tensor:
    """Pictures (N, 3, H, W), all NaN where the latents (N, C, h, w) they were decoded from are not finite.

    A decoder clamps its input and would make a picture of infinity.
    """
    finite = latents.isfinite().flatten(1).all(1)[:, None, None, None]
    return pictures.where(finite, torch.nan)
