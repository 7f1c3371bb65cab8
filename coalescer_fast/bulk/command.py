"""``coalescer-fast generate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import MAX_STEPS, Parser, natural, positive, prompt, up_to

if TYPE_CHECKING:
    from .generation import Report

NAME = "generate"
SUMMARY = "draw the prompts of a file into shards, which a run that was killed goes on with"
SHOWN = 5  # damaged shards that are named


def add_arguments(sub: Parser, add_model: Callable[[Parser, str], None]) -> None:
    """Add the arguments of the command.

    Args:
        sub: its parser.
        add_model: adds those that choose the model.
    """
    sub.add_argument("prompts", type=Path, metavar="PROMPTS", help="a file: .txt, .jsonl, .csv or .parquet")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    add_model(sub, "auto")
    sub.add_argument("--seed", type=natural, default=0, help="of the noise (default: %(default)s)")
    sub.add_argument("-n", type=up_to(1024), default=1, metavar="N", help="pictures a prompt (default: %(default)s)")
    text = "write only the K best of the pictures of each prompt, by the model's own estimate (default: all)"
    sub.add_argument("--keep-best", type=up_to(1024), metavar="K", help=text)
    sub.add_argument("--steps", type=_steps, default=2, metavar="N", help="as in sample (default: %(default)s)")
    sub.add_argument("--guidance", type=float, metavar="W", help="guidance scale; 1 is none (default: the model's own)")
    sub.add_argument("--negative", type=prompt, metavar="PROMPT", help="what guidance leads away from")
    sub.add_argument(
        "--prompt-matching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw the known name that says what a prompt says (default: yes)",
    )
    sub.add_argument("--per-shard", type=positive, default=1000, metavar="N", help="prompts (default: %(default)s)")
    sub.add_argument(
        "--prompt-column", default="prompt", metavar="NAME", help="column of the prompts (default: %(default)s)"
    )
    text = "column of ids, which decide the noise with the seed (default: id where there is one, else the row's number)"
    sub.add_argument("--id-column", metavar="NAME", help=text)
    text = "processes, or actors of Ray (default: one for each core, or one on a GPU)"
    sub.add_argument("--workers", type=up_to(1024), metavar="N", help=text)
    sub.add_argument("--threads", type=up_to(1024), default=1, metavar="N", help="of a worker (default: %(default)s)")
    text = "pictures that a worker draws together (default: %(default)s)"
    sub.add_argument("--batch-size", type=up_to(1024), default=16, metavar="N", help=text)
    text = "draw on a Ray cluster: its address, auto, or local for one on this machine; all machines share DIR"
    sub.add_argument("--ray", metavar="ADDRESS", help=text)
    text = "draw nothing: read every byte of the shards, and have the next run make damaged ones again"
    sub.add_argument("--check", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from .generation import check, generate
    from .settings import Model, Settings

    wanted = Settings(
        seed=args.seed,
        pictures=args.n,
        keep_best=args.keep_best,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        negative_prompt=args.negative,
        prompt_matching=args.prompt_matching,
        per_shard=args.per_shard,
        prompt_column=args.prompt_column,
        id_column=args.id_column,
    )
    if args.check:
        return _say_check(check(args.prompts, args.out, wanted, progress=not args.quiet), args)
    model = Model(args.model, args.backend, args.dtype, args.artefact)
    report = generate(
        args.prompts,
        args.out,
        wanted,
        model,
        workers=args.workers,
        threads=args.threads,
        batch_size=args.batch_size,
        ray=args.ray,
        progress=not args.quiet,
    )
    if not args.quiet:
        quality = "" if report.quality is None else f", mean quality {report.quality:.2f}"
        drew = f"{report.drawn:,} pictures drawn in {report.seconds:.1f} s" if report.made else "nothing was missing"
        print(f"{drew}{quality}; {_counted(report)}", file=sys.stderr)
    print(args.out)
    return 0


def _say_check(report: Report, args: argparse.Namespace) -> int:
    if not report.damaged and not report.missing:
        if not args.quiet:
            print(f"{_counted(report)}, all whole", file=sys.stderr)
        print(args.out)
        return 0
    shown = "; ".join(list(report.damaged.values())[:SHOWN]) + "; ..." * (len(report.damaged) > SHOWN)
    print(
        f"coalescer-fast: of {report.shards:,} shards {len(report.damaged):,} are damaged and {len(report.missing):,} "
        f"missing{f' ({shown})' if shown else ''}: run the command without --check, which makes them",
        file=sys.stderr,
    )
    return 1


def _counted(report: Report) -> str:
    pictures, shards = (
        f"{n:,} {what}{'s' * (n != 1)}" for n, what in ((report.pictures, "picture"), (report.shards, "shard"))
    )
    return f"{pictures} in {shards}"


def _steps(text: str) -> int | str:
    return text if text == "auto" else up_to(MAX_STEPS)(text)
