"""Export a model's networks as ONNX.

`--what all` writes the UNet, the decoder and the generator into folders of these names. Otherwise the output is the
artefact itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coalescer_fast.console import MAX_STEPS, open_pipeline, positive, up_to
from coalescer_fast.runtime.engines.manifest import KINDS
from coalescer_fast.runtime.engines.writing import creating

from . import stage

STAGES = {"fp32": 5, "fp16": 6}  # how many stages `export_onnx` has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="emoji-64", help="an embedded model, a folder or a Hub id (default: %(default)s)"
    )
    parser.add_argument("--what", choices=[*KINDS, "all"], default="all", help="(default: %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32", help="(default: %(default)s)")
    parser.add_argument(
        "--target",
        choices=["cpu", "tensorrt"],
        default="cpu",
        help="what the file is written for (default: %(default)s)",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder of the artefact")
    parser.add_argument("--force", action="store_true", help="replace artefacts that are there")
    parser.add_argument(
        "--min-batch", type=positive, default=1, metavar="N", help="fewest pictures a run (default: %(default)s)"
    )
    parser.add_argument(
        "--opt-batch", type=positive, metavar="N", help="pictures to be fastest for (default: 4, within the others)"
    )
    parser.add_argument(
        "--max-batch", type=positive, default=16, metavar="N", help="most pictures a run (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=up_to(MAX_STEPS), default=2, metavar="N", help="of the generator (default: %(default)s)"
    )
    parser.add_argument(
        "--guidance", type=float, metavar="W", help="of the generator; 1 is none (default: the model's own)"
    )


def run(args: argparse.Namespace) -> int:
    best = max(args.min_batch, min(4, args.max_batch)) if args.opt_batch is None else args.opt_batch
    batch = args.min_batch, best, args.max_batch
    if not args.min_batch <= best <= args.max_batch:
        given = f"--min-batch {batch[0]}, --opt-batch {best} and --max-batch {batch[2]}"
        raise ValueError(f"{given} are not in order: give them from small to large")
    with creating(args.out, args.force) as folder:
        from tqdm import tqdm

        from ..onnx.exporter import export_onnx

        pipe = open_pipeline(args.model)
        kinds = KINDS if args.what == "all" else (args.what,)
        with tqdm(total=STAGES[args.precision] * len(kinds), disable=args.quiet or None, delay=1.0) as bar:
            for kind in kinds:
                inner = folder / kind if args.what == "all" else folder
                inner.mkdir(exist_ok=True)
                export_onnx(
                    pipe,
                    kind,
                    inner,
                    model=args.model,
                    precision=args.precision,
                    target=args.target,
                    batch=batch,
                    steps=args.steps,
                    guidance=args.guidance,
                    command=command(args, kind, batch),
                    stage=stage(bar, kind),
                )
    print(args.out)
    return 0


def command(args: argparse.Namespace, kind: str, batch: tuple[int, int, int]) -> tuple[str, ...]:
    """Arguments that make this one artefact again."""
    words = ["onnx", "--model", args.model, "--what", kind, "--precision", args.precision, "--target", args.target]
    words += [word for name, size in zip(("min", "opt", "max"), batch) for word in (f"--{name}-batch", str(size))]
    if kind == "generator":
        words += ["--steps", str(args.steps)]
        words += [] if args.guidance is None else ["--guidance", f"{args.guidance:g}"]
    return tuple(words)
