"""Sample quality against network evaluations: the coalescer beside flow matching, on the same prompts and noise.

    python -m benchmarks.quality --data emoji_64.npz --flow-matching runs/flow-matching/unet --plot quality.png

The baseline has the coalescer's network, anchor, descriptions and automatic styles, and is integrated in equal Euler
steps. A row of the CSV is a sampler at a step count and a guidance scale, with the columns of
`coalescer_fast.training.evaluation`; the plot is drawn from the CSV alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from coalescer_fast.console import counts
from coalescer_fast.files import check_writable
from coalescer_fast.pipeline import CoalescerPipeline
from coalescer_fast.training.data import PictureDataset, load
from coalescer_fast.training.evaluation import (
    FirstStep,
    RealPictures,
    Sampler,
    coalescer_sampler,
    exclusions,
    first_step_of,
    measure,
    quiet,
)
from coalescer_fast.training.flow_matching import FlowMatchingUNet, euler

from ..harness.environment import environment
from ..harness.results import Row, read, write
from .plot import draw

RESULTS = Path(__file__).parents[1] / "results" / "quality.csv"
FLOW_MATCHING_GUIDANCE = (1.0, 1.5)
QUICK_LIMIT = 40


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if not args.plot_only:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        check_writable(args.csv)
        pipe = CoalescerPipeline.from_pretrained(args.model)
        flow = FlowMatchingUNet.from_pretrained(args.flow_matching).eval() if args.flow_matching else None
        rows: list[Row] = []
        limit = QUICK_LIMIT if args.quick else None
        for row in compare(pipe, load(args.data), args.steps, flow, args.seed, limit, guided_steps=args.guided_steps):
            rows.append(row)
            write(args.csv, rows)  # after every row: a run takes long
    if args.plot is not None:
        draw(read(args.csv), args.plot)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", metavar="FILE", help="the data set, as for coalescer-fast evaluate")
    parser.add_argument(
        "--model", default="emoji-64", help="an embedded model, a folder or a Hub id (default: %(default)s)"
    )
    parser.add_argument(
        "--flow-matching", metavar="DIR", help="saved FlowMatchingUNet (the unet folder of its training)"
    )
    parser.add_argument(
        "--steps", type=counts, default=(1, 2, 4, 8, 50), metavar="N,N", help="step counts (default: 1,2,4,8,50)"
    )
    parser.add_argument(
        "--guided-steps",
        type=counts,
        metavar="N,N",
        help="step counts that are measured with guidance, too (default: as --steps)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_LIMIT} prompts of each kind: to see it run, not to compare"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS, metavar="FILE.csv", help="results (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the results")
    parser.add_argument("--plot-only", action="store_true", help="draw the results that the CSV holds, measure nothing")
    args = parser.parse_args(argv)
    if args.plot_only and args.plot is None:
        parser.error("--plot-only needs --plot FILE.png")
    if not args.plot_only and args.data is None:
        parser.error("--data is missing: give the data set that the model was trained on")
    return args


def compare(
    pipe: CoalescerPipeline,
    data: PictureDataset,
    steps: Sequence[int],
    flow: FlowMatchingUNet | None = None,
    seed: int = 0,
    limit: int | None = None,
    progress: bool = True,
    guided_steps: Sequence[int] | None = None,
    **options: Any,
) -> Iterator[Row]:
    """Measure the samplers.

    Args:
        pipe: the coalescer.
        data: the whole data set, held-out pictures included.
        steps: step counts.
        flow: the baseline, if it is to be measured.
        seed: of the noise.
        limit: at most so many prompts of each kind.
        progress: show bars.
        guided_steps: step counts with guidance; None for ``steps``.
        options: further arguments of `RealPictures`.

    Yields:
        A row for each sampler, guidance scale and step count.
    """
    options.setdefault("without", exclusions(pipe.description_encoder, data))
    runs = list(samplers(pipe, flow, steps, guided_steps))
    real = RealPictures(data, pipe.vae, limit=limit, progress=progress, **options)
    with (
        quiet(pipe),
        tqdm(
            total=len(runs) * real.prompts.count, desc="quality", disable=None if progress else True, mininterval=1.0
        ) as bar,
    ):
        for labels, sample, first_step in runs:
            bar.set_postfix(labels)
            yield {
                **labels,
                **measure(sample, real, seed, first_step, bar),
                **real.floors,
                **environment(),
                "prompts": limit or "all",
            }


def samplers(
    pipe: CoalescerPipeline,
    flow: FlowMatchingUNet | None,
    steps: Sequence[int],
    guided_steps: Sequence[int] | None = None,
) -> Iterator[tuple[Row, Sampler, FirstStep | None]]:
    """What is compared: labels, sampler and, for a coalescer, its first step. nfe: network evaluations per picture."""
    scheduler, guided_steps = pipe.scheduler.config, steps if guided_steps is None else guided_steps
    for scale in sorted({1.0, float(scheduler.guidance_scale)}):
        for n in steps if scale == 1 else guided_steps:
            guided = 0 if scale == 1 else n if scheduler.guided_steps == "all" else 1
            labels: Row = {"sampler": "coalescer", "steps": n, "guidance_scale": scale, "nfe": n + guided}
            yield labels, coalescer_sampler(pipe, n, scale), first_step_of(pipe)
    if flow is None:
        return
    for scale in FLOW_MATCHING_GUIDANCE:
        for n in steps if scale == 1 else guided_steps:
            labels = {
                "sampler": "flow matching",
                "steps": n,
                "guidance_scale": scale,
                "nfe": n if scale == 1 else 2 * n,
            }
            yield labels, flow_matching_sampler(pipe, flow, n, scale), None


def flow_matching_sampler(
    pipe: CoalescerPipeline, flow: FlowMatchingUNet, steps: int, guidance_scale: float
) -> Sampler:
    """The baseline as a `Sampler`, with the pipeline's descriptions for the same noise, automatic styles included."""

    def sample(prompts: list[str], noise: torch.Tensor) -> torch.Tensor:
        noise = noise.to(flow.device)
        description = pipe.description_encoder(pipe.with_styles(prompts, noise)).to(flow.device)
        return euler(flow, noise, description, steps, guidance_scale)

    return sample
