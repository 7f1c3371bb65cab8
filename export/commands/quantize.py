"""Write exported artefacts in int8, calibrated on the two-step trajectories of real prompts.

The result is for the engine that the source was exported for, ONNX Runtime on a CPU or TensorRT. If it is beyond the
error budget, or no faster than the source on this machine, it is written only with --force.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from coalescer_fast import files
from coalescer_fast.console import natural, open_pipeline, positive
from coalescer_fast.files import check_writable
from coalescer_fast.runtime.engines import artefact
from coalescer_fast.runtime.engines.manifest import MANIFEST
from coalescer_fast.runtime.engines.writing import creating

from ..quantize.calibration import METHODS, PERCENTILE, PROMPTS
from ..quantize.ranges import read_ranges
from . import stage

if TYPE_CHECKING:
    from ..quantize.sensitivity import LayerCost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="an artefact of coalescer-export onnx, or a folder of several"
    )
    parser.add_argument("--model", help="the model that it was exported from (default: as its manifest says)")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder of the artefact")
    parser.add_argument(
        "--method", choices=METHODS, default="percentile", help="how ranges are cut (default: %(default)s)"
    )
    parser.add_argument(
        "--percentile", type=float, default=PERCENTILE, metavar="P", help="of absolute values (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration-prompts", type=positive, default=PROMPTS, metavar="N", help="known names (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=natural, default=0, help="of the choice of names and the noise (default: %(default)s)"
    )
    parser.add_argument(
        "--ranges", type=Path, metavar="FILE", help="use these, the ranges.json of an artefact, and do not calibrate"
    )
    parser.add_argument(
        *("--keep-fp16", "--keep-fp32"),
        dest="keep",
        nargs="+",
        default=[],
        metavar="LAYER",
        help="layers, or patterns, to leave in float",
    )
    parser.add_argument(
        "--sensitivity", type=Path, metavar="FILE.csv", help="write what each layer alone costs, and print it"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace what is there, and write what is beyond the budget or no faster"
    )


def run(args: argparse.Namespace) -> int:
    if not 50 <= args.percentile <= 100:
        raise ValueError(f"--percentile is {args.percentile:g}; expected 50 to 100, such as {PERCENTILE}")
    sources = artefact.find(args.source)
    several = not (args.source / MANIFEST).is_file()
    for option, given in (("--ranges", args.ranges), ("--sensitivity", args.sensitivity), ("--keep-fp16", args.keep)):
        if several and given:
            reason = f"{option} is of one graph and {args.source} holds several"
            raise ValueError(f"{reason}: name one, {args.source / next(iter(sources))}")
    if args.sensitivity is not None:
        check_writable(args.sensitivity)
    with creating(args.out, args.force) as folder:
        from tqdm import tqdm

        from ..quantize.quantizer import quantize_artefact

        known = None if args.ranges is None else read_ranges(args.ranges)
        load = cache(open_pipeline)
        with tqdm(disable=args.quiet or None, delay=1.0) as bar:
            for kind, source in sources.items():
                if known is not None:
                    known.check_graph(source, args.ranges)
                inner = folder / source.folder.name if several else folder
                inner.mkdir(exist_ok=True)
                quantize_artefact(
                    load(args.model or source.manifest.model),
                    source,
                    inner,
                    method=args.method,
                    percentile=args.percentile,
                    prompts=args.calibration_prompts,
                    seed=args.seed,
                    known=known,
                    keep=args.keep,
                    force=args.force,
                    command=command(args, source.folder),
                    report=None if args.sensitivity is None else lambda costs: write(args.sensitivity, costs),
                    stage=stage(bar, kind),
                )
    print(args.out)
    return 0


def command(args: argparse.Namespace, source: Path) -> tuple[str, ...]:
    """Arguments that make this one artefact again."""
    words = ["quantize", str(source)]
    words += [] if args.model is None else ["--model", args.model]
    if args.ranges is not None:
        words += ["--ranges", str(args.ranges)]
    else:
        words += ["--method", args.method]
        words += ["--percentile", f"{args.percentile:g}"] if args.method == "percentile" else []
        words += ["--calibration-prompts", str(args.calibration_prompts), "--seed", str(args.seed)]
    return tuple(words + (["--keep-fp16", *args.keep] if args.keep else []))


def write(path: Path, costs: list[LayerCost]) -> None:
    """Write what each layer costs to a CSV file, and print it as a table."""
    rows = [cost.row() for cost in costs]
    columns = list(rows[0])
    text = [{key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    files.write_csv(path, text, columns)
    width = max(len(str(row["layer"])) for row in rows)
    print(f"{'layer alone in int8':{width}s}  " + "  ".join(columns[1:]))
    for row in rows:
        print(f"{row['layer']:{width}s}  " + "  ".join(f"{row[name]:{len(name)}.3g}" for name in columns[1:]))
