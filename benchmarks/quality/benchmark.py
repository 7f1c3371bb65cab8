"""Sample quality against network evaluations: the coalescer and its rivals, on the same prompts and noise.

    python -m benchmarks.quality --data emoji_64.npz --model runs/rivals/coalescer-0/pipeline \\
        --trainings runs/rivals/* --wordings benchmarks/quality/hundred_wordings.json --plot rivals.png

All samplers share the model's autoencoder, descriptions and automatic styles. A row of the CSV is a training at a step
count and a guidance scale: method, seed of the training and its steps, network evaluations for a picture, and the
columns of `coalescer_fast.training.evaluation`. The plot is drawn from the CSV alone.

free_wordings.json holds 24 wordings that are no names of emoji, and the names that a person accepted for each, out of
those that the embedded model is trained on. Nothing is trained on it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from coalescer_fast.bench.environment import environment
from coalescer_fast.console import counts
from coalescer_fast.files import check_writable
from coalescer_fast.pipeline import CoalescerPipeline
from coalescer_fast.training import checkpoint
from coalescer_fast.training.coalescer import OBJECTIVES
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
    read_wordings,
)
from coalescer_fast.training.rivals import RIVALS, TimeConditionedUNet

from ..harness.results import Row, read, write
from .plot import draw
from .report import tables

RESULTS = Path(__file__).parents[1] / "results" / "rivals.csv"
RIVALS_GUIDANCE = 1.5
QUICK_LIMIT = 40


@dataclass(frozen=True)
class Method:
    """What is measured.

    Attributes:
        labels: method, and of a training its seed and its steps.
        sampler: a coalescer's pipeline, or a rival's network.
    """

    labels: Row
    sampler: CoalescerPipeline | TimeConditionedUNet


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.summary is not None:
        print("\n".join(tables(read(args.summary))))
        return 0
    if not args.plot_only:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        check_writable(args.csv)
        pipe = CoalescerPipeline.from_pretrained(args.model).to(args.device)
        methods = [open_training(folder) for folder in args.trainings] or [Method({"method": "coalescer"}, pipe)]
        for method in methods:
            method.sampler.to(args.device)
        options: dict[str, Any] = {"limit": QUICK_LIMIT if args.quick else None}
        options |= {"brief": args.brief, "guided_steps": args.guided_steps, "guidance_scales": args.guidance}
        if args.wordings is not None:
            options["wordings"] = read_wordings(args.wordings)
        rows: list[Row] = []
        for row in compare(pipe, load(args.data), args.steps, methods, args.seed, **options):
            rows.append(row)
            write(args.csv, rows)  # after every row: a run takes long
    if args.plot is not None:
        draw(read(args.csv), args.plot)
    return 0


def open_training(folder: Path) -> Method:
    """What has been trained in a folder. Raises ValueError unless a training of a coalescer or a rival has finished."""
    objective = next((name for name in OBJECTIVES if (folder / f"{name}.pt").is_file()), None)
    saved = folder / ("pipeline" if objective == "coalescer" else "unet")
    if objective is None or not saved.is_dir():
        raise ValueError(f"{folder} holds no training that has finished: give the --out folder of one")
    settings = checkpoint.read(folder / f"{objective}.pt").settings
    taught = any(name.startswith("teacher.") for name in settings)
    labels: Row = {
        "method": objective.replace("_", " ") + (", teacher" if taught else ""),
        "seed": json.loads(settings["seed"]),
        "training_steps": json.loads(settings["schedule.steps"]),
    }
    if objective == "coalescer":
        return Method(labels, CoalescerPipeline.from_pretrained(saved))
    return Method(labels, TimeConditionedUNet.from_pretrained(saved).eval())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", metavar="FILE", help="the data set, as for coalescer-fast evaluate")
    parser.add_argument(
        "--model", default="emoji-64", help="an embedded model, a folder or a Hub id (default: %(default)s)"
    )
    text = "folders of trainings, which are measured in place of the model, with its autoencoder and descriptions"
    parser.add_argument("--trainings", nargs="+", type=Path, default=[], metavar="DIR", help=text)
    parser.add_argument(
        "--wordings", type=Path, metavar="FILE.json", help="free wordings, as for coalescer-fast evaluate"
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
    parser.add_argument(
        "--guidance",
        type=scales,
        metavar="W,W",
        help=f"guidance scales (default: 1, and the model's own; {RIVALS_GUIDANCE:g} for a rival)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the networks run (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_LIMIT} prompts of each kind: to see it run, not to compare"
    )
    text = "ask for names and free wordings alone, which are the columns of --summary: half of the time"
    parser.add_argument("--brief", action="store_true", help=text)
    parser.add_argument("--csv", type=Path, default=RESULTS, metavar="FILE.csv", help="results (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the results")
    parser.add_argument("--plot-only", action="store_true", help="draw the results that the CSV holds, measure nothing")
    parser.add_argument(
        "--summary", type=Path, metavar="FILE.csv", help="print the tables of a CSV file, measure nothing"
    )
    args = parser.parse_args(argv)
    if args.plot_only and args.plot is None:
        parser.error("--plot-only needs --plot FILE.png")
    if not args.plot_only and args.summary is None and args.data is None:
        parser.error("--data is missing: give the data set that the model was trained on")
    return args


def scales(text: str) -> tuple[float, ...]:
    """The type of ``--guidance``."""
    return tuple(map(float, text.split(",")))


def compare(
    pipe: CoalescerPipeline,
    data: PictureDataset,
    steps: Sequence[int],
    methods: Sequence[Method],
    seed: int = 0,
    limit: int | None = None,
    progress: bool = True,
    guided_steps: Sequence[int] | None = None,
    guidance_scales: Sequence[float] | None = None,
    **options: Any,
) -> Iterator[Row]:
    """Measure the samplers.

    Args:
        pipe: whose autoencoder and descriptions all share.
        data: the whole data set, held-out pictures included.
        steps: step counts.
        methods: what is measured.
        seed: of the noise.
        limit: at most so many prompts of each kind.
        progress: show bars.
        guided_steps: step counts with guidance; None for ``steps``.
        guidance_scales: None for 1, and the model's own or `RIVALS_GUIDANCE`.
        options: further arguments of `RealPictures`.

    Yields:
        A row for each method, guidance scale and step count.
    """
    options.setdefault("without", exclusions(pipe.description_encoder, data))
    runs = [run for method in methods for run in samplers(pipe, method, steps, guided_steps, guidance_scales)]
    real = RealPictures(data, pipe.vae, limit=limit, progress=progress, **options)
    total = len(runs) * real.prompts.count
    with (
        ExitStack() as stack,
        tqdm(total=total, desc="quality", disable=None if progress else True, mininterval=1.0) as bar,
    ):
        for method in methods:
            if isinstance(method.sampler, CoalescerPipeline):
                stack.enter_context(quiet(method.sampler))
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
    method: Method,
    steps: Sequence[int],
    guided_steps: Sequence[int] | None = None,
    guidance_scales: Sequence[float] | None = None,
) -> Iterator[tuple[Row, Sampler, FirstStep | None]]:
    """A method's samplers: labels with the network evaluations for a picture, sampler and a coalescer's first step."""
    mine = method.sampler
    guided_steps = steps if guided_steps is None else guided_steps
    if isinstance(mine, CoalescerPipeline):
        own, all_guided = float(mine.scheduler.config.guidance_scale), mine.scheduler.config.guided_steps == "all"
    else:
        own, all_guided = RIVALS_GUIDANCE, True
    for scale in sorted({1.0, own}) if guidance_scales is None else guidance_scales:
        for n in steps if scale == 1 else guided_steps:
            guided = 0 if scale == 1 else n if all_guided else 1
            labels: Row = {**method.labels, "steps": n, "guidance_scale": scale, "evaluations": n + guided}
            if isinstance(mine, CoalescerPipeline):
                yield labels, coalescer_sampler(mine, n, scale), first_step_of(mine)
            else:
                yield labels, rival_sampler(pipe, mine, str(method.labels["method"]), n, scale), None


def rival_sampler(
    pipe: CoalescerPipeline, network: TimeConditionedUNet, method: str, steps: int, guidance_scale: float
) -> Sampler:
    """A rival as a `Sampler`, with the pipeline's descriptions for the same noise, automatic styles included."""
    draw_latents = RIVALS[method.replace(" ", "_")].sample

    def sample(prompts: list[str], noise: torch.Tensor) -> torch.Tensor:
        noise = noise.to(network.device)
        description = pipe.description_encoder(pipe.as_drawn(prompts, noise)).to(network.device)
        drawn: torch.Tensor = draw_latents(network, noise, description, steps, guidance_scale)
        return drawn

    return sample
