"""What `benchmarks.gpu` says of its parts and of the times in kernels.csv and sampler.csv."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from coalescer_fast.ops.dispatch import BACKENDS

from ..kernels import benchmark as kernels
from ..kernels import report
from ..sampler import report as sampler_report

# targets: the share of the copy's rate, the smallest tensor that it is asked of, and the times of (an empty kernel +
# the bytes at the rate)
OF_COPY, LARGE, OF_FLOOR, RATE = 85.0, 64e6, 1.5, 3e12
RIVALS = (*kernels.PEERS, "triton")
# goals: at these batches, so many times as fast as compile
OVER_COMPILE = {"1": 1.3, "64": 1.15}


@dataclass
class Result:
    """status: ok, failed, timed out, not installed or left out."""

    part: str
    status: str
    seconds: float
    limit: float
    output: str

    @property
    def failed(self) -> bool:
        return self.status in ("failed", "timed out")


def asked(target: str, values: Sequence[float], good: Callable[[float], bool], unit: str) -> dict[str, str]:
    """Whether all values that were measured are good."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return {"target": target, "status": "not measured", "figures": ""}
    kept = sum(map(good, values))
    figures = (
        f"{kept} of {len(values)} {unit}; from {min(values):.3g} to {max(values):.3g}, median {median(values):.3g}"
    )
    return {"target": target, "status": "met" if kept == len(values) else "missed", "figures": figures}


def targets(rows: Sequence[report.Text]) -> list[dict[str, str]]:
    """What is asked of the GPU backends: the target, whether it is met, and the figures."""
    found = []
    for (op, dtype, cache), mine in report.split(report.groups(rows), "kernel_name", "dtype", "cache").items():
        for name in [each for each in report.measured(mine) if BACKENDS.get(each) and BACKENDS[each].device == "cuda"]:
            shares = [g.of_copy(name) for g in mine if op == "group_norm_silu" and float(g.labels["x_value"]) >= LARGE]
            times = [over_floor(g, name) for g in mine if g.labels["batch"] == "1"]
            large = f"at least {OF_COPY:g} % of the copy's rate from {LARGE / 1e6:g} MB up"
            small = f"at most {OF_FLOOR:g} x (an empty kernel + the bytes at {RATE / 1e12:g} TB/s) at batch 1"
            for words, values, good in (
                (large, shares, lambda x: x >= OF_COPY),
                (small, times, lambda x: x <= OF_FLOOR),
            ):
                if not all(map(math.isnan, values)):
                    found.append(asked(f"{op} on {name}, {dtype} {cache}: {words}", values, good, "calls"))
    return found


def goals(rows: Sequence[report.Text]) -> list[dict[str, str]]:
    """What is asked of the sampler, in the faster dtype of each: the target, whether it is met, and the figures."""

    def ratios(*peers: str, batch: str = "") -> list[float]:
        cells = [mine for key, mine in sampler_report.groups(rows).items() if key[-1] == batch or not batch]
        times = [
            [sampler_report.time(sampler_report.fastest(mine, *names)) for names in (peers, ("ours",))]
            for mine in cells
        ]
        return [theirs / own for theirs, own in times]

    found = [
        asked(
            f"sampler: at least {factor:g} x as fast as compile at batch {batch}",
            ratios("compile", batch=batch),
            factor.__le__,
            "cases",
        )
        for batch, factor in OVER_COMPILE.items()
    ]
    everybody = [name for name in sampler_report.COLOURS if name != "ours"]
    return [*found, asked("sampler: not slower than the fastest peer", ratios(*everybody), (1.0).__le__, "cases")]


def over_floor(group: report.Group, name: str) -> float:
    """The time over (that of an empty kernel + that of the bytes at `RATE`); NaN where either was not measured."""
    seconds, empty = group.time(name) * 1e-6, group.time("empty") * 1e-6
    if math.isnan(seconds + empty):
        return math.nan
    return seconds / (empty + float(group.rows[name]["gb_per_s"]) * 1e9 * seconds / RATE)


def slower(rows: Sequence[report.Text]) -> list[str]:
    """The calls for which cuda takes longer than another, the worst first."""
    found = []
    for group in report.groups(rows):
        ratio, rival = max(
            ((r, name) for name in RIVALS if not math.isnan(r := group.ratio("cuda", name))), default=(0.0, "")
        )
        if ratio > 1:
            figures = f"{group.time('cuda'):.1f} us, {rival} {group.time(rival):.1f} us"
            found.append((ratio, f"{ratio:.2f}x the time: {group}: {figures}"))
    return [words for _, words in sorted(found, reverse=True)]


def summary(
    facts: dict[str, str], results: Sequence[Result], rows: Sequence[report.Text], drawn: Sequence[report.Text] = ()
) -> Iterator[str]:
    """The report in Markdown."""
    yield from ("# coalescer_fast on a GPU", "", "| | |", "|---|---|")
    yield from (f"| {name} | {value} |" for name, value in facts.items())
    yield from ("", "## Parts", "", "| part | status | seconds | of | last line |", "|---|---|---:|---:|---|")
    for each in results:
        last = (each.output.strip().splitlines() or [""])[-1].strip()[:200].replace("|", "\\|")
        yield f"| {each.part} | {each.status} | {each.seconds:.0f} | {each.limit:.0f} | {last} |"
    if rows:
        yield from ("", "## Medians over the calls", "")
        yield "| op | dtype | caches | backend | calls | us | x eager | x eager NCHW | x inductor | % of copy |"
        yield "|---|---|---|---|---:|---:|---:|---:|---:|---:|"
        for (op, dtype, cache), mine in report.split(report.groups(rows), "kernel_name", "dtype", "cache").items():
            for name in (*report.measured(mine), *kernels.YARDSTICKS):
                known = [group for group in mine if not math.isnan(group.time(name))]
                ratios = [
                    [group.ratio(peer, name) for group in known] for peer in kernels.PEERS if name in BACKENDS
                ] or [[]] * 3
                shares = [group.of_copy(name) for group in known if name in BACKENDS]
                cells = [middle([group.time(name) for group in known]), *map(middle, ratios), middle(shares)]
                yield f"| {op} | {dtype} | {cache} | {name} | {len(known)} | {' | '.join(cells)} |"
        yield from ("", "## Targets", "", *table(targets(rows)))
        worse, all_groups = slower(rows), report.groups(rows)
        count = sum(not math.isnan(group.time("cuda")) for group in all_groups)
        yield from (
            "",
            f"cuda is slower than eager, inductor or triton in {len(worse)} of the {count} calls measured on it.",
            "",
        )
        yield from (f"- {line}" for line in worse)
        wrong = [row for row in rows if row["status"] != "ok"]
        yield from (f"- {row['kernel_provider']} {row['status']}: {report.Group(row, {})}" for row in wrong)
    if drawn:
        yield from (
            "",
            "## The whole sampler",
            "",
            *table(goals(drawn)),
            "",
            "```",
            *sampler_report.summary(drawn),
            "```",
        )
    for each in (result for result in results if result.failed):
        yield from ("", f"## {each.part}: {each.status}", "", "```", each.output.strip(), "```")


def table(found: Sequence[dict[str, str]]) -> Iterator[str]:
    yield from ("| target | | figures |", "|---|---|---|")
    yield from (f"| {each['target']} | {each['status']} | {each['figures']} |" for each in found)


def middle(values: Sequence[float]) -> str:
    values = [value for value in values if not math.isnan(value)]
    return f"{median(values):.3g}" if values else ""
