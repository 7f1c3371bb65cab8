"""Exported graphs in ONNX Runtime on a CPU: int8 and the float32 that it was made from, in turn, and what int8 costs.

    python -m benchmarks.export --csv benchmarks/results/cpu/export.csv

The model is exported and quantized as by `coalescer-export onnx` and `quantize`, and both graphs are timed on the
inputs of a real call. Errors are those that `quantize` measures, against the reference on 64 names that calibration
never saw. Threads are ONNX Runtime's.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import coalescer_fast
from coalescer_fast.bench import environment as machine
from coalescer_fast.bench import timing
from coalescer_fast.pipeline import CoalescerPipeline
from coalescer_fast.runtime.engines import onnxruntime
from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.manifest import KINDS

from ..harness.arguments import Parser, add_timing_options, command, listed, positive, positive_list
from ..harness.results import Row, append, open_csv

METHODS = ("max", "percentile", "entropy")
BUDGET = 3.0
PROMPTS = 64  # to calibrate on
PROVIDER = "CPUExecutionProvider"
ERRORS = {  # what a manifest calls an error -> its column
    "direction, relative L2 error": "direction_error",
    "direction, cosine, minimum": "cosine_minimum",
    "distance, relative error, maximum": "distance_error",
    "pictures: PSNR, median": "psnr_median_db",
    "pictures: PSNR, minimum": "psnr_minimum_db",
    "largest error": "largest_error",
}
COLUMNS = (
    *("model", "what", "precision", "batch", "threads", "provider", "metric_unit", *timing.TIMES),
    *("images_per_s", "speedup_over_fp32", *ERRORS.values(), "error_pictures"),
    *("recipe", "method", "megabytes", "samples", "quiet"),
    *("allocator", "timestamp", "cpu", "python", "torch", "onnx", "onnxruntime", "coalescer_fast"),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return command("python -m benchmarks.export", lambda: run(args))


def parser() -> Parser:
    top = Parser(prog="python -m benchmarks.export", description=__doc__.partition("\n")[0])
    top.add_argument(
        "--model", default="emoji-64", help="an embedded model, a folder or a Hub id (default: %(default)s)"
    )
    top.add_argument(
        "--what", type=listed(*KINDS), default=list(KINDS), metavar="K,K", help=f"default: {','.join(KINDS)}"
    )
    top.add_argument("--batch", type=positive_list, default=[1, 4, 16], metavar="N,N", help="default: 1,4,16")
    top.add_argument("--method", choices=METHODS, default="percentile", help="of calibration (default: %(default)s)")
    top.add_argument(
        "--prompts", type=positive, default=PROMPTS, metavar="N", help="to calibrate on (default: %(default)s)"
    )
    add_timing_options(top, BUDGET, "one batch of a graph")
    return top


def run(args: argparse.Namespace) -> int:
    if args.csv is not None:
        open_csv(args.csv, COLUMNS)
    print("Milliseconds, the median, and the 20 and 80 % quantiles; ~ marks a time that other processes disturbed.")
    with timing.settings(args.threads, args.allocator == "keep"), torch.no_grad():
        for rows in benchmark(args):
            rows = [{**dict.fromkeys(COLUMNS, ""), **environment(), "allocator": args.allocator, **row} for row in rows]
            if args.csv is not None:
                append(args.csv, rows, COLUMNS)
    return 0


def benchmark(args: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of one batch of a graph after the other, each printed as soon as it is measured."""
    from export.onnx import exporter
    from export.quantize import quantizer  # the checkout's, which need not be installed

    pipe = CoalescerPipeline.from_pretrained(args.model)
    sizes = min(args.batch), min(max(4, min(args.batch)), max(args.batch)), max(args.batch)
    for what in args.what:
        with tempfile.TemporaryDirectory() as folder:
            folders = [Path(folder) / name for name in ("fp32", "int8")]
            for each in folders:
                each.mkdir()
            exact = exporter.export_onnx(pipe, what, folders[0], model=args.model, batch=sizes)
            int8 = quantizer.quantize_artefact(
                pipe, exact, folders[1], method=args.method, prompts=args.prompts, force=True
            )
            for batch in args.batch:
                rows = measure(pipe, (exact, int8), batch, args.budget or BUDGET)
                for row in rows:
                    row["model"] = args.model
                    print(line(row), flush=True)
                yield rows


def measure(pipe: CoalescerPipeline, found: Sequence[Artefact], batch: int, budget: float) -> list[Row]:
    """A row for each artefact, the first of which is in float32."""
    from coalescer_fast.parity import descriptions
    from export.measure import reference

    m = replace(found[0].manifest, batch=(batch, batch, batch))
    (inputs, *_) = reference.graph_inputs(pipe, m, descriptions(pipe, batch, torch.Generator().manual_seed(0)), 0)
    timer = timing.CpuTimer()
    samples = {}
    for each in found:
        opened = onnxruntime.open_artefact(each)
        samples[each.manifest.precision] = timer.warm(partial(opened, inputs))
    taken = timing.interleave(samples, budget)
    first = timing.quantiles(taken[m.precision])[0]
    rows = []
    for each in found:
        mine, manifest = taken[each.manifest.precision], each.manifest
        median = timing.quantiles(mine)[0]
        row: Row = {
            "what": manifest.kind,
            "precision": manifest.precision,
            "batch": batch,
            "provider": PROVIDER,
            "metric_unit": "ms",
            **timing.columns(mine, 1e3),
            "images_per_s": batch / median,
            "speedup_over_fp32": first / median,
            "recipe": manifest.recipe,
            "method": manifest.flags.int8.method if manifest.flags.int8 else "",
            "error_pictures": manifest.measured.pictures or 0,
            "megabytes": sum(file.bytes for file in manifest.files.values()) / 1e6,
        }
        errors = manifest.measured.error or {}
        rows.append(row | {ERRORS[name]: value for name, value in errors.items() if name in ERRORS})
    return rows


def line(row: Row) -> str:
    mark = " " if row["quiet"] else "~"
    words = f"{row['model']} {row['what']:9} {row['precision']} batch {row['batch']:3} {row['y_value_50']:9.2f}{mark}"
    words += f" {row['y_value_20']:9.2f} -{row['y_value_80']:9.2f}  {row['speedup_over_fp32']:.2f}x"
    return words + (f"  median {row['psnr_median_db']:.1f} dB" if "psnr_median_db" in row else "")


def environment() -> Row:
    """The columns that are the same in all rows of a run."""
    found = machine.environment()
    del found["gpu"]
    found |= {**machine.versions("onnx", "onnxruntime"), "timestamp": machine.timestamp()}
    return {**found, "coalescer_fast": coalescer_fast.__version__}
