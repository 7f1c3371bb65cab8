"""How far the results of a network are from the reference."""

from __future__ import annotations

import torch

Tensors = tuple[torch.Tensor, ...]


def relative_errors(result: Tensors, expected: Tensors) -> list[float]:
    """||y - expected||_2 / ||expected||_2 of each output, for results of a whole network.

    Raises:
        ValueError: for a result of another shape.
    """
    for y, e in zip(result, expected):
        if y.shape != e.shape:
            raise ValueError(f"result has shape {tuple(y.shape)}, expected {tuple(e.shape)}")
    return [float((y.double() - e.double()).norm() / e.double().norm()) for y, e in zip(result, expected)]
