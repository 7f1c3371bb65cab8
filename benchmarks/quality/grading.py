"""Fit a model's grading, and measure it by prompts that it was not fitted to.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.grading --data emoji_64.npz --save coalescer_fast/weights/emoji-64 \
        --wordings benchmarks/quality/typed_wordings.json --plot docs/grading.png

A row of the CSV is a kind of wording, see `coalescer_fast.training.grading`: pictures, share of right ones, mean
quality, mean squared error of the quality, and the chance that a right picture has a higher quality than a wrong one
(AUC), also by each feature alone. Then come rows of the reliability diagram, by intervals of quality. A file of
``--wordings`` is {wording: [accepted names]}, and no wording of it is fitted to.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from coalescer_fast import files, grading
from coalescer_fast.bench.environment import environment
from coalescer_fast.pipeline import CoalescerPipeline
from coalescer_fast.training.data import PictureDataset, load
from coalescer_fast.training.evaluation import exclusions
from coalescer_fast.training.grading import (
    Drawn,
    Judge,
    area_under_curve,
    calibrate,
    draw,
    listed_wordings,
    reliability,
    store,
)

from ..harness.results import Row, Text, read, write

RESULTS = Path(__file__).parents[1] / "results" / "grading.csv"
UNSEEN, FREE = "all of them", "free wordings"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.grading", description=__doc__.partition("\n")[0]
    )
    add_options(parser, RESULTS)
    parser.add_argument("--count", type=int, default=300, metavar="N", help="wordings a kind (default: %(default)s)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="put the grading into the model of this folder, too")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the reliability diagram")
    args = parser.parse_args(argv)
    files.check_writable(args.csv)
    pipe = CoalescerPipeline.from_pretrained(args.model)
    rows = [{**row, **environment()} for row in measure(pipe, load(args.data), wordings_of(args), args.count)]
    write(args.csv, rows)
    if args.save is not None:
        store(pipe, args.save)
    if args.plot is not None:
        plot(read(args.csv), args.plot)
    return 0


def add_options(parser: argparse.ArgumentParser, csv: Path) -> None:
    """The options of commands that draw free wordings."""
    parser.add_argument("--data", required=True, metavar="FILE", help="the data set that the model was trained on")
    parser.add_argument(
        "--model", default="emoji-64", help="an embedded model, a folder or a Hub id (default: %(default)s)"
    )
    parser.add_argument(
        "--wordings", type=Path, nargs="*", default=[], metavar="FILE.json", help="{wording: [accepted names]}"
    )
    parser.add_argument("--csv", type=Path, default=csv, metavar="FILE.csv", help="results (default: %(default)s)")


def wordings_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """The wordings of all files of the command line."""
    return {text: names for path in args.wordings for text, names in json.loads(path.read_text("utf-8")).items()}


def measure(
    pipe: CoalescerPipeline,
    data: PictureDataset,
    free: Mapping[str, Sequence[str]],
    count: int = 300,
    seeds: int = 4,
    progress: bool = True,
) -> Iterator[Row]:
    """Fit the grading, which the pipeline has afterwards, and yield the rows."""
    numbers, unseen = calibrate(pipe, data, count, seeds, progress)
    kinds = unseen.kinds()
    sets: list[tuple[str, Drawn, np.ndarray]] = [(UNSEEN, unseen, np.full(len(kinds), True))]
    sets += [(str(kind), unseen, kinds == kind) for kind in dict.fromkeys(kinds)]
    if free:
        judge = Judge(pipe, data.without(**exclusions(pipe.description_encoder, data)))
        drawn = draw(pipe, judge, listed_wordings(free), 2 * seeds, 2, progress)
        sets.append((FREE, drawn, np.full(len(drawn.right), True)))
    for name, drawn, mine in sets:
        quality, right, features = drawn.quality(numbers)[mine], drawn.right[mine], drawn.features()[mine]
        row: Row = {"wordings": name, "pictures": len(right), "right": float(right.mean())}
        row |= {"quality": float(quality.mean()), "squared_error": float(np.square(quality - right).mean())}
        row["auc"] = area_under_curve(quality, right)
        for i, feature in enumerate(grading.FEATURES["2"]):
            row[f"auc_{feature}"] = area_under_curve(features[:, i], right)
        yield row
    for name, drawn, _ in (sets[0], *sets[-1:]):
        for quality_mean, share, pictures in reliability(drawn.quality(numbers), drawn.right):
            yield {"wordings": f"reliability, {name}", "pictures": pictures, "right": share, "quality": quality_mean}


def plot(rows: Sequence[Text], target: Path) -> None:
    """Draw the share of right pictures against quality."""
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], ":", color="grey", linewidth=0.8)
    auc = {row["wordings"]: float(row["auc"]) for row in rows if row.get("auc")}
    for name in (UNSEEN, FREE):
        points = [row for row in rows if row["wordings"] == f"reliability, {name}"]
        if points:
            label = f"{'wordings not fitted to' if name == UNSEEN else name}, AUC {auc[name]:.3f}"
            axis.plot([float(r["quality"]) for r in points], [float(r["right"]) for r in points], "o-", label=label)
    axis.set(xlabel="quality", ylabel="share of pictures that show what was asked", xlim=(0, 1), ylim=(0, 1))
    axis.legend(fontsize=8)
    files.write_picture(target, figure)


if __name__ == "__main__":
    raise SystemExit(main())
