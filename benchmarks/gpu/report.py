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
    """status: ok, failed, timed out, not installed, left out, or cut: ours was measured, and something was left out."""

    part: str
    status: str
    seconds: float
    limit: float
    output: str
    stage: str = "a"

    @property
    def last_line(self) -> str:
        return (self.output.strip().splitlines() or [""])[-1].strip()

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
            ratios("compile", "compile_graphs", batch=batch),
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
    facts: dict[str, str],
    results: Sequence[Result],
    rows: Sequence[report.Text],
    drawn: Sequence[report.Text] = (),
    nets: Sequence[report.Text] = (),
) -> Iterator[str]:
    """The report in Markdown."""
    yield from ("# coalescer_fast on a GPU", "", "| | |", "|---|---|")
    yield from (f"| {name} | {value} |" for name, value in facts.items())
    yield from ("", "## Parts", "", "| part | status | seconds | of | last line |", "|---|---|---:|---:|---|")
    for each in results:
        last = each.last_line[:200].replace("|", "\\|")
        yield f"| {each.part} | {each.status} | {each.seconds:.0f} | {each.limit:.0f} | {last} |"
    if rows:
        yield from ("", "## Medians over the calls", "")
        peers = "x eager | x eager NCHW | x inductor | x chunked"
        yield f"| op | dtype | caches | backend | calls | us | {peers} | % of copy |"
        yield "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|"
        for (op, dtype, cache), mine in report.split(report.groups(rows), "kernel_name", "dtype", "cache").items():
            for name in (*report.measured(mine), *kernels.YARDSTICKS):
                known = [group for group in mine if not math.isnan(group.time(name))]
                ratios = [
                    [group.ratio(peer, name) for group in known] for peer in kernels.PEERS if name in BACKENDS
                ] or [[]] * len(kernels.PEERS)
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
    if nets:
        yield from ("", "## diffusers' own networks", "", "```", *network_lines(nets), "```")
    for each in (result for result in results if result.failed):
        yield from ("", f"## {each.part}: {each.status}", "", "```", each.output.strip(), "```")


def screen(
    facts: dict[str, str],
    results: Sequence[Result],
    rows: Sequence[report.Text],
    drawn: Sequence[report.Text],
    nets: Sequence[report.Text],
) -> Iterator[str]:
    """The report on one screen: a line for each part of the first stages, then the key figures of what was measured."""
    yield f"{facts['GPU']}, torch {facts.get('torch', '')}"
    for each in results:
        if each.stage in "ab" or each.status != "ok":
            yield f"{each.stage} {each.part:18} {each.status:13} {each.last_line[:160]}"
    if rows:
        for (op, dtype), mine in report.split(report.groups(rows), "kernel_name", "dtype").items():
            yield from (f"c {op} {dtype} {words}" for words in kernel_lines(mine))
    if drawn:
        yield from (f"d {words}" for words in sampler_lines(drawn))
    yield from (f"e {words}" for words in network_lines(nets))


def kernel_lines(mine: Sequence[report.Group]) -> Iterator[str]:
    """For each backend: how many times as fast as each peer, the median and the least, and its share of the copy."""
    for name in report.measured(mine):
        words = []
        for peer in kernels.PEERS:
            ratios = [r for group in mine if not math.isnan(r := group.ratio(peer, name))]
            if ratios and peer != "eager_contiguous":
                words.append(f"{median(ratios):.2f} x {peer} (least {min(ratios):.2f}, {len(ratios)} times)")
        large = [g for g in mine if float(g.labels["x_value"]) >= LARGE and not math.isnan(g.of_copy(name))]
        if large:
            shares = [g.of_copy(name) for g in large]
            fastest = max(float(g.rows[name]["gb_per_s"]) for g in large)
            words.append(f"from 64 MB up {min(shares):.0f} - {max(shares):.0f} % of copy, up to {fastest:.0f} GB/s")
        yield f"{name}: {'; '.join(words) or 'no times'}"


def sampler_lines(drawn: Sequence[report.Text]) -> Iterator[str]:
    """For each model and part: our time at each batch, and how many times as fast as each peer."""
    found: dict[tuple[str, ...], list[str]] = {}
    for key, mine in sampler_report.groups(drawn).items():
        model, part, guidance, batch = key[-4:]
        own = sampler_report.fastest(mine, "ours")
        if own is None:
            words = f"b{batch} ours not measured"
        else:
            ratios = [
                f"{sampler_report.time(row) / sampler_report.time(own):.2f} x {name}"
                for name in sampler_report.COLOURS
                if name not in ("ours", *sampler_report.INT8)
                and (row := sampler_report.fastest(mine, name)) is not None
            ]
            words = f"b{batch} {sampler_report.time(own):.2f} ms {' '.join(ratios)}"
        found.setdefault((model, part + (f" w={float(guidance):g}" if guidance else "")), []).append(words)
    yield from (f"{' '.join(key)}: {', '.join(words)}" for key, words in found.items())


def network_lines(nets: Sequence[report.Text]) -> Iterator[str]:
    """For each network and batch: the time of each provider and dtype, or why it has none."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in nets:
        times = f"{float(row['y_value_50']):.2f} {row['metric_unit']}" if row["y_value_50"] else row["status"][:80]
        if alone := row.get("latency_ms"):
            times += f" ({float(alone):.2f} alone)"
        cell = found.setdefault((row["model"], row["scale"], row["size"], row["batch"]), {})
        cell[f"{row['provider']} {row['dtype']}"] = times
    for (model, scale, size, batch), cell in found.items():
        times = ", ".join(f"{name} {words}" for name, words in cell.items())
        yield f"{model} scale {scale} size {size} batch {batch}: {times}"


def table(found: Sequence[dict[str, str]]) -> Iterator[str]:
    yield from ("| target | | figures |", "|---|---|---|")
    yield from (f"| {each['target']} | {each['status']} | {each['figures']} |" for each in found)


def middle(values: Sequence[float]) -> str:
    values = [value for value in values if not math.isnan(value)]
    return f"{median(values):.3g}" if values else ""
