"""What the results of `benchmarks.sampler` say in words, from the rows of their CSV file alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ..harness.results import Text
from ..harness.tables import Table

INT8 = ("ours_int8", "openvino_int8")  # which are compared with each other alone
MACHINE = ("cpu", "gpu", "threads", "torch", "allocator")
CELL = ("model", "part", "guidance_scale", "batch")
NEEDED = (*MACHINE, *CELL, "provider", "dtype", "y_value_50", "timestamp")
COLOURS = {  # of the providers in a plot, and their order
    "ours": "C3",
    "ours_int8": "C4",
    "openvino": "C0",
    "openvino_int8": "C5",
    "compile": "C1",
    "compile_graphs": "C6",
    "onnxruntime": "C2",
    "eager_channels_last": "0.6",
    "eager": "0.8",
}


def groups(rows: Sequence[Text]) -> dict[tuple[str, ...], dict[str, Text]]:
    """Rows by machine and cell, then by provider and dtype; of what was measured more than once, the latest run."""
    found: dict[tuple[str, ...], dict[str, Text]] = {}
    for row in rows:
        if missing := [name for name in NEEDED if name not in row]:
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
    """The row with the shortest time of these providers."""
    rows = [row for row in mine.values() if row["provider"] in names and row["y_value_50"]]
    return min(rows, key=time, default=None)


def summary(rows: Sequence[Text]) -> Iterator[str]:
    """Lines: ours beside the fastest peer for each part; then where ours is slower, what could not run, what failed."""
    machine: tuple[str, ...] = ()
    losses: list[tuple[float, str]] = []
    others: dict[str, list[str]] = {}
    layout = {"model": "<9", "part": "<14", "batch": ">5", "eager": ">10", "ours": ">17", "fastest peer": ">37"}
    table = Table({**layout, "peer/ours": ">9", "% of floor": ">10"}, indent="  ")
    for key, mine in groups(rows).items():
        if key[:4] != machine:
            machine = key[:4]
            cpu, gpu, threads, torch = machine
            where = f"{gpu or cpu}, {threads} thread{'s' if threads != '1' else ''}, torch {torch}"
            yield f"{where}; milliseconds, ~ disturbed by other processes"
            yield table.head
        model, part, guidance, batch = key[4:]
        peers = [name for name in COLOURS if name not in ("ours", *INT8)]
        pairs = [(fastest(mine, "ours"), fastest(mine, *peers))]
        own, peer = (fastest(mine, name) for name in INT8)
        if own and peer:
            pairs.append((own, peer))
        for own, peer in pairs:
            ratio = time(peer) / time(own)
            title = part + (f" w={float(guidance):g}" if guidance else "")
            floor = own["percent_of_floor"] if own else ""
            figures = [f"{ratio:.2f}" if own and peer else "-", f"{float(floor):.0f}" if floor else "-"]
            times = [cell(fastest(mine, "eager")), cell(own, named=True), cell(peer, named=True)]
            yield table.line(model, title, batch, *times, *figures)
            if own and peer and ratio < 1:
                losses.append((1 / ratio, f"{model} {title} batch {batch}, {loss(own, peer)}"))
        for name, row in mine.items():
            if row["status"] != "ok":
                others.setdefault(f"{name} {row['status']}", []).append(f"{model} {title} {batch}")
    yield from (f"  SLOWER, {ratio:.2f}x the time: {words}" for ratio, words in sorted(losses, reverse=True))
    if any(row["weights"].startswith("random") for row in rows):
        yield "  m and l: random weights, timing only"
    yield from (f"  {words}" + (f" ({', '.join(where)})" if "FAIL" in words else "") for words, where in others.items())


def loss(own: Text, peer: Text) -> str:
    """The peer that is faster, and how sure that is."""
    within = ", within their spread" if float(own["y_value_20"]) <= float(peer["y_value_80"]) else ""
    disturbed = ", disturbed" if "0" in (own["quiet"], peer["quiet"]) else ""
    return f"{peer['provider']} {peer['dtype']}{within}{disturbed}"


def cell(row: Text | None, named: bool = False) -> str:
    """A time in the table; with ``named``, the provider unless it is ours, and its dtype."""
    if row is None:
        return "-"
    words = [row["provider"]] * (row["provider"] != "ours") + [row["dtype"]] if named else []
    return " ".join([*words, f"{time(row):.2f}{'~' if row['quiet'] == '0' else ''}"])
