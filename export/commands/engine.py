"""Build engines of TensorRT, or of TensorRT-RTX without a GPU.

They are built from an artefact in ONNX that was exported with `--target tensorrt`, or from each in a folder of several.
The options have trtexec's names. Where the engine can run, its error and speed are measured; if it is beyond the error
budget, or in int8 no faster than an engine of what was quantized, it is written only with --force.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from coalescer_fast.runtime.engines import artefact
from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.manifest import MANIFEST
from coalescer_fast.runtime.engines.tensorrt import TITLES
from coalescer_fast.runtime.engines.writing import creating

from ..engine import builder, options

# all that TensorRT-RTX 1.7 builds for, but 75, which takes no float32, and 121, a small GPU
CAPABILITIES = (80, 86, 89, 120)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flavours = ", ".join(f"{name} ({title})" for name, title in TITLES.items())
    parser.add_argument("folder", type=Path, metavar="DIR", help="an artefact in ONNX, or a folder of several")
    parser.add_argument(
        "--flavour", choices=list(TITLES), default="tensorrt", help=f"{flavours} (default: %(default)s)"
    )
    parser.add_argument(
        "-o", "--out", "--saveEngine", type=Path, required=True, metavar="DIR", help="folder of the engine"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace what is there, and write what is beyond the budget or no faster"
    )
    for word, which in (("min", "least"), ("opt", "best"), ("max", "largest")):
        text = f"{which} shapes, such as noise:1x16x8x8; an input that is left out has its exported one"
        parser.add_argument(f"--{word}Shapes", metavar="SHAPES", help=text)
    parser.add_argument(
        "--timingCacheFile", type=Path, metavar="FILE", help="timings of kernels, read if it is there, and written"
    )
    text = "GPUs that the engine runs on beside the one that it is built on (TensorRT; default: %(default)s)"
    parser.add_argument("--hardwareCompatibilityLevel", choices=options.HARDWARE, default="none", help=text)
    parser.add_argument(
        "--versionCompatible", action="store_true", help="run with later versions of the same major version (TensorRT)"
    )
    parser.add_argument(
        "--stripWeights",
        action="store_true",
        help="leave the weights out of the engine and keep the ONNX file beside it",
    )
    text = "GPUs to build for (TensorRT-RTX; default: 80,86,89,120)"
    parser.add_argument("--computeCapabilities", type=capabilities, metavar="80,86", help=text)


def capabilities(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{2,3}(,\d{2,3})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of compute capabilities such as 80,86")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    chosen = options.Options(
        args.flavour,
        args.computeCapabilities or (CAPABILITIES if args.flavour == "tensorrt_rtx" else ()),
        args.hardwareCompatibilityLevel,
        args.versionCompatible,
        args.stripWeights,
        args.timingCacheFile,
    )
    asked = args.minShapes, args.optShapes, args.maxShapes
    artefacts = artefact.find(args.folder)
    whole = (args.folder / MANIFEST).is_file()
    for found in artefacts.values():
        builder.check_source(found)
    shapes = {kind: options.profile(found.manifest, *asked) for kind, found in artefacts.items()}
    with creating(args.out, args.force) as folder:
        for kind, found in artefacts.items():
            inner, out = (folder, args.out) if whole else (folder / kind, args.out / kind)
            inner.mkdir(exist_ok=True)
            if not args.quiet:
                print(options.trtexec_command(found, out, chosen, shapes[kind]), file=sys.stderr)
            with tqdm(disable=args.quiet or None, desc=kind, unit=" steps", delay=1.0) as bar:
                built = builder.build_engine(found, inner, shapes[kind], chosen, command(args, found, chosen), bar)
                missing = builder.measure(built, found, shapes[kind], chosen, args.force, bar)
            if missing and not args.quiet:
                print(f"{kind}: {missing}", file=sys.stderr)
    print(args.out)
    return 0


def command(args: argparse.Namespace, found: Artefact, chosen: options.Options) -> tuple[str, ...]:
    """Arguments that make this one artefact again."""
    words = ["engine", str(found.folder), "--flavour", chosen.flavour, *chosen.arguments()]
    for name in ("minShapes", "optShapes", "maxShapes"):
        words += [f"--{name}={given}"] if (given := getattr(args, name)) else []
    return tuple(words)
