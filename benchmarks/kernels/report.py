"""What the results of `benchmarks.kernels` say: from rows of their CSV file alone, in words and as a picture."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from coalescer_fast import files

Text = dict[str, str]

BACKENDS = ("cuda", "triton", "cpu", "reference")
PEERS = ("eager", "eager_contiguous", "compile")
MACHINE = ("gpu_name", "device", "threads", "torch")
TARGET_SPEEDUP, TARGET_OF_COPY, TARGET_OVERHEAD = 3.0, 60.0, 12.0


@dataclass
class Group:
    """The providers of one call, batch, dtype and state of the caches, measured side by side; labels: any of their rows."""

    labels: Text
    rows: dict[str, Text]

    def time(self, provider: str) -> float:
        return self.quantile(provider, "50")

    def quantile(self, provider: str, percent: str) -> float:
        """Microseconds; NaN for a provider that was not measured, failed, or was disturbed."""
        row = self.rows.get(provider, {})
        return float(row[f"y_value_{percent}"]) if row.get("quiet") == "1" else math.nan

    def ratio(self, peer: str, provider: str) -> float:
        return self.time(peer) / self.time(provider)

    @property
    def disturbed(self) -> int:
        """How many of the times were taken while other processes had the CPUs."""
        return sum(row["quiet"] == "0" for row in self.rows.values())

    @property
    def beyond_cache(self) -> bool:
        return float(self.labels["x_value"]) > float(self.labels["llc_bytes"])

    def of_copy(self, provider: str) -> float:
        """Percent of the copy's rate; NaN where either has no time."""
        known = not math.isnan(self.time(provider) + self.time("copy"))
        return float(self.rows[provider]["percent_of_copy"]) if known else math.nan

    def __str__(self) -> str:
        labels = self.labels
        call = json.loads(labels["extra_benchmark_config_str"])["call"]
        return f"{labels['kernel_name']} {labels['dtype']} {labels['cache']}, {labels['shapes']} {call} batch {labels['batch']}"


def groups(rows: Sequence[Text]) -> list[Group]:
    """The rows put together again; of what was measured more than once, on the same machine with as many threads, the latest."""
    found: dict[tuple[str, ...], Group] = {}
    of_a_cell = (
        "kernel_name",
        "metric_name",
        "shapes",
        "extra_benchmark_config_str",
        "batch",
        "dtype",
        "cache",
        *MACHINE,
    )
    for row in rows:
        if missing := [
            name
            for name in (*of_a_cell, "timestamp", "kernel_provider", "x_value", "llc_bytes", "quiet")
            if name not in row
        ]:
            raise ValueError(f"the column {missing[0]} is missing: give a CSV file that benchmarks.kernels has written")
        key = tuple(row[name] for name in of_a_cell)
        if key not in found or found[key].labels["timestamp"] < row["timestamp"]:
            found[key] = Group(row, {})
        if found[key].labels["timestamp"] == row["timestamp"]:
            found[key].rows[row["kernel_provider"]] = row
    if not found:
        raise ValueError("there is no row: measure first")
    return list(found.values())


def split(all_groups: Sequence[Group], *names: str) -> dict[tuple[str, ...], list[Group]]:
    parts = defaultdict(list)
    for group in all_groups:
        parts[tuple(group.labels[name] for name in names)].append(group)
    return dict(parts)


def summary(rows: Sequence[Text]) -> Iterator[str]:
    """Lines: speed-ups an op, dtype, state of the caches and backend, the targets, and where a peer is faster."""
    for machine, mine in split(groups(rows), *MACHINE).items():
        gpu, device, threads, torch = machine
        yield f"{gpu or device}, {threads} thread{'s' if threads != '1' else ''}, torch {torch}"
        times = [group for group in mine if group.labels["metric_name"] == "time"]
        if times:
            yield from speedups(times)
            yield from targets(times)
            yield from slower(times)
        yield from overheads([group for group in mine if group.labels["metric_name"] == "overhead"])
        if disturbed := sum(group.disturbed for group in mine):
            every = sum(len(group.rows) for group in mine)
            yield f"  {disturbed} of {every} times were disturbed by other processes and are left out: measure them again, with --again"
        failures = [(group, name, row) for group in mine for name, row in group.rows.items() if row["status"] != "ok"]
        for group, name, row in failures:
            yield f"  {name} {row['status']} ({group})"


