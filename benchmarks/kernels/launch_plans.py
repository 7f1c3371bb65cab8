"""How long every way to cut group_norm_silu into blocks takes on this GPU, and the costs that `make_plan` compares.

    python -m benchmarks.kernels.launch_plans --csv FILE       # on a CUDA machine with nvcc, half a minute
    python -m benchmarks.kernels.launch_plans --fit FILE       # anywhere: prints COSTS for csrc/cuda/group_norm.h

--csv replaces the rows of group_norm_silu in the file and keeps those of other ops. The calls are those of `shapes`
at batches of 1, 4, 16 and 64, in bfloat16 with channels innermost; a plan whose numbers differ from the others' is an
error. --fit draws changes to the costs at random and keeps what is better: plans that are chosen by them should take
as little longer than the best of their call as possible, and the largest such loss counts as well. The model is that
of `microseconds` in csrc/cuda/group_norm.h. numpy alone, the same costs for the same file and seed.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..harness.arguments import Parser, command
from ..harness.results import Row, Text, read, write
from . import shapes
from .benchmark import environment

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "csrc" / "cuda" / "group_norm.h"
BATCHES = (1, 4, 16, 64)
OP = "group_norm_silu"
CALLS = {
    str(call): call for of_model in shapes.CALLS.values() for call in of_model if isinstance(call, shapes.GroupNorm)
}
# an H100's, and the kernels': see group_norm.h
MULTIPROCESSORS, SHARED_MEMORY, THREADS, LEAST_THREADS = 132, 227 * 1024, 256, 128
ELEMENT, VECTOR, MOST_VECTORS = 2, 8, 256
UNMEASURED = 100.0  # what make_plan multiplies the time of two launches of fewer than four parts by

Array = np.ndarray[Any, np.dtype[np.float64]]


class Plan(NamedTuple):
    """A way to cut a call, as `microseconds` sees it: blocks, those that a multiprocessor holds, kilobytes and rows of
    a block."""

    launches: int
    parts: int
    blocks: int
    resident: int
    kilobytes: float
    odd: bool
    rows: float


def main(argv: Sequence[str] | None = None) -> int:
    top = Parser(prog="python -m benchmarks.kernels.launch_plans", description=__doc__.partition("\n")[0])
    what = top.add_mutually_exclusive_group(required=True)
    what.add_argument("--csv", type=Path, metavar="F.csv", help="measure, and write the times there")
    what.add_argument("--fit", type=Path, metavar="F.csv", help="print the costs that fit these times")
    top.add_argument("--seed", type=int, default=0, help="of the fit (default: %(default)s)")
    top.add_argument("--draws", type=int, default=3000, help="of the fit (default: %(default)s)")
    args = top.parse_args(argv)
    return command(top.prog, lambda: measure(args.csv) if args.csv else fit(args))


def measure(csv: Path) -> int:
    if not torch.cuda.is_available():
        print("there is no CUDA device", file=sys.stderr)
        return 2
    calls: dict[tuple[int, ...], str] = {
        (n, c.channels, c.skip, c.size**2, c.groups, int(c.film), int(c.pre_bias), int(c.activation == "silu")): name
        for name, c in CALLS.items()
        for n in BATCHES
    }
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/launch_plans"
        source = Path(__file__).with_suffix(".cu")
        include = ["-I", str(ROOT / "csrc" / "cuda"), "-I", str(ROOT / "csrc")]
        argv = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{capability}", *include, "-o", program, str(source)]
        subprocess.run(argv, check=True)
        given = "\n".join(",".join(map(str, call)) for call in calls)
        printed = subprocess.run([program], input=given, stdout=subprocess.PIPE, text=True, check=True).stdout
    facts = {
        key: value for key, value in environment("cuda").items() if key in ("gpu_name", "torch", "triton", "driver")
    }
    rows: list[Row] = [dict(row) for row in (read(csv) if csv.exists() else []) if row["op"] != OP]
    name, batch = "", 0
    for line in printed.splitlines():
        numbers = line.strip().split(",")
        if not line.startswith(" "):
            call = tuple(map(int, numbers))
            name, batch = calls[call], call[0]
            continue
        launches, run, parts, us, _ = numbers
        words = "one launch" if launches == "1" else "two launches"
        plan = f"{words}, rows of {run} bytes, {parts} parts"
        rows.append({"op": OP, "dtype": "bfloat16", "batch": batch, "call": name, "plan": plan, "us": us, **facts})
    write(csv, rows)
    return 0


def times(rows: Sequence[Text]) -> dict[tuple[str, int], list[tuple[Plan, float]]]:
    """The plans of each call and batch with their microseconds."""
    found: dict[tuple[str, int], list[tuple[Plan, float]]] = defaultdict(list)
    for row in rows:
        if row["op"] == OP:
            n = int(row["batch"])
            found[row["call"], n].append((plan_of(CALLS[row["call"]], n, row["plan"]), float(row["us"])))
    return found


def plan_of(call: shapes.GroupNorm, n: int, words: str) -> Plan:
    """The plan that a file names, as group_norm.h has it."""
    matched = re.fullmatch(r"(one|two) .* of (\d+) bytes, (\d+) parts", words)
    assert matched is not None, words
    fused, run, parts = matched[1] == "one", int(matched[2]), int(matched[3])
    channels, positions = call.channels + call.skip, call.size**2
    per_group = channels // call.groups
    wide = call.channels % VECTOR == call.skip % VECTOR == 0 and math.lcm(per_group, VECTOR) <= MOST_VECTORS * VECTOR
    vector = VECTOR if wide else 1
    columns = min(math.lcm(per_group, max(run // ELEMENT, vector)), channels)
    groups, vectors, rows = columns // per_group, columns // vector, -(-positions // parts)
    lanes = min(THREADS // vectors, rows)
    threads = max(LEAST_THREADS, -(-lanes * vectors // 32) * 32)
    entries = 1
    if per_group % vector:
        entries = 2 if per_group > vector else vector // per_group + 2 * bool(vector % per_group)
    slab = -(-rows * columns * ELEMENT // 16) * 16 if fused else 0
    shared = slab + 8 * entries * threads + -(-12 * columns // 16) * 16 + 16 * groups
    held = 2 if vector == 1 else 4 if fused else 3
    resident = min(held * THREADS // threads, 2048 // threads, (SHARED_MEMORY + 1024) // (shared + 1024))
    blocks = n * -(-call.groups // groups) * parts
    odd = columns * ELEMENT % 32 != 0
    return Plan(2 - fused, parts, blocks, max(1, resident), 1e-3 * rows * columns * ELEMENT, odd, rows / lanes)


def microseconds(plans: Array, costs: Array) -> Array:
    """As in group_norm.h; plans (P, 7) are rows of `Plan`."""
    block, kilobyte, cluster, row, clusters_held, two_blocks, two_kilobyte, two_part, odd_row = costs
    launches, parts, blocks, resident, kilobytes, odd, rows = plans.T
    clustered = (launches == 1) & (parts > 1)
    waves = blocks / MULTIPROCESSORS / (resident * np.where(clustered, clusters_held, 1))
    waves = np.where(waves <= 3, np.floor(waves - 1e-9) + 1, waves + 0.5)
    moved = np.maximum(np.minimum(blocks / MULTIPROCESSORS, resident), 1) * kilobytes * (1 + odd_row * odd)
    one = block + kilobyte * moved + row * rows + cluster * clustered
    two = two_blocks + two_kilobyte * moved + two_part * parts
    found: Array = waves * np.where(launches == 1, one, two)
    return found


def losses(plans: Array, us: Array, ends: Array, costs: Array) -> Array:
    """By call, the time of the plan that the costs choose over that of the best."""
    model = microseconds(plans, costs) * np.where((plans[:, 0] == 2) & (plans[:, 1] < 4), UNMEASURED, 1)
    parts = np.split(np.arange(len(us)), ends[:-1].astype(int))
    return np.array([us[part][model[part].argmin()] / us[part].min() for part in parts])


def costs_of_header() -> list[float]:
    matched = re.search(r"constexpr Costs COSTS = \{(.*?)\};", HEADER.read_text("utf-8"), re.DOTALL)
    assert matched is not None
    return [float(number) for number in matched[1].split(",")]


def arrays(rows: Sequence[Text]) -> tuple[Array, Array, Array]:
    """Plans (P, 7), their times (P,), and where the plans of each call end."""
    measured = list(times(rows).values())
    plans = np.array([plan for each in measured for plan, _ in each], float)
    us = np.array([time for each in measured for _, time in each])
    return plans, us, np.cumsum([len(each) for each in measured]).astype(float)


def fit(args: argparse.Namespace) -> int:
    plans, us, ends = arrays(read(args.fit))
    counts = np.diff(ends, prepend=0).astype(int)
    best = np.repeat([part.min() for part in np.split(us, ends[:-1].astype(int))], counts)
    near = us < 1.6 * best

    def badness(costs: Array) -> float:
        found = losses(plans, us, ends, costs)
        error = np.abs(np.log(microseconds(plans, costs) / us))[near].mean()
        beyond = np.maximum(found - 1.15, 0).mean()
        return float(found.mean() - 1 + 0.45 * beyond + 0.05 * (found.max() - 1) + 0.08 * error)

    generator = np.random.default_rng(args.seed)
    costs = np.array(costs_of_header())
    least = badness(costs)
    for draw in range(args.draws):
        spread = 0.35 if draw < args.draws / 4 else 0.15 if draw < args.draws * 2 / 3 else 0.05
        changed = costs * np.exp(generator.normal(0, spread, len(costs)) * (generator.random(len(costs)) < 0.35))
        if (bad := badness(changed)) < least:
            costs, least = changed, bad
    loss = losses(plans, us, ends, costs)
    print(f"{len(us)} plans of {len(ends)} calls: {loss.mean():.3f} of the best, at most {loss.max():.2f}")
    print(f"constexpr Costs COSTS = {{{', '.join(f'{cost:.4g}' for cost in costs)}}};")
    return 0


if __name__ == "__main__":
    sys.exit(main())
