"""The ops on small, awkward calls: right by the rule of `benchmarks.harness.refcheck`, and the same bits when asked
again.

    python -m benchmarks.gpu.calls [--backends cuda triton] [--all]
    compute-sanitizer --error-exitcode 1 python -m benchmarks.gpu.calls --backends cuda --all

The reference runs on the CPU, so that under compute-sanitizer the GPU has the backend's own kernels and torch's copies
to run, no more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

import torch

from coalescer_fast import ops
from coalescer_fast.console import sentence
from coalescer_fast.ops.dispatch import BACKENDS

from ..harness.arguments import Parser
from ..harness.refcheck import several
from ..kernels import shapes
from ..kernels.grid import DTYPES, Cell
from ..kernels.providers import Check

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


def main(argv: Sequence[str] | None = None) -> int:
    top = Parser(prog="python -m benchmarks.gpu.calls", description=__doc__.partition("\n")[0])
    on_gpu = [name for name, backend in BACKENDS.items() if backend.device == "cuda"]
    top.add_argument(
        "--backends",
        nargs="+",
        choices=list(BACKENDS),
        default=on_gpu,
        metavar="B",
        help=f"default: {' '.join(on_gpu)}",
    )
    top.add_argument("--all", action="store_true", help="every call in every dtype (default: in one)")
    args = top.parse_args(argv)
    failures = 0
    for backend in args.backends:
        able, reason = ops.backends("bias_residual")[backend]
        start, results = (
            time.perf_counter(),
            list(check(backend, args.all)) if able else [f"FAIL {backend} cannot run: {reason}"],
        )
        wrong = [line for line in results if line]
        print(
            "\n".join(
                [*wrong, f"{backend}: {len(results)} calls, {len(wrong)} wrong, {time.perf_counter() - start:.1f} s"]
            ),
            flush=True,
        )
        failures += len(wrong)
    return 1 if failures else 0


@torch.inference_mode()
def check(backend: str, every_dtype: bool) -> Iterator[str]:
    """What is wrong with each call, or ""."""
    for n, (call, batch) in enumerate(CALLS):
        for m, (name, dtype) in enumerate(DTYPES.items()):
            if m != n % len(DTYPES) and not every_dtype:
                continue
            layout = LAYOUTS[(n + m) % len(LAYOUTS)]
            try:
                wrong = fault(
                    backend, Cell("", call, 1, batch, name), call.inputs(batch, dtype, torch.device("cpu")), layout
                )
            except Exception as error:  # whatever a backend raises is its result
                wrong = sentence(error)
            yield f"FAIL {backend} {call.op} {call} batch {batch} {name} {layout}: {wrong}" if wrong else ""


def fault(backend: str, cell: Cell, inputs: shapes.Inputs, layout: str) -> str:
    device = BACKENDS[backend].device or "cpu"
    there = {key: arranged(x.to(device), layout) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    first, second = (several(getattr(ops, cell.call.op)(**there, backend=backend)) for _ in range(2))
    if any(not torch.equal(bits(a), bits(b)) for a, b in zip(first, second)):
        return "other bits when asked again"
    return Check(cell, inputs)(tuple(x.cpu() for x in first))[1]


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


if __name__ == "__main__":
    sys.exit(main())