def spread(values: Sequence[float]) -> str:
    """Median, minimum and maximum, without what was not measured."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return f"{'-':>20}"
    return f"{median(values):6.2f} {min(values):6.2f} {max(values):6.2f}"


def measured(mine: Sequence[Group]) -> list[str]:
    return [name for name in BACKENDS if any(not math.isnan(group.time(name)) for group in mine)]


def speedups(times: Sequence[Group]) -> Iterator[str]:
    heads = (f"{'time(eager)/time':>20}", f"{'time(compile)/time':>20}", f"{'% of copy beyond LLC':>20}")
    yield f"  {'op':15} dtype cache {'backend':10} calls  {'  '.join(heads)}"
    yield " " * 49 + "  ".join(["median    min    max"] * 3)
    for (op, dtype, cache), mine in split(times, "kernel_name", "dtype", "cache").items():
        for name in measured(mine):
            count = sum(not math.isnan(group.time(name)) for group in mine)
            against = [spread([group.ratio(peer, name) for group in mine]) for peer in ("eager", "compile")]
            copied = spread(
                [
                    float(group.rows[name]["percent_of_copy"] or "nan")
                    for group in mine
                    if group.beyond_cache and name in group.rows
                ]
            )
            yield f"  {op:15} {dtype:5} {cache:5} {name:10} {count:5}  {'  '.join([*against, copied])}"


def targets(times: Sequence[Group]) -> Iterator[str]:
    """What the project promises of its own kernels, and whether it is so."""
    for name in measured(times):
        if name == "reference":
            continue
        for (op, dtype, cache), mine in split(times, "kernel_name", "dtype", "cache").items():
            eager = [r for group in mine if not math.isnan(r := group.ratio("eager", name))]
            compiled = [r for group in mine if not math.isnan(r := group.ratio("compile", name))]
            large = [share for group in mine if group.beyond_cache and not math.isnan(share := group.of_copy(name))]
            kept: list[tuple[str, bool]] = []
            if op == "group_norm_silu":
                if eager:
                    kept.append((f"{TARGET_SPEEDUP:g}x over eager at the median call", median(eager) >= TARGET_SPEEDUP))
                if compiled:
                    kept.append(("never slower than compile", min(compiled) >= 1))
                if large:
                    kept.append(
                        (f"{TARGET_OF_COPY:g} % of copy beyond the cache, the median", median(large) >= TARGET_OF_COPY)
                    )
            if eager:
                kept.append(("never slower than eager", min(eager) >= 1))
            if kept:
                yield f"  target, {op} on {name}, {dtype} {cache}: " + "; ".join(
                    f"{'met' if ok else 'MISSED'}: {what}" for what, ok in kept
                )


def slower(times: Sequence[Group]) -> Iterator[str]:
    """Where a backend takes longer than a peer. The reference is no contender: only how often."""
    for name in measured(times):
        found = []
        mine = [group for group in times if not math.isnan(group.time(name))]
        for group in mine:
            peer = min(PEERS, key=lambda peer: (math.isnan(group.time(peer)), group.time(peer)))
            if group.time(name) > group.time(peer):
                within = ", within their spread" if group.quantile(name, "20") <= group.quantile(peer, "80") else ""
                found.append(
                    (
                        group.ratio(name, peer),
                        f"{group}: {group.time(name):.1f} us, {peer} {group.time(peer):.1f} us{within}",
                    )
                )
        yield f"  {name} is slower than the fastest peer in {len(found)} of {len(mine)} calls{':' if found and name != 'reference' else ''}"
        if name != "reference":
            for ratio, words in sorted(found, reverse=True):
                yield f"    {ratio:.2f}x the time: {words}"


def overheads(mine: Sequence[Group]) -> Iterator[str]:
    if mine:
        yield f"  microseconds a call on 1x8x2x2 (target: below {TARGET_OVERHEAD:g})"
    for group in mine:
        cells = [f"{name} {group.time(name):.1f}" for name in (*BACKENDS, *PEERS) if not math.isnan(group.time(name))]
        yield f"    {group.labels['kernel_name']:15} {group.labels['dtype']}: {', '.join(cells)}"


COLOURS = {"cuda": "C3", "triton": "C2", "cpu": "C0", "compile": "C1", "eager_contiguous": "0.55", "reference": "C4"}
NAMES = {"compile": "torch.compile", "eager_contiguous": "eager, contiguous", "reference": "reference backend"}


def plot(rows: Sequence[Text], target: Path) -> None:
    """Speed-up over eager against the size of the tensor: a panel an op, a point a call and batch, a colour a provider."""
    from matplotlib.figure import Figure  # without pyplot: no display and no global state
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    machines = split([group for group in groups(rows) if group.labels["metric_name"] == "time"], *MACHINE)
    if not machines:
        raise ValueError("there is no time of a call to draw: measure without --overhead first")
    machine, mine = max(machines.items(), key=lambda item: max(group.labels["timestamp"] for group in item[1]))
    caches = split(mine, "cache")
    (cache,), mine = next(iter(caches.items())) if ("warm",) not in caches else (("warm",), caches["warm",])
    names = [name for name in COLOURS if any(not math.isnan(group.ratio("eager", name)) for group in mine)]
    if len(names) > 1 and "reference" in names:
        names.remove("reference")  # plain torch, as eager is
    if not names:
        raise ValueError("nothing was measured beside eager: measure with the peer eager first")
    mine = [group for group in mine if any(not math.isnan(group.ratio("eager", name)) for name in names)]
    dtypes = sorted({group.labels["dtype"] for group in mine}, reverse=True)  # fp32 first
    markers = {dtype: marker for dtype, marker in zip(dtypes, "osD")}
    panels = split(mine, "kernel_name")
    columns = min(2, len(panels))
    figure = Figure(figsize=(1 + 4.6 * columns, 1.2 + 3.1 * math.ceil(len(panels) / columns)), layout="constrained")
    axes = list(figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False, sharex=True).flat)
    for axis, ((op,), parts) in zip(axes, panels.items()):
        for name in reversed(names):
            for dtype, marker in markers.items():
                points = [
                    (float(g.labels["x_value"]), g.ratio("eager", name)) for g in parts if g.labels["dtype"] == dtype
                ]
                points = [point for point in points if not math.isnan(point[1])]
                face = COLOURS[name] if dtype == dtypes[0] else "none"
                style = {"linestyle": "", "marker": marker, "markersize": 3.5, "markeredgewidth": 0.7, "alpha": 0.75}
                axis.plot(
                    [x for x, _ in points], [y for _, y in points], color=COLOURS[name], markerfacecolor=face, **style
                )
        axis.axhline(1, color="black", linewidth=0.8)
        cached = float(parts[0].labels["llc_bytes"])
        axis.set(xscale="log", yscale="log", xlabel="size of the tensor", ylabel="times as fast as eager")
        axis.xaxis.set_tick_params(labelbottom=True)
        ours = [name for name in names if name in BACKENDS]
        medians = [(name, [r for g in parts if not math.isnan(r := g.ratio("eager", name))]) for name in ours]
        axis.set_title(
            op + "".join(f", {name} {median(ratios):.1f}× at the median" for name, ratios in medians if ratios),
            fontsize=10,
        )
        if axis.get_xlim()[0] < cached < axis.get_xlim()[1]:
            axis.axvline(cached, color="grey", linewidth=0.8, linestyle=":")
            axis.text(
                cached,
                0.98,
                " beyond\n the cache",
                transform=axis.get_xaxis_transform(),
                va="top",
                fontsize=7,
                color="grey",
            )
        low, high = axis.get_ylim()
        fine = high < 300 * low
        ticks = [
            t
            for t in ((0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100) if fine else (1e-3, 0.01, 0.1, 1, 10, 100))
            if low <= t <= high
        ]
        axis.yaxis.set_ticks(ticks, labels=[f"{t:g}×" for t in ticks])
        axis.yaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_locator(LogLocator(10))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: size(x)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(color="0.92")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    gpu, device, threads, torch = machine
    where = gpu or f"{device}, {threads} thread{'s' if threads != '1' else ''}"
    figure.suptitle(
        f"Fused ops against eager PyTorch {torch} (channels_last)\n{where}; {cache} caches; above the line is faster",
        fontsize=10,
    )
    handles = [
        Line2D([], [], linestyle="", marker="o", color=COLOURS[name], label=NAMES.get(name, f"{name} backend"))
        for name in names
    ]
    for dtype, marker in markers.items():
        face = "none" if dtype != dtypes[0] else "black"
        handles.append(
            Line2D([], [], linestyle="", marker=marker, color="black", markerfacecolor=face, markersize=4, label=dtype)
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    files.write_picture(target, figure)


def size(count: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:g} {unit}"
    return f"{count:g} B"
