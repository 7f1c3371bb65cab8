"""The results of `benchmarks.quality` as a picture, from the rows of their CSV file alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coalescer_fast import files

from ..harness.results import Text

PANELS = {"fd_name": "name alone", "fd_name_style": "name and style"}
EVALUATIONS, DISTANCES = (1, 2, 4, 8, 16, 32, 64, 128), (10, 20, 50, 100, 200, 500, 1000, 2000)


def draw(rows: Sequence[Text], target: Path) -> None:
    """Draw the Fréchet distance against network evaluations per picture.

    A kind of prompt has a panel, a method and guidance scale a line: the mean of its trainings.
    """
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    panels = {column: title for column, title in PANELS.items() if rows and rows[0].get(column)}
    if not panels:
        raise ValueError("there is no row with a Fréchet distance: measure first")
    figure = Figure(figsize=(1.8 + 4 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (column, title) in zip(axes, panels.items()):
        draw_panel(axis, rows, column)
        axis.set(xscale="log", yscale="log", xlabel="network evaluations a picture", title=title)
        set_ticks(axis.xaxis, EVALUATIONS)
        set_ticks(axis.yaxis, DISTANCES)
    axes[0].set_ylabel("Fréchet distance to the training pictures")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    files.write_picture(target, figure)


def draw_panel(axis: Any, rows: Sequence[Text], column: str) -> None:
    lines = list(dict.fromkeys((row["method"], row["guidance_scale"]) for row in rows))
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(method for method, _ in lines))}
    for method, scale in lines:
        found: dict[int, list[float]] = {}  # a figure of each seed of the training
        for row in rows:
            if (row["method"], row["guidance_scale"]) == (method, scale):
                found.setdefault(int(row["evaluations"]), []).append(float(row[column]))
        points = sorted((evaluations, statistics.fmean(figures)) for evaluations, figures in found.items())
        guided = float(scale) != 1
        label = f"{method}, guidance {scale}" if guided else f"{method}, no guidance"
        axis.plot(*zip(*points), "o-" if guided else "o--", color=colours[method], label=label, markersize=4)
    floor = float(rows[0]["fd_floor_autoencoder"])
    axis.axhline(floor, color="grey", linewidth=0.8, linestyle=":", label="autoencoder's floor")


def set_ticks(side: Any, ticks: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    low, high = side.get_view_interval()
    shown = [tick for tick in ticks if low <= tick <= high]
    side.set_ticks(shown, labels=[str(tick) for tick in shown])
    side.set_minor_locator(NullLocator())
