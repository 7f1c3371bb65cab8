"""The CPU kernels as two compilers make them: speed of the same products, and whether the bits are the same.

    COALESCER_FAST_TARGET=x86_64-linux python setup.py build_py --build-lib build/zig
    python -m benchmarks.kernels.compilers build/zig/coalescer_fast/lib/libcoalescer_fast_cpu.so --isa avx2,avx512_bf16

The products are those of `benchmarks.kernels.products`, in float32 or bfloat16, caches warm. This library and the other
one are measured in turn; ``y_value_50`` is the other's median time over this one's.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from coalescer_fast.bench import timing
from coalescer_fast.ops import native_library

from ..harness.arguments import Parser, add_timing_options, command, listed
from ..harness.results import Row, append, open_csv
from ..harness.tables import Table
from . import products

BUDGET = 1.0
DTYPES = {name: dtype for name, dtype in products.DTYPES.items() if name != "int8"}
HERE = native_library.FOLDER / "libcoalescer_fast_cpu.so"
COLUMNS = (
    *("kind", "network", "call", "form", "dtype", "isa", "metric_unit", "y_value_50", "same_bits", "milliseconds"),
    *("samples", "quiet", "timestamp", "cpu", "threads", "python", "torch", "coalescer_fast"),
)


@functools.cache
def loaded(path: Path) -> ctypes.CDLL:
    library, reason = native_library.find("cpu", path)
    if library is None:
        raise ValueError(reason)
    library.cf_cpu_isa.restype = ctypes.c_char_p
    library.cf_cpu_set_openmp(*native_library._openmp())
    return library


@contextmanager
def using(path: Path) -> Iterator[None]:
    """Inside, the package calls the library at the path, and so do programs that are made inside."""
    library = loaded(path)
    native_library.function.cache_clear()
    try:
        with patch.object(native_library, "_load", lambda: (library, "")):
            yield
    finally:
        native_library.function.cache_clear()


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return command("python -m benchmarks.kernels.compilers", lambda: run(args))


def parser() -> Parser:
    top = Parser(prog="python -m benchmarks.kernels.compilers", description=__doc__.partition("\n")[0])
    top.add_argument("other", type=Path, metavar="LIBRARY", help="what the other compiler made")
    kinds = ("convolution", "linear", "attention")
    top.add_argument("--kind", type=listed(*kinds), default=list(kinds), metavar="K,K", help="default: all")
    top.add_argument("--shapes", type=listed(*products.CALLS), default=["emoji-64", "m"], metavar="M,M")
    top.add_argument("--dtypes", type=listed(*DTYPES), default=["fp32"], metavar="D,D", help="default: fp32")
    top.add_argument("--isa", type=listed(*native_library.ISAS), metavar="I,I", help="default: the best")
    add_timing_options(top, BUDGET, "one call in one form")
    return top


def run(args: argparse.Namespace) -> int:
    if reason := native_library.unavailable():
        raise ValueError(f"there is nothing to compare with: {reason}")
    if args.csv is not None:
        open_csv(args.csv, COLUMNS)
    table = Table({"call": "<44", "form": "<13", "dtype": "<6", "isa": "<12", "ms": ">9", "other": ">7", "bits": ">7"})
    status, best = 0, native_library.isa()
    with timing.settings(args.threads, args.allocator == "keep"), torch.inference_mode(False), torch.no_grad():
        common = products.environment() | {"metric_unit": "ratio"}
        print(table.head)
        try:
            for row in benchmark(args):
                status |= not row["same_bits"]
                cells = (
                    row["form"],
                    row["dtype"],
                    row["isa"],
                    f"{row['milliseconds']:.3f}",
                    f"{row['y_value_50']:.2f}",
                )
                said = "same" if row["same_bits"] else "DIFFER"
                print(table.line(f"{row['kind']} {row['call']}", *cells, said), flush=True)
                if args.csv is not None:
                    append(args.csv, [common | row], COLUMNS)
        finally:
            native_library.set_isa(best)
    return status


def benchmark(args: argparse.Namespace) -> Iterator[Row]:
    for network in args.shapes:
        for make in products.CALLS[network]:
            call = make().eval().requires_grad_(False)
            for isa in args.isa or [native_library.isa()]:
                for dtype in args.dtypes if call.kind in args.kind else []:
                    labels: Row = {"kind": call.kind, "network": network, "call": call.label, "dtype": dtype}
                    for row in compare(call, dtype, isa, args):
                        yield labels | {"isa": isa} | row


def sampled(path: Path, provider: products.Provider) -> timing.Sample:
    """Takes a measurement of a program of the library at the path."""
    with using(path):
        sample = timing.CpuTimer().warm(provider.run)

    def measured() -> timing.Measurement:
        with using(path):
            return sample()

    return measured


def compare(call: products.Call, dtype: str, isa: str, args: argparse.Namespace) -> Iterator[Row]:
    """A row for each form of a call."""
    given = call.given(1)
    found: dict[Path, list[products.Provider]] = {}
    for path in (HERE, args.other):
        with using(path):
            found[path] = list(products.ours(call, given, dtype, isa))
    for pair in zip(*found.values(), strict=True):
        results = [provider.result() for provider in pair]
        samples = {str(path): sampled(path, provider) for path, provider in zip(found, pair, strict=True)}
        taken = timing.interleave(samples, args.budget or BUDGET)
        here, other = (timing.quantiles(mine)[0] for mine in taken.values())
        quiet = all(m.quiet for mine in taken.values() for m in mine)
        yield {
            "form": pair[0].row["form"],
            "y_value_50": other / here,
            "milliseconds": 1e3 * here,
            "same_bits": int(torch.equal(*results)),
            "samples": min(map(len, taken.values())),
            "quiet": int(quiet),
        }


if __name__ == "__main__":
    sys.exit(main())
