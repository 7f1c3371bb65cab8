"""The tables of `benchmarks.quality` in Markdown, from the rows of its CSV file alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from ..harness.results import Text

BUDGETS = (3, 8, 50)  # network evaluations a picture
# columns of the CSV behind the Fréchet distance, their names and digits
FIGURES = {
    "name_top1": ("right emoji, by name", 3),
    "free_wording": ("free wordings", 3),
    "below_q5": ("near-copies", 2),
    "coverage": ("coverage", 2),
    "density": ("density", 2),
}
# method, guidance scale, steps
Setting = tuple[str, str, int]


def tables(rows: Sequence[Text]) -> Iterator[str]:
    """The Fréchet distance of every setting, then the figures of each method's best setting within each budget.

    Raises:
        ValueError: there is no row with a Fréchet distance.
    """
    found = settings(rows)
    if not found:
        raise ValueError("there is no row with a Fréchet distance: measure first")
    steps = sorted({count for _, _, count in found})
    yield "| steps | " + " | ".join(map(str, steps)) + " |"
    yield "|---|" + "---|" * len(steps)
    for method, scale in dict.fromkeys((method, scale) for method, scale, _ in found):
        mine = [found.get((method, scale, count), []) for count in steps]
        cells = [f"{mean(some, 'fd_name'):.1f} ({some[0]['evaluations']})" if some else "–" for some in mine]
        yield f"| {named(method, scale)} | " + " | ".join(cells) + " |"
    figures = {name: told for name, told in FIGURES.items() if rows[0].get(name)}
    for budget in BUDGETS:
        yield ""
        yield f"At most {budget} evaluations:"
        yield ""
        head = ["method", "steps", "evaluations", "Fréchet distance", *(told for told, _ in figures.values())]
        yield "| " + " | ".join(head) + " |"
        yield "|" + "---|" * len(head)
        for (method, scale, count), some in best(found, budget):
            cells = [named(method, scale), str(count), some[0]["evaluations"]]
            cells.append(", ".join(f"{float(row['fd_name']):.1f}" for row in some))
            cells += [f"{mean(some, name):.{digits}f}" for name, (_, digits) in figures.items()]
            yield "| " + " | ".join(cells) + " |"


def settings(rows: Sequence[Text]) -> dict[Setting, list[Text]]:
    """The rows of each setting, one for each seed of the training, in the order in which they were measured."""
    found: dict[Setting, list[Text]] = {}
    for row in rows:
        if row.get("fd_name"):
            found.setdefault((row["method"], row["guidance_scale"], int(row["steps"])), []).append(row)
    return found


def best(found: dict[Setting, list[Text]], budget: int) -> list[tuple[Setting, list[Text]]]:
    """The setting of each method within a budget that has the least Fréchet distance, a mean of seeds; least first."""
    least: dict[str, tuple[Setting, list[Text]]] = {}
    for key, some in found.items():
        if int(some[0]["evaluations"]) <= budget and (
            key[0] not in least or mean(some, "fd_name") < mean(least[key[0]][1], "fd_name")
        ):
            least[key[0]] = key, some
    return sorted(least.values(), key=lambda one: mean(one[1], "fd_name"))


def mean(rows: Sequence[Text], column: str) -> float:
    return statistics.fmean(float(row[column]) for row in rows)


def named(method: str, scale: str) -> str:
    return method if float(scale) == 1 else f"{method}, guidance {float(scale):g}"
