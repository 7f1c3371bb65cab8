"""The command ``coalescer-fast bench``: what this machine gains over plain PyTorch and over the other engines."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import files
from ..console import MAX_IMAGES, open_pipeline, positive, up_to

NAMES = ("coalescer_fast", "eager", "onnxruntime", "openvino", "compile")  # engines.NAMES, which import torch
SECONDS = 60
LEAST = 5  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", default="emoji-64", help="an embedded model, a folder or a Hub id (default: emoji-64)")
    what.add_argument(
        "--unet", type=Path, metavar="FOLDER", help="instead, one evaluation of the diffusers UNet in this folder"
    )
    parser.add_argument(
        "-n", type=up_to(MAX_IMAGES), default=1, metavar="N", help="pictures a call (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=positive, metavar="S", help="height and width of a UNet's sample (default: of its configuration)"
    )
    parser.add_argument(
        "--backends",
        type=names,
        default=NAMES,
        metavar="B,B",
        help=f"of {', '.join(NAMES)} (default: all that are installed); plain PyTorch is measured in any case",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=SECONDS,
        metavar="S",
        help="about how long all of it may take; what is not ready in time is left out (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured, to attach to an issue")


def names(text: str) -> tuple[str, ...]:
    """The type of ``--backends``."""
    found = tuple(dict.fromkeys(map(str.strip, text.split(","))))
    for name in found:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"{name!r:.40} is unknown: use some of {', '.join(NAMES)}")
    return found


def seconds(text: str) -> float:
    """The type of ``--seconds``."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not LEAST <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no number of seconds from {LEAST} to 86400")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON; 1 if accelerate's results do not agree with the reference's."""
    if args.json is not None:
        files.check_writable(args.json)
    if args.size is not None and args.unet is None:
        raise ValueError("--size is of a UNet's sample: give --unet, or leave it out")
    import torch

    from . import engines, report, timing
    from .measure import measure

    with timing.settings(args.threads, keep=False):
        if args.unet is None:
            subject = engines.of_pipeline(open_pipeline(args.model), args.model, args.n, args.backends)
        else:
            module = engines.load_unet(args.unet)
            subject = engines.of_unet(module, args.unet.resolve().name, args.n, args.size, args.backends)
        machine = report.environment()
        with torch.no_grad():
            measured = measure(subject, args.seconds, progress=not args.quiet)
    print(report.text(subject.title, machine, measured))
    if args.json is not None:
        files.write_text(args.json, report.to_json(subject.facts, machine, measured, args.seconds))
    return report.status(measured)
