"""The results of `benchmarks.kernels` as a picture, from the rows of their CSV file alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from coalescer_fast import files

from ..harness.results import Text
from .report import BACKENDS, MACHINE, Group, groups, split

COLOURS = {"cuda": "C3", "triton": "C2", "cpu": "C0", "compile": "C1", "eager_contiguous": "0.55", "reference": "C4"}
NAMES = {"compile": "torch.compile", "eager_contiguous": "eager, contiguous", "reference": "reference backend"}
MARKERS = "osD"  # of the dtypes, float32 first
TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100)
DECADES = (1e-3, 0.01, 0.1, 1, 10, 100)


def draw(rows: Sequence[Text], target: Path) -> None:
    """Draw the speed-up over eager against the size of the tensor, for the machine that was measured last.

    An op has a panel, a call and batch a point, a provider a colour, a dtype a marker.
    """
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    machine, cache, mine = latest(groups(rows))
    names = compared(mine)
    mine = [group for group in mine if any(not math.isnan(group.ratio("eager", name)) for name in names)]
    dtypes = sorted({group.labels["dtype"] for group in mine}, reverse=True)
    markers = dict(zip(dtypes, MARKERS))
    panels = split(mine, "kernel_name")
    columns = min(2, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1 + 4.6 * columns, 1.2 + 3.1 * height), layout="constrained")
    axes = list(figure.subplots(height, columns, squeeze=False, sharex=True).flat)
    for axis, ((op,), parts) in zip(axes, panels.items()):
        draw_panel(axis, op, parts, names, markers)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    gpu, device, threads, torch = machine
    where = gpu or f"{device}, {threads} thread{'s' if threads != '1' else ''}"
    title = (
        f"Fused ops against eager PyTorch {torch} (channels_last)\n{where}; {cache} caches; above the line is faster"
    )
    figure.suptitle(title, fontsize=10)
    handles = legend(names, markers)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    files.write_picture(target, figure)


def latest(all_groups: Sequence[Group]) -> tuple[tuple[str, ...], str, list[Group]]:
    """The machine that was measured last, the state of its caches, warm if there is a choice, and its groups."""
    machines = split([group for group in all_groups if group.labels["metric_name"] == "time"], *MACHINE)
    if not machines:
        raise ValueError("there is no time of a call to draw: measure without --overhead first")
    machine, mine = max(machines.items(), key=lambda item: max(group.labels["timestamp"] for group in item[1]))
    caches = {cache: parts for (cache,), parts in split(mine, "cache").items()}
    cache = "warm" if "warm" in caches else next(iter(caches))
    return machine, cache, caches[cache]


def compared(mine: Sequence[Group]) -> list[str]:
    """The providers that were measured beside eager."""
    names = [name for name in COLOURS if any(not math.isnan(group.ratio("eager", name)) for group in mine)]
    if len(names) > 1 and "reference" in names:
        names.remove("reference")  # plain torch, as eager is
    if not names:
        raise ValueError("nothing was measured beside eager: measure with the peer eager first")
    return names


def draw_panel(axis: Any, op: str, parts: Sequence[Group], names: Sequence[str], markers: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for name in reversed(names):
        for dtype, marker in markers.items():
            of_dtype = [group for group in parts if group.labels["dtype"] == dtype]
            points = [(float(group.labels["x_value"]), group.ratio("eager", name)) for group in of_dtype]
            points = [(x, y) for x, y in points if not math.isnan(y)]
            face = COLOURS[name] if dtype == next(iter(markers)) else "none"
            style = {"linestyle": "", "marker": marker, "markersize": 3.5, "markeredgewidth": 0.7, "alpha": 0.75}
            axis.plot(
                [x for x, _ in points], [y for _, y in points], color=COLOURS[name], markerfacecolor=face, **style
            )
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="size of the tensor", ylabel="times as fast as eager")
    axis.xaxis.set_tick_params(labelbottom=True)
    axis.set_title(title(op, parts, names), fontsize=10)
    mark_cache(axis, float(parts[0].labels["llc_bytes"]))
    low, high = axis.get_ylim()
    ticks = [tick for tick in (TICKS if high < 300 * low else DECADES) if low <= tick <= high]
    axis.yaxis.set_ticks(ticks, labels=[f"{tick:g}×" for tick in ticks])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_locator(LogLocator(10))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: size(x)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(color="0.92")


def title(op: str, parts: Sequence[Group], names: Sequence[str]) -> str:
    """The op, and the median speed-up of each backend."""
    words = [op]
    for name in (name for name in names if name in BACKENDS):
        if ratios := [ratio for group in parts if not math.isnan(ratio := group.ratio("eager", name))]:
            words.append(f"{name} {median(ratios):.1f}× at the median")
    return ", ".join(words)


def mark_cache(axis: Any, size: float) -> None:
    """Draw where tensors no longer fit the last-level cache, if that is in the panel."""
    low, high = axis.get_xlim()
    if low < size < high:
        axis.axvline(size, color="grey", linewidth=0.8, linestyle=":")
        place = axis.get_xaxis_transform()
        axis.text(size, 0.98, " beyond\n the cache", transform=place, va="top", fontsize=7, color="grey")


def legend(names: Sequence[str], markers: dict[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker="o", color=COLOURS[name], label=NAMES.get(name, f"{name} backend"))
        for name in names
    ]
    for dtype, marker in markers.items():
        face = "black" if dtype == next(iter(markers)) else "none"
        style: dict[str, Any] = {"linestyle": "", "marker": marker, "color": "black", "markerfacecolor": face}
        handles.append(Line2D([], [], label=dtype, markersize=4, **style))
    return handles


def size(count: float) -> str:
    """A number of bytes with its unit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:g} {unit}"
    return f"{count:g} B"
