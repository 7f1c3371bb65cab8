"""What is measured: the calls of the networks, in several batches and dtypes."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from . import shapes

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Cell:
    """What the providers are compared on.

    Attributes:
        network: that makes the call.
        call: the op and its sizes.
        count: calls in one evaluation of the network.
        batch: samples.
        dtype: a key of `DTYPES`.
    """

    network: str
    call: shapes.Call
    count: int
    batch: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.call.op} {self.network} {self.call} batch {self.batch} {self.dtype}"

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from other cells in a CSV file."""
        return self.call.op, self.network, str(self.call), str(self.batch), self.dtype


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """The cells that the arguments of benchmarks.kernels ask for."""
    quick = args.quick
    if args.overhead:
        tables, batches = {"tiny": shapes.TINY}, [1]
    else:
        names = args.shapes or (["emoji-64"] if quick else ["all"])
        tables = {name: shapes.CALLS[name] for name in (shapes.CALLS if "all" in names else names)}
        batches = args.batch or ([1] if quick else [1, 4, 16, 64])
    known = {str(call) for calls in tables.values() for call in calls if call.op in args.op}
    for name in args.calls or ():
        if name not in known:
            raise ValueError(f"--calls {name!r} is no call of {', '.join(args.op)} in {', '.join(tables)}")
    for op in args.op:
        for name, calls in tables.items():
            for call, count in calls.items():
                if call.op == op and (not args.calls or str(call) in args.calls):
                    for batch in batches:
                        for dtype in args.dtypes or (["fp32"] if quick else ["fp32", "bf16"]):
                            yield Cell(name, call, count, batch, dtype)


def in_turn(grid: Sequence[Cell]) -> list[Cell]:
    """The first cell of every op, then the second of every op, and so on: wherever it is cut, every op is there."""
    count: Counter[str] = Counter()
    ranks = []
    for cell in grid:
        ranks.append(count[cell.call.op])
        count[cell.call.op] += 1
    return [cell for _, cell in sorted(zip(ranks, grid), key=lambda pair: pair[0])]
