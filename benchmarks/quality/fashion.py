"""The method on Fashion-MNIST: a coalescer in under ten CPU minutes, and its baselines with the same steps.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.fashion --out runs/fashion --plot docs/fashion.png

The coalescer is trained as `fashion.toml` says. The others have its autoencoder, anchor, network, steps and seed, and
draw from the same noise. A row of the CSV is a sampler at a number of evaluations, with the share of its pictures that
a classifier recognises as what was described, their Fréchet distance to the training pictures in the classifier's
features, and the CPU time of the training, which for the coalescer includes autoencoder and anchor. The rows "held-out
pictures" and "autoencoder" are floors: real pictures, and what the autoencoder makes of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from coalescer_fast import CoalescerPipeline, files
from coalescer_fast.bench.environment import environment
from coalescer_fast.console import counts
from coalescer_fast.training.autoencoder import encode
from coalescer_fast.training.coalescer import CoalescerConfig, train_coalescer
from coalescer_fast.training.config import read
from coalescer_fast.training.data import PictureDataset, load
from coalescer_fast.training.evaluation import Sampler, coalescer_sampler, quiet
from coalescer_fast.training.evaluation.samplers import in_parts
from coalescer_fast.training.pictures import sheet, to_tensor, to_uint8
from coalescer_fast.training.rivals import RIVALS, TimeConditionedUNet

from ..harness.results import Row, write
from ..harness.results import read as read_rows
from .benchmark import rival_sampler
from .recognition import Recognition
from .teacher import shortened

RESULTS = Path(__file__).parents[1] / "results" / "fashion.csv"
OBJECTIVES = ("coalescer", *RIVALS)  # the coalescer first, which trains what the others share
STEPS = (1, 2, 4, 8, 50)
CLASSIFIER_STEPS = 1500
PICTURES = 200  # of a class
SHOWN = 2  # columns of a class in the plot, and the step counts of its rows
SHOWN_STEPS = (2, 50)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.fashion", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/fashion"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--csv", type=Path, default=RESULTS, metavar="FILE.csv", help="results (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="pictures of every sampler, from the same noise")
    parser.add_argument(
        "--steps", type=counts, default=STEPS, metavar="N,N", help=f"evaluations (default: {','.join(map(str, STEPS))})"
    )
    parser.add_argument("--short", type=int, metavar="N", help="steps of every training: to see it run")
    args = parser.parse_args(argv)
    files.check_writable(args.csv)
    compare(args.out, args.csv, args.plot, args.steps, args.short)
    return 0


def compare(
    out: Path,
    csv: Path,
    plot: Path | None = None,
    steps: Sequence[int] = STEPS,
    short: int | None = None,
    progress: bool = True,
) -> list[Row]:
    """Train and measure.

    Args:
        out: folder of everything that is trained; what is there is not trained again.
        csv: the rows.
        plot: a sheet of pictures, a row for each sampler.
        steps: evaluations of the network.
        short: steps of every training; None for those that the results are of.
        progress: show bars.
    """
    data = load("fashion")
    config = shortened(read("fashion", CoalescerConfig), short)
    seconds = {name: train(config, name, data, out, progress) for name in OBJECTIVES}
    pipe = CoalescerPipeline.from_pretrained(out / "coalescer" / "pipeline")
    recognition = Recognition(data, short or CLASSIFIER_STEPS)
    names = [c.name for c in data.concepts for _ in range(PICTURES)]
    noise = pipe.initial_noise(len(names), torch.Generator().manual_seed(1))

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return in_parts(lambda part: pipe.vae.decode(part).sample, latents)

    rows: list[Row] = []
    held = data.held()
    named = [held.concepts[c].name for c in held.concept]
    shown: dict[str, torch.Tensor] = {}
    for model, pictures in (
        ("held-out pictures", to_tensor(held.images)),
        ("autoencoder", decode(encode(pipe.vae, held))),
    ):
        order = np.argsort(held.concept, kind="stable")[:: len(held) // (SHOWN * len(held.concepts))]
        shown[model] = pictures[order]
        rows.append({"model": model, **recognition.figures(pictures, named)})
    with quiet(pipe):
        for name in OBJECTIVES:
            for n in steps:
                sample = sampler_of(name, out / name, pipe)(n)
                drawn = [sample(names[i : i + len(z)], z) for i, z in parts(noise)]
                pictures = decode(torch.cat(drawn))
                label = name.replace("_", " ")
                figures = recognition.figures(pictures, names)
                rows.append({"model": label, "evaluations": n, **figures, "cpu_seconds": seconds[name]})
                if n in SHOWN_STEPS:
                    shown[f"{label}, {n}"] = pictures[:: PICTURES // SHOWN]
    rows = [{**row, **environment()} for row in rows]
    write(csv, rows)
    if plot is not None:
        draw(plot, shown, [c.name for c in data.concepts])
    return rows


def parts(noise: torch.Tensor, size: int = 250) -> list[tuple[int, torch.Tensor]]:
    return [(i, noise[i : i + size]) for i in range(0, len(noise), size)]


def train(config: CoalescerConfig, objective: str, data: PictureDataset, out: Path, progress: bool) -> float:
    """Train with an objective, unless that is done, and return the CPU time that it took, in seconds."""
    file = out / "seconds.csv"
    done: list[Row] = [dict(row) for row in read_rows(file)] if file.exists() else []
    if not any(row["objective"] == objective for row in done):
        if objective != "coalescer":
            shared = out / "coalescer"
            config = replace(
                config,
                objective=objective,
                autoencoder=str(shared / "autoencoder"),
                anchor_from=str(shared),
                pairing="paired",
            )
        started = time.process_time()
        train_coalescer(config, data, out / objective, progress=progress)
        done.append({"objective": objective, "cpu_seconds": time.process_time() - started})
        write(file, done)
    return float(next(row["cpu_seconds"] for row in done if row["objective"] == objective))


def sampler_of(objective: str, folder: Path, pipe: CoalescerPipeline) -> Callable[[int], Sampler]:
    """A sampler of so many evaluations, without guidance."""
    if objective == "coalescer":
        return lambda n: coalescer_sampler(pipe, n, 1.0)
    network = TimeConditionedUNet.from_pretrained(folder / "unet").eval()
    return lambda n: rival_sampler(pipe, network, objective, n, 1.0)


def draw(plot: Path, shown: dict[str, torch.Tensor], names: Sequence[str]) -> None:
    pictures = [Image.fromarray(image) for drawn in shown.values() for image in to_uint8(drawn)]
    titles = [name for name in names for _ in range(SHOWN)]
    captions = [caption for row in shown for caption in (row, *titles[1:])]
    files.write_picture(plot, sheet(pictures, captions, columns=len(titles), scale=2).convert("L"))


if __name__ == "__main__":
    raise SystemExit(main())
