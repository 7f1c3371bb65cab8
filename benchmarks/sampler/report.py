"""What the results of `benchmarks.sampler` say: from rows of their CSV file alone, in words and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from coalescer_fast import files

Text = dict[str, str]

MACHINE = ("cpu", "gpu", "threads", "torch", "allocator")
CELL = ("model", "part", "guidance_scale", "batch")
COLOURS = {
    "ours": "C3",
    "ours_int8": "C4",
    "openvino": "C0",
    "compile": "C1",
    "onnxruntime": "C2",
    "eager_channels_last": "0.6",
    "eager": "0.8",
}


def groups(rows: Sequence[Text]) -> dict[tuple[str, ...], dict[str, Text]]:
    """Rows by machine and cell, then by provider and dtype; of what was measured more than once, the latest run."""
    found: dict[tuple[str, ...], dict[str, Text]] = {}
    for row in rows:
        if missing := [
            name for name in (*MACHINE, *CELL, "provider", "dtype", "y_value_50", "timestamp") if name not in row
        ]:
            raise ValueError(f"the column {missing[0]} is missing: give a CSV file that benchmarks.sampler has written")
        mine = found.setdefault(tuple(row[name] for name in (*MACHINE[:-1], *CELL)), {})
        newest = max((known["timestamp"] for known in mine.values()), default="")
        if row["timestamp"] > newest:
            mine.clear()
        if row["timestamp"] >= newest:
            mine[f"{row['provider']} {row['dtype']}"] = row
    if not found:
        raise ValueError("there is no row: measure first")
    return found


def time(row: Text | None) -> float:
    """Milliseconds; NaN without a time."""
    return float(row["y_value_50"] or "nan") if row else math.nan


def fastest(mine: dict[str, Text], *names: str) -> Text | None:
    rows = [row for row in mine.values() if row["provider"] in names and row["y_value_50"]]
    return min(rows, key=time, default=None)


def summary(rows: Sequence[Text]) -> Iterator[str]:
    """Lines: ours beside the fastest peer, a row a part; then where ours is slower, what could not run, and what went wrong."""
    machine: tuple[str, ...] = ()
    losses: list[tuple[float, str]] = []
    others: dict[str, list[str]] = {}
    for key, mine in groups(rows).items():
        if key[:4] != machine:
            machine = key[:4]
            cpu, gpu, threads, torch = machine
            where = f"{gpu or cpu}, {threads} thread{'s' if threads != '1' else ''}, torch {torch}"
            yield f"{where}; milliseconds, ~ disturbed by other processes"
            heads = f"{'eager':>10} {'ours':>17} {'fastest peer':>37} {'peer/ours':>9} {'% of floor':>10}"
            yield f"  {'model':9} {'part':14} {'batch':>5} {heads}"
        model, part, guidance, batch = key[4:]
        own, peer = fastest(mine, "ours"), fastest(mine, *(name for name in COLOURS if not name.startswith("ours")))
        ratio = time(peer) / time(own)
        title = part + (f" w={float(guidance):g}" if guidance else "")
        floor = own["percent_of_floor"] if own else ""
        cells = [f"{cell(fastest(mine, 'eager')):>10}", f"{cell(own, named=True):>17}", f"{cell(peer, named=True):>37}"]
        cells += [f"{ratio:9.2f}" if own and peer else f"{'-':>9}", f"{float(floor):10.0f}" if floor else f"{'-':>10}"]
        yield f"  {model:9} {title:14} {batch:>5} {' '.join(cells)}"
        if own and peer and ratio < 1:
            within = ", within their spread" if float(own["y_value_20"]) <= float(peer["y_value_80"]) else ""
            disturbed = ", disturbed" if "0" in (own["quiet"], peer["quiet"]) else ""
            losses.append(
                (1 / ratio, f"{model} {title} batch {batch}, {peer['provider']} {peer['dtype']}{within}{disturbed}")
            )
        for name, row in mine.items():
            if row["status"] != "ok":
                others.setdefault(f"{name} {row['status']}", []).append(f"{model} {title} {batch}")
    yield from (f"  SLOWER, {ratio:.2f}x the time: {words}" for ratio, words in sorted(losses, reverse=True))
    if any(row["weights"].startswith("random") for row in rows):
        yield "  m and l: random weights, timing only"
    yield from (f"  {words}" + (f" ({', '.join(where)})" if "FAIL" in words else "") for words, where in others.items())


def cell(row: Text | None, named: bool = False) -> str:
    if row is None:
        return "-"
    label = (
        f"{row['provider']} {row['dtype']} "
        if named and row["provider"] != "ours"
        else f"{row['dtype']} "
        if named
        else ""
    )
    return f"{label}{time(row):.2f}{'~' if row['quiet'] == '0' else ''}"


def plot(rows: Sequence[Text], target: Path) -> None:
    """Images a second: a panel a model and part, a group of bars a batch, a bar a provider in its faster dtype."""
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    found = groups([row for row in rows if row["part"] != "cold"])
    newest = max(found, key=lambda key: max(row["timestamp"] for row in found[key].values()))
    panels: dict[tuple[str, ...], list[tuple[int, dict[str, Text]]]] = {}
    for key, mine in found.items():
        if key[:4] == newest[:4]:
            panels.setdefault(key[4:7], []).append((int(key[7]), mine))
    cpu, gpu, threads, torch = newest[:4]
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1 + 3.6 * columns, 1.2 + 2.6 * height), layout="constrained")
    axes = list(figure.subplots(height, columns, squeeze=False).flat)
    for axis, ((model, part, guidance), cells) in zip(axes, panels.items()):
        for n, (_, mine) in enumerate(cells):
            bars = [(name, row) for name in COLOURS if (row := fastest(mine, name)) is not None]
            for i, (name, row) in enumerate(bars):
                x, rate = n + 0.8 * (i + 0.5) / len(bars) - 0.4, float(row["images_per_s"])
                axis.bar(x, rate, 0.75 / len(bars), color=COLOURS[name], label=name.replace("_", " "))
                axis.annotate(
                    f"{rate:{'.0f' if rate >= 100 else '.3g'}}\n{row['dtype']}",
                    (x, rate),
                    ha="center",
                    va="bottom",
                    fontsize=5,
                )
        axis.set_xticks(range(len(cells)), [f"batch {batch}" for batch, _ in cells])
        axis.set(yscale="log", ylabel="images/s")
        axis.margins(y=0.15)
        axis.set_title(f"{model} {part}" + (f", guidance {float(guidance):g}" if guidance else ""), fontsize=9)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.suptitle(f"{gpu or cpu}, {threads} thread{'s' if threads != '1' else ''}, torch {torch}", fontsize=10)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=7, frameon=False
    )
    files.write_picture(target, figure)
