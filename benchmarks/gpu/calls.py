"""The ops on small, awkward calls: right by the rule of `benchmarks.harness.refcheck`, and the same bits when asked
again.

    python -m benchmarks.gpu.calls [--backends cuda triton] [--all] [--failures F.pt]
    compute-sanitizer --error-exitcode 1 python -m benchmarks.gpu.calls --backends cuda --all
    python -m benchmarks.gpu.calls --emulated       # on a CPU: CUDA's emulation, Triton's interpreter

The reference runs on the CPU, so that under compute-sanitizer the GPU has the backend's own kernels and torch's copies
to run, no more. What is wrong with a call ends in the first wrong element; the first few such calls are kept with their
inputs in the file of --failures, which `benchmarks.gpu.replay` runs on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coalescer_fast import files, ops
from coalescer_fast.console import sentence
from coalescer_fast.ops.dispatch import BACKENDS

from ..harness.arguments import Parser, command
from ..harness.refcheck import several
from ..kernels import shapes
from ..kernels.grid import DTYPES, Cell
from ..kernels.providers import Check
from . import emulated

# with their batches: vectors with a rest, groups that are no power of two, one group and C groups, several tiles
CALLS: tuple[tuple[shapes.Call, int], ...] = (
    (shapes.GroupNorm(96, size=8, groups=8, film=True, pre_bias=True), 2),
    (shapes.GroupNorm(20, skip=12, size=5, groups=8), 3),
    (shapes.GroupNorm(30, size=7, groups=3, activation=None, film=True), 1),
    (shapes.GroupNorm(64, size=32, groups=1), 2),
    (shapes.GroupNorm(10, size=2, groups=10, pre_bias=True), 5),
    (shapes.GroupNorm(320, skip=320, size=32, groups=32, film=True, pre_bias=True), 1),
    (shapes.BiasResidual(7, size=3), 3),
    (shapes.BiasResidual(256, size=17), 2),
    (shapes.BiasResidual(40, size=32), 1),
    (shapes.DualHead(96, latent=16, size=8, anchored=True), 2),
    (shapes.DualHead(33, latent=3, size=5), 3),
    (shapes.DualHead(128, latent=4, size=32, anchored=True), 1),
    (shapes.CoalesceStep(16, size=8, mode="unit"), 2),
    (shapes.CoalesceStep(3, size=7, mode="raw"), 5),
    (shapes.CoalesceStep(4, size=64, mode="unit"), 1),
)
LAYOUTS = ("channels_last", "contiguous", "sliced")
KEPT, KEPT_BYTES = 8, 1 << 20  # failures that are kept, and the most that the inputs of one may take


@dataclass
class Trial:
    """A call on a backend.

    Attributes:
        backend: that runs it.
        number: of the call in `CALLS`.
        dtype: a key of `DTYPES`.
        layout: of its images, one of `LAYOUTS`.
        wrong: what is wrong with the result, or "".
        worst: its error as a share of what is allowed.
    """

    backend: str
    number: int
    dtype: str
    layout: str
    wrong: str = ""
    worst: float = 0.0

    def __str__(self) -> str:
        call, batch = CALLS[self.number]
        return f"{self.backend} {call.op} {call} batch {batch} {self.dtype} {self.layout}"

    def inputs(self) -> shapes.Inputs:
        """On the CPU, the same on every machine."""
        call, batch = CALLS[self.number]
        return call.inputs(batch, DTYPES[self.dtype], torch.device("cpu"))

    def run(self, inputs: shapes.Inputs) -> None:
        call, batch = CALLS[self.number]
        try:
            self.wrong, self.worst = fault(self.backend, Cell("", call, 1, batch, self.dtype), inputs, self.layout)
        except Exception as error:  # whatever a backend raises is its result
            self.wrong = sentence(error)


def main(argv: Sequence[str] | None = None) -> int:
    top = Parser(prog="python -m benchmarks.gpu.calls", description=__doc__.partition("\n")[0])
    on_gpu = ["cuda", "triton"]  # Triton's compiler takes longest
    top.add_argument(
        "--backends",
        nargs="+",
        choices=list(BACKENDS),
        default=on_gpu,
        metavar="B",
        help=f"default: {' '.join(on_gpu)}",
    )
    top.add_argument("--all", action="store_true", help="every call in every dtype (default: in one)")
    top.add_argument("--emulated", action="store_true", help="on a CPU: CUDA's emulation, Triton's interpreter")
    top.add_argument("--failures", type=Path, metavar="F.pt", help="keep the first calls that are wrong")
    args = top.parse_args(argv)
    return command(top.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    if args.emulated:
        emulated.use()
    if args.failures is not None:
        args.failures.unlink(missing_ok=True)  # those of an earlier run
    failures: list[Trial] = []
    refused = 0
    for backend in args.backends:
        able, reason = ops.backends("bias_residual")[backend]
        if not able:
            refused += 1
            print(f"FAIL {backend} cannot run: {reason}", flush=True)
            continue
        start = time.perf_counter()
        trials = list(check(backend, args.all))
        wrong = [trial for trial in trials if trial.wrong]
        failures += wrong
        if args.failures is not None and failures:
            keep(failures, args.failures)
        worst = max((trial.worst for trial in trials), key=lambda share: (share != share, share))
        line = f"{backend}: {len(trials)} calls, {len(wrong)} wrong, worst error {worst:.2f} of what is allowed"
        print("\n".join([*(f"FAIL {trial}: {trial.wrong}" for trial in wrong), line]), end=", ")
        print(f"{time.perf_counter() - start:.1f} s", flush=True)
    return 1 if failures or refused else 0


@torch.inference_mode()
def check(backend: str, every_dtype: bool) -> Iterator[Trial]:
    """Every call, run; in one dtype, or in all."""
    for n in range(len(CALLS)):
        for m, name in enumerate(DTYPES):
            if m != n % len(DTYPES) and not every_dtype:
                continue
            trial = Trial(backend, n, name, LAYOUTS[(n + m) % len(LAYOUTS)])
            if refusal := untestable(backend, name):
                print(f"left out {trial}: {refusal}", file=sys.stderr)
                continue
            trial.run(trial.inputs())
            yield trial


def untestable(backend: str, dtype: str) -> str:
    """Why the stand-in for a GPU cannot run this dtype, or ""."""
    support = BACKENDS[backend].support
    probe = torch.empty(0, dtype=DTYPES[dtype])
    return support.refusal(probe) if support is not None and support.INTERPRETED else ""


def fault(backend: str, cell: Cell, inputs: shapes.Inputs, layout: str) -> tuple[str, float]:
    """What is wrong with a call, or "", and its error as a share of what is allowed."""
    support = BACKENDS[backend].support
    device = "cpu" if support is None or support.INTERPRETED else BACKENDS[backend].device or "cpu"
    there = {key: arranged(x.to(device), layout) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    first, second = (several(getattr(ops, cell.call.op)(**there, backend=backend)) for _ in range(2))
    unsteady = any(not torch.equal(bits(a), bits(b)) for a, b in zip(first, second))
    rule = Check(cell, inputs)
    wrong = rule(tuple(x.cpu() for x in first))[1]
    return "; ".join(filter(None, ["other bits when asked again" * unsteady, wrong])), rule.worst


def arranged(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same images with other strides; sliced: every other column of wider ones."""
    if x.ndim != 4 or layout == "channels_last":
        return x
    if layout == "contiguous":
        return x.contiguous()
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().contiguous().view(torch.uint8)


def keep(failures: Sequence[Trial], path: Path) -> None:
    """Write the first of them, with their inputs unless they are large: those can be drawn again."""
    kept: list[dict[str, Any]] = []
    for trial in failures[:KEPT]:
        inputs = trial.inputs()
        size = sum(x.nbytes for x in inputs.values() if isinstance(x, torch.Tensor))
        kept.append({**vars(trial), "call": str(trial), "inputs": inputs if size <= KEPT_BYTES else None})
    with files.writing(path) as file:
        torch.save(kept, file)


if __name__ == "__main__":
    sys.exit(main())
