"""Build engines of TensorRT, or of TensorRT-RTX without a GPU.

Of an artefact in ONNX that was exported with `--target tensorrt`, or of each in a folder of several. The options have trtexec's names.
Where the plan can run, its error and speed are measured; beyond the error budget, or in int8 no faster than an engine of what was quantised,
it is written with --force alone.
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

from ..engine import builder

# of TensorRT-RTX 1.7, without those that take no float32 (75) and are small (121)
CAPABILITIES = (80, 86, 89, 120)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flavours = ", ".join(f"{name} ({title})" for name, title in TITLES.items())
    parser.add_argument("folder", type=Path, metavar="DIR", help="an artefact in ONNX, or a folder of several")
    parser.add_argument(
        "--flavour", choices=list(TITLES), default="tensorrt", help=f"{flavours} (default: %(default)s)"
    )
    parser.add_argument(
        "-o", "--out", "--saveEngine", type=Path, required=True, metavar="DIR", help="folder of the plan"
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
    text = "GPUs that the plan runs on beside the one that it is built on (TensorRT; default: %(default)s)"
    parser.add_argument("--hardwareCompatibilityLevel", choices=builder.HARDWARE, default="none", help=text)
    parser.add_argument(
        "--versionCompatible", action="store_true", help="run with later versions of the same major version (TensorRT)"
    )
    parser.add_argument(
        "--stripWeights", action="store_true", help="leave the weights out of the plan and keep the ONNX file beside it"
    )
    text = "GPUs to build for (TensorRT-RTX; default: 80,86,89,120)"
    parser.add_argument("--computeCapabilities", type=capabilities, metavar="80,86", help=text)


def capabilities(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{2,3}(,\d{2,3})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of compute capabilities such as 80,86")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    options = builder.Options(
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
    shapes = {kind: builder.profile(found.manifest, *asked) for kind, found in artefacts.items()}
    with creating(args.out, args.force) as folder:
        for kind, found in artefacts.items():
            inner, out = (folder, args.out) if whole else (folder / kind, args.out / kind)
            inner.mkdir(exist_ok=True)
            if not args.quiet:
                print(builder.equivalent(found, out, options, shapes[kind]), file=sys.stderr)
            with tqdm(disable=args.quiet or None, desc=kind, unit=" steps", delay=1.0) as bar:
                built = builder.build(found, inner, shapes[kind], options, command(args, found, options), bar)
                missing = builder.measure(built, found, shapes[kind], options, args.force, bar)
            if missing and not args.quiet:
                print(f"{kind}: {missing}", file=sys.stderr)
    print(args.out)
    return 0


def command(args: argparse.Namespace, found: Artefact, options: builder.Options) -> tuple[str, ...]:
    """The arguments that give this one artefact again."""
    words = ["engine", str(found.folder), "--flavour", options.flavour, *builder.flag_words(options)]
    for name in ("minShapes", "optShapes", "maxShapes"):
        words += [f"--{name}={given}"] if (given := getattr(args, name)) else []
    return tuple(words)
