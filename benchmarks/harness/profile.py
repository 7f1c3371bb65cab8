"""Where a native program spends its time: its steps, measured one by one, by kind and form, and by shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from coalescer_fast.dtypes import dtype_name
from coalescer_fast.runtime.native.program import Program
from coalescer_fast.runtime.native.steps import Description

from .tables import Table

Steps = Sequence[tuple[Description, float]]
SHAPES = 15  # rows of the table by shape

COLUMNS = {
    "step": "<28",
    "form": "<22",
    "dtype": "<8",
    "steps": ">5",
    "ms": ">9",
    "%": ">5",
    "GFLOP": ">8",
    "GFLOP/s": ">8",
    "% of peak": ">9",
    "GB/s": ">7",
}


def report(program: Program, peak: Callable[[torch.dtype], float], rounds: int) -> Iterator[str]:
    """Lines of text: all steps by kind and form, and the shapes that take most of the time.

    Args:
        program: that has run, so that its values are there.
        peak: billions of operations a second that the processor can do in a dtype.
        rounds: see `Program.profile`.
    """
    steps = program.profile(rounds)
    whole = sum(seconds for _, seconds in steps)
    yield f"{len(steps)} steps, {1e3 * whole:.2f} ms one by one"
    yield from table(steps, peak, lambda step: (step.kind, step.form, dtype_name(step.dtype)))
    yield f"by shape, the first {SHAPES}"
    yield from table(steps, peak, lambda step: (f"{step.kind} {step.shape}", step.form, dtype_name(step.dtype)), SHAPES)


def table(
    steps: Steps,
    peak: Callable[[torch.dtype], float],
    key: Callable[[Description], tuple[str, str, str]],
    most: int | None = None,
) -> Iterator[str]:
    """The steps summed by a key of (step, form, dtype), longest first, at most so many rows."""
    whole = sum(seconds for _, seconds in steps)
    groups: dict[tuple[str, str, str], list[tuple[Description, float]]] = {}
    for step, seconds in steps:
        groups.setdefault(key(step), []).append((step, seconds))
    names = max([28, *(len(name) for name, *_ in groups)]) + 1
    columns = Table({**COLUMNS, "step": f"<{names}"}, "  ")
    yield columns.head
    for labels, found in sorted(groups.items(), key=lambda item: -sum(s for _, s in item[1]))[:most]:
        seconds = sum(s for _, s in found)
        gflop = sum(step.flop for step, _ in found) / 1e9
        top = peak(found[0][0].dtype) if gflop else 0.0
        yield columns.line(
            *labels,
            len(found),
            f"{1e3 * seconds:.3f}",
            f"{100 * seconds / whole:.1f}",
            f"{gflop:.3f}" if gflop else "",
            f"{gflop / seconds:.0f}" if gflop else "",
            f"{100 * gflop / seconds / top:.0f}" if gflop else "",
            f"{sum(step.bytes for step, _ in found) / 1e9 / seconds:.1f}",
        )
