"""What the results of `benchmarks.kernels` say in words, from the rows of their CSV file alone."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from ..harness.results import Text
from ..harness.tables import Table

BACKENDS = ("cuda", "triton", "cpu", "reference")
PEERS = ("eager", "eager_contiguous", "compile", "chunked")
MACHINE = ("gpu_name", "device", "threads", "torch")
TARGET_SPEEDUP, TARGET_OF_COPY, TARGET_OVERHEAD = 3.0, 60.0, 12.0

CELL = ("kernel_name", "metric_name", "shapes", "extra_benchmark_config_str", "batch", "dtype", "cache", *MACHINE)
NEEDED = (*CELL, "timestamp", "kernel_provider", "x_value", "llc_bytes", "quiet")


@dataclass
class Group:
    """The providers of one call, batch, dtype and state of the caches, measured in turn.

    Attributes:
        labels: any of their rows, for what all have in common.
        rows: by provider.
    """

    labels: Text
    rows: dict[str, Text]

    def time(self, provider: str) -> float:
        return self.quantile(provider, "50")

    def quantile(self, provider: str, percent: str) -> float:
        """Microseconds; NaN for a provider that was not measured, failed or was disturbed."""
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
        what = f"{labels['kernel_name']} {labels['dtype']} {labels['cache']}"
        return f"{what}, {labels['shapes']} {call} batch {labels['batch']}"


def groups(rows: Sequence[Text]) -> list[Group]:
    """Rows that were measured together; of what was measured twice on a machine with as many threads, the latest."""
    found: dict[tuple[str, ...], Group] = {}
    for row in rows:
        if missing := [name for name in NEEDED if name not in row]:
            raise ValueError(f"the column {missing[0]} is missing: give a CSV file that benchmarks.kernels has written")
        key = tuple(row[name] for name in CELL)
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


def summary(rows: Sequence[Text], has_targets: bool = True) -> Iterator[str]:
    """Lines: speed-ups by op, dtype, state of the caches and backend, the targets, and where a peer is faster.

    Args:
        rows: of a CSV file.
        has_targets: whether enough was measured to compare with the targets.
    """
    for machine, mine in split(groups(rows), *MACHINE).items():
        gpu, device, threads, torch = machine
        yield f"{gpu or device}, {threads} thread{'s' if threads != '1' else ''}, torch {torch}"
        times = [group for group in mine if group.labels["metric_name"] == "time"]
        if times:
            yield from speedups(times)
            if has_targets:
                yield from targets(times)
            yield from slower(times)
        yield from overheads([group for group in mine if group.labels["metric_name"] == "overhead"])
        if disturbed := sum(group.disturbed for group in mine):
            every = sum(len(group.rows) for group in mine)
            disturbing = f"  {disturbed} of {every} times were disturbed by other processes and are left out"
            yield f"{disturbing}: measure them again, with --again"
        failures = [(group, name, row) for group in mine for name, row in group.rows.items() if row["status"] != "ok"]
        for group, name, row in failures:
            yield f"  {name} {row['status']} ({group})"


def spread(values: Sequence[float]) -> str:
    """Median, minimum and maximum, without what was not measured."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "-"
    return f"{median(values):6.2f} {min(values):6.2f} {max(values):6.2f}"


def measured(mine: Sequence[Group]) -> list[str]:
    return [name for name in BACKENDS if any(not math.isnan(group.time(name)) for group in mine)]


def speedups(times: Sequence[Group]) -> Iterator[str]:
    heads = {"op": "<15", "dtype": "<5", "cache": "<5", "backend": "<10", "calls": ">5"}
    figures = dict.fromkeys(("time(eager)/time", "time(compile)/time", "% of copy beyond LLC"), ">21")
    table = Table({**heads, **figures}, indent="  ")
    yield table.head
    yield table.line(*[""] * len(heads), *["median    min    max"] * len(figures))
    for (op, dtype, cache), mine in split(times, "kernel_name", "dtype", "cache").items():
        for name in measured(mine):
            count = sum(not math.isnan(group.time(name)) for group in mine)
            against = [spread([group.ratio(peer, name) for group in mine]) for peer in ("eager", "compile")]
            beyond = [group.rows[name] for group in mine if group.beyond_cache and name in group.rows]
            copied = spread([float(row["percent_of_copy"] or "nan") for row in beyond])
            yield table.line(op, dtype, cache, name, count, *against, copied)


def targets(times: Sequence[Group]) -> Iterator[str]:
    """What the kernels are expected to reach, and whether they do."""
    for name in measured(times):
        if name == "reference":
            continue
        for (op, dtype, cache), mine in split(times, "kernel_name", "dtype", "cache").items():
            eager = [r for group in mine if not math.isnan(r := group.ratio("eager", name))]
            compiled = [r for group in mine if not math.isnan(r := group.ratio("compile", name))]
            large = [share for group in mine if group.beyond_cache and not math.isnan(share := group.of_copy(name))]
            met: dict[str, bool] = {}
            if op == "group_norm_silu":
                if eager:
                    met[f"{TARGET_SPEEDUP:g}x over eager at the median call"] = median(eager) >= TARGET_SPEEDUP
                if compiled:
                    met["never slower than compile"] = min(compiled) >= 1
                if large:
                    met[f"{TARGET_OF_COPY:g} % of copy beyond the cache, the median"] = median(large) >= TARGET_OF_COPY
            if eager:
                met["never slower than eager"] = min(eager) >= 1
            if met:
                words = "; ".join(f"{'met' if ok else 'MISSED'}: {what}" for what, ok in met.items())
                yield f"  target, {op} on {name}, {dtype} {cache}: {words}"


def slower(times: Sequence[Group]) -> Iterator[str]:
    """The calls in which a backend takes longer than a peer; of the reference, only how many there are."""
    for name in measured(times):
        found = []
        mine = [group for group in times if not math.isnan(group.time(name))]
        for group in mine:
            peer = min(PEERS, key=lambda peer: (math.isnan(group.time(peer)), group.time(peer)))
            if group.time(name) > group.time(peer):
                within = ", within their spread" if group.quantile(name, "20") <= group.quantile(peer, "80") else ""
                words = f"{group}: {group.time(name):.1f} us, {peer} {group.time(peer):.1f} us{within}"
                found.append((group.ratio(name, peer), words))
        shown = sorted(found, reverse=True) if name != "reference" else []
        colon = ":" if shown else ""
        yield f"  {name} is slower than the fastest peer in {len(found)} of {len(mine)} calls{colon}"
        yield from (f"    {ratio:.2f}x the time: {words}" for ratio, words in shown)


def overheads(mine: Sequence[Group]) -> Iterator[str]:
    if mine:
        yield f"  microseconds per call on 1x8x2x2 (target: below {TARGET_OVERHEAD:g})"
    for group in mine:
        cells = [f"{name} {group.time(name):.1f}" for name in (*BACKENDS, *PEERS) if not math.isnan(group.time(name))]
        yield f"    {group.labels['kernel_name']:15} {group.labels['dtype']}: {', '.join(cells)}"
