"""Prompts to measure an int8 artefact on: never those that it was calibrated on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from coalescer_fast.parity import descriptions
from coalescer_fast.runtime.engines.artefact import Artefact

from .ranges import FILE, read_ranges

if TYPE_CHECKING:
    from coalescer_fast.pipeline import CoalescerPipeline


def held_out(pipe: CoalescerPipeline, seen: Iterable[str], number: int, seed: int) -> list[str]:
    """Draw names that the model was trained on, but none of those in ``seen``.

    Args:
        pipe: The pipeline.
        seen: Names that were calibrated on.
        number: How many names to draw.
        seed: Decides the order.

    Raises:
        ValueError: If there are too few.
    """
    known = pipe.description_encoder.known_names
    unseen = set(known) - set(seen)
    order = descriptions(pipe, len(known), torch.Generator().manual_seed(seed))
    names = [name for name in order if name in unseen][:number]
    if len(names) < number:
        there = f"of the model's {len(known)} names {len(names)} are not calibrated on"
        needed = f"{number} are needed to measure it"
        raise ValueError(f"{there}, and {needed}: calibrate on fewer (--calibration-prompts)")
    return names


def prompts_for(pipe: CoalescerPipeline, found: Artefact, number: int, seed: int) -> int | list[str]:
    """The prompts of `accuracy.compare`: a number, or for a quantized artefact `held_out` names."""
    path = found.folder / FILE
    return held_out(pipe, read_ranges(path).prompts, number, seed) if path.is_file() else number
