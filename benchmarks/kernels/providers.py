"""What is measured on a call of an op: yardsticks, peers and backends, each run once and checked."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from coalescer_fast import ops
from coalescer_fast.bench.peers import OK, Peers, attempt
from coalescer_fast.ops.dispatch import BACKENDS

from ..harness import refcheck
from . import peers, shapes
from .grid import DTYPES, Cell

YARDSTICKS = ("copy", "empty")
OPS_OF = {"chunked": ("group_norm_silu",)}  # peers that have some of the ops alone
CHECKED_ELEMENTS = 2**23  # the first sample, the last one, and as many between them as this allows

PEERS = Peers()


@dataclass
class Provider:
    """A way to run the call of a cell.

    Attributes:
        run: runs it on the inputs.
        error: largest absolute error, "" if it was not checked.
        status: "ok" or "FAIL: why".
        compile_s: seconds that the first call of compiled code took.
    """

    run: Callable[[], Any]
    error: float | str = ""
    status: str = OK
    compile_s: float | str = ""


@PEERS.register("eager", *DTYPES)
def eager(op: str, inputs: shapes.Inputs, device: torch.device) -> Callable[[], Any]:
    return partial(peers.EAGER[op], **inputs)


@PEERS.register("eager_contiguous", *DTYPES)
def eager_contiguous(op: str, inputs: shapes.Inputs, device: torch.device) -> Callable[[], Any]:
    return partial(peers.EAGER[op], **{key: contiguous(value) for key, value in inputs.items()})


@PEERS.register("compile", *DTYPES)
def inductor(op: str, inputs: shapes.Inputs, device: torch.device) -> Callable[[], Any]:
    return partial(compiled(peers.EAGER[op], device), **inputs)


@PEERS.register("chunked", *DTYPES)
def chunked(op: str, inputs: shapes.Inputs, device: torch.device) -> Callable[[], Any]:
    from . import chunked  # Triton is needed for this peer alone

    return partial(chunked.group_norm_silu, **{key: contiguous(value) for key, value in inputs.items()})


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """torch.compile with dynamo reset, so that no shape becomes dynamic and no limit on recompilations is reached."""
    torch._dynamo.reset()
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


def contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) and value.ndim == 4 else value


def providers_of(cell: Cell, device: torch.device, args: argparse.Namespace) -> dict[str, Provider]:
    """The providers of a cell by name, each run once and checked."""
    inputs = cell.call.inputs(cell.batch, DTYPES[cell.dtype], device)
    torch.backends.cudnn.benchmark = False  # the reference's errors set the rule: as users have it
    check = Check(cell, inputs)
    # the peers at their best, whose algorithms are sought before anything is captured
    torch.backends.cudnn.benchmark = device.type == "cuda"
    found = dict(listed(cell, inputs, device, args))
    for name, provider in found.items():
        if name not in YARDSTICKS:
            try_out(name, provider, check, args.refcheck)
    return found


def listed(
    cell: Cell, inputs: shapes.Inputs, device: torch.device, args: argparse.Namespace
) -> Iterator[tuple[str, Provider]]:
    """Yardsticks, the peers that are asked for, and the backends that can run the call, by name."""
    op = cell.call.op
    x = torch.empty(cell.batch, cell.call.elements, dtype=DTYPES[cell.dtype], device=device).fill_(1)
    yield "copy", Provider(partial(torch.empty_like(x).copy_, x))
    if device.type == "cuda":
        yield "empty", Provider(partial(torch.zeros(1, device=device).fill_, 0))
    for name in args.peers:
        if name in PEERS and op in OPS_OF.get(name, (op,)):
            yield name, Provider(PEERS[name].prepare(op, inputs, device))
    for name, (able, _) in ops.backends(op, **inputs).items():
        # Triton's interpreter runs on the CPU, but its time says nothing
        if able and BACKENDS[name].device in (None, device.type) and name in (args.backends or BACKENDS):
            yield name, Provider(partial(getattr(ops, op), **inputs, backend=name))


def try_out(name: str, provider: Provider, check: Check, must_be_right: bool) -> None:
    """Run a provider once and note its error, its status, and how long it took to compile."""
    start = time.perf_counter()
    result, provider.status = attempt(provider.run, torch.OutOfMemoryError)
    if result is None:
        return
    if name == "compile":
        provider.compile_s = time.perf_counter() - start
    provider.error, wrong = check(result, peer=name in PEERS)
    if wrong and must_be_right:
        provider.status = f"FAIL: {wrong}"


class Check(refcheck.Refcheck):
    """Holds some samples of the results of a cell against the reference, on both memory formats."""

    def __init__(self, cell: Cell, inputs: shapes.Inputs):
        n = max(2, min(cell.batch, CHECKED_ELEMENTS // cell.call.elements))
        samples = torch.linspace(0, cell.batch - 1, n).round().long().unique()
        self.samples = samples.to(next(x for x in inputs.values() if isinstance(x, torch.Tensor)).device)
        inputs = {key: self.select(x) if key in shapes.BATCHED else x for key, x in inputs.items()}
        exact = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
        op = partial(getattr(ops, cell.call.op), backend="reference")
        plain = [op(**inputs), op(**{key: contiguous(x) for key, x in inputs.items()})]
        super().__init__(refcheck.several(op(**exact)), [refcheck.several(result) for result in plain])

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """The samples that are checked."""
        rows = x.index_select(0, self.samples)
        return rows.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else rows

    def place(self, index: tuple[int, ...]) -> tuple[int, ...]:
        return (int(self.samples[index[0]]), *index[1:])

    def __call__(self, result: torch.Tensor | refcheck.Tensors, peer: bool = False) -> tuple[float, str]:
        return super().__call__(tuple(self.select(output) for output in refcheck.several(result)), peer)
