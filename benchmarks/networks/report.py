"""The tables of `benchmarks.networks` in Markdown, from the rows of its CSV file alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..harness.results import Text

MACHINE = ("cpu", "threads", "isa")
CELL = ("model", "scale", "size", "batch")
NEEDED = (*MACHINE, *CELL, "provider", "dtype", "y_value_50", "status", "timestamp")
HEAD = (
    *("provider", "dtype", "ms", "of eager", "% of peak", "error, %", "peak RSS, GB"),
    *("converted, s", "prepared, s", "cold start, s", "with a cache, s"),
)


def tables(rows: Sequence[Text]) -> Iterator[str]:
    """A table for each network on each machine, then what could not run or failed.

    Raises:
        ValueError: there is no row, or a column is missing.
    """
    for key, mine in groups(rows).items():
        cpu, threads, isa, model, scale, size, batch = key
        count = f"{threads} thread{'s' if threads != '1' else ''}"
        scaled = f", widths times {scale}" if float(scale) != 1 else ""
        capped = f", {isa} alone" if isa else ""
        yield f"**{model}**{scaled}, latents {size}×{size}, batch {batch}: {cpu}, {count}{capped}"
        yield ""
        head = HEAD if any(row.get("cached_cold_s") for row in mine) else HEAD[:-1]  # measured with --cached alone
        yield "| " + " | ".join(head) + " |"
        yield "|" + "---|" * len(head)
        for row in mine:
            if row["status"] == "ok":
                yield "| " + " | ".join(cells(row)[: len(head)]) + " |"
        yield ""
        for row in mine:
            if row["status"] != "ok":
                yield f"- {row['provider']} {row['dtype']} {row['status']}"
        if any(row["status"] != "ok" for row in mine):
            yield ""


def groups(rows: Sequence[Text]) -> dict[tuple[str, ...], list[Text]]:
    """Rows by machine and network; of what was measured more than once, the latest."""
    found: dict[tuple[str, ...], dict[tuple[str, str], Text]] = {}
    for row in rows:
        if missing := [name for name in NEEDED if name not in row]:
            raise ValueError(
                f"the column {missing[0]} is missing: give a CSV file that benchmarks.networks has written"
            )
        mine = found.setdefault(tuple(row[name] for name in (*MACHINE, *CELL)), {})
        key = row["provider"], row["dtype"]
        if key not in mine or row["timestamp"] >= mine[key]["timestamp"]:
            mine[key] = row
    if not found:
        raise ValueError("there is no row: measure first")
    return {key: list(mine.values()) for key, mine in found.items()}


def cells(row: Text) -> list[str]:
    def number(name: str, digits: str, factor: float = 1.0) -> str:
        return f"{float(row[name]) * factor:{digits}}" if row.get(name) else ""

    time = f"{float(row['y_value_50']):.4g}" + "~" * (row["quiet"] == "0")
    return [
        *(row["provider"], row["dtype"], time, number("speedup_over_eager", ".2f") + "×"),
        *(number("percent_of_peak", ".0f"), number("error", ".2g", 100), number("peak_rss_mb", ".2f", 1e-3)),
        *(number(name, ".1f") for name in ("convert_s", "prepare_s", "cold_s", "cached_cold_s")),
    ]
