"""What num_inference_steps="auto" is worth: Fréchet distance and retrieval by evaluations, beside fixed step counts.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.auto --data emoji_64.npz

A row of the CSV is a fixed step count, or "auto" with an arrival distance, on prompts that are names and on keywords. A
row "chance" has the shares of step counts that the "auto" before it has, dealt to pictures by chance: what "auto" would
be worth if the distance said nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from coalescer_fast import accelerate, files
from coalescer_fast.bench.environment import environment
from coalescer_fast.pipeline import CoalescerPipeline
from coalescer_fast.training.data import PictureDataset, load
from coalescer_fast.training.evaluation import RealPictures, exclusions, frechet_distance, quiet
from coalescer_fast.training.evaluation.metrics import nearest
from coalescer_fast.training.evaluation.samplers import CHUNK

from ..harness.results import Row, write

RESULTS = Path(__file__).parents[1] / "results" / "auto.csv"
STEPS = (1, 2, 3, 4)
ARRIVAL_DISTANCES = (1.45, 1.4, 1.35, 1.3, 0.7, 0.65)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.auto", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, metavar="FILE", help="the data set that the model was trained on")
    parser.add_argument(
        "--model", default="emoji-64", help="an embedded model, a folder or a Hub id (default: %(default)s)"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS, metavar="FILE.csv", help="results (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many prompts a kind: to see it run")
    args = parser.parse_args(argv)
    files.check_writable(args.csv)
    pipe = accelerate(CoalescerPipeline.from_pretrained(args.model), dtype="float32")
    write(args.csv, [{**row, **environment()} for row in measure(pipe, load(args.data), args.limit)])
    return 0


def measure(pipe: CoalescerPipeline, data: PictureDataset, limit: int | None = None, **options: Any) -> Iterator[Row]:
    """Yield the rows; ``options`` are further arguments of `RealPictures`."""
    options.setdefault("without", exclusions(pipe.description_encoder, data))
    real = RealPictures(data, pipe.vae, limit=limit, progress=False, **options)
    names = real.training.concept[real.prompts.described].tolist()
    texts = [real.training.concepts[c].name for c in names] + [text for _, text in real.prompts.keywords]
    concepts = torch.tensor(names + [c for c, _ in real.prompts.keywords], dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(texts), *real.shape, generator=generator, dtype=torch.float32)

    @cache
    def fixed(steps: int) -> torch.Tensor:
        return draw(steps)[0]

    def draw(steps: int | str) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents, and evaluations of each."""
        parts: list[Any] = [
            pipe(texts[i : i + CHUNK], latents=noise[i : i + CHUNK], num_inference_steps=steps, output_type="latent")
            for i in range(0, len(texts), CHUNK)
        ]
        used = [n for part in parts for n in part.num_evaluations]
        return torch.cat([part.images for part in parts]), torch.tensor(used, dtype=torch.int64)

    def row(sampler: str, arrival: float | str, latents: torch.Tensor, used: torch.Tensor) -> Row:
        hit = real.concept[nearest(latents.flatten(1), real.latents, 1)[1][:, 0]] == concepts
        named = real.features_of(real.decode(latents[: len(names)]))
        figures: Row = {"sampler": sampler, "arrival_distance": arrival, "evaluations": float(used.double().mean())}
        figures |= {"fd_name": frechet_distance(named, real.features)}
        figures["name_top1"] = float(hit[: len(names)].double().mean())
        figures["keyword_top1"] = float(hit[len(names) :].double().mean())
        return figures

    guidance = int(pipe.scheduler.config.guidance_scale != 1)  # in the last step alone
    before = pipe.scheduler.config.arrival_distance
    with quiet(pipe):
        for n in STEPS:
            used = torch.full((len(texts),), n + guidance, dtype=torch.int64)
            yield row(f"{n} step{'s' * (n > 1)}", "", fixed(n), used)
        for arrival in ARRIVAL_DISTANCES:
            pipe.scheduler.register_to_config(arrival_distance=arrival)
            latents, used = draw("auto")
            yield row("auto", arrival, latents, used)
            order = torch.randperm(len(used), generator=generator)
            dealt = [fixed(n - guidance)[i] for i, n in enumerate(used[order].tolist())]
            yield row("chance", arrival, torch.stack(dealt), used[order])
    pipe.scheduler.register_to_config(arrival_distance=before)


if __name__ == "__main__":
    raise SystemExit(main())
