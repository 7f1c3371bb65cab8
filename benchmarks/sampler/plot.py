"""The results of `benchmarks.sampler` as a picture, from the rows of their CSV file alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coalescer_fast import files

from ..harness.results import Text
from .report import COLOURS, fastest, groups


def draw(rows: Sequence[Text], target: Path) -> None:
    """Draw images per second on the machine that was measured last.

    A model and part has a panel, a batch a group of bars, a provider in its faster dtype a bar.
    """
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    found = groups([row for row in rows if row["part"] != "cold"])
    newest = max(found, key=lambda key: max(row["timestamp"] for row in found[key].values()))
    panels: dict[tuple[str, ...], dict[str, dict[str, Text]]] = {}
    for key, mine in found.items():
        if key[:4] == newest[:4]:
            panels.setdefault(key[4:7], {})[key[7]] = mine
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1 + 3.6 * columns, 1.2 + 2.6 * height), layout="constrained")
    axes = list(figure.subplots(height, columns, squeeze=False).flat)
    for axis, ((model, part, guidance), batches) in zip(axes, panels.items()):
        draw_panel(axis, batches)
        axis.set_title(f"{model} {part}" + (f", guidance {float(guidance):g}" if guidance else ""), fontsize=9)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    cpu, gpu, threads, torch = newest[:4]
    figure.suptitle(f"{gpu or cpu}, {threads} thread{'s' if threads != '1' else ''}, torch {torch}", fontsize=10)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    style: dict[str, Any] = {"loc": "outside lower center", "ncols": len(handles), "fontsize": 7, "frameon": False}
    figure.legend(handles.values(), handles.keys(), **style)
    files.write_picture(target, figure)


def draw_panel(axis: Any, batches: dict[str, dict[str, Text]]) -> None:
    for n, mine in enumerate(batches.values()):
        bars = [(name, row) for name in COLOURS if (row := fastest(mine, name)) is not None]
        for i, (name, row) in enumerate(bars):
            x, rate = n + 0.8 * (i + 0.5) / len(bars) - 0.4, float(row["images_per_s"])
            axis.bar(x, rate, 0.75 / len(bars), color=COLOURS[name], label=name.replace("_", " "))
            label = f"{rate:{'.0f' if rate >= 100 else '.3g'}}\n{row['dtype']}"
            axis.annotate(label, (x, rate), ha="center", va="bottom", fontsize=5)
    axis.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axis.set(yscale="log", ylabel="images/s")
    axis.margins(y=0.15)
