"""What was measured, as a table and as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from typing import Any

from .. import __version__, collect_env
from ..console import table
from ..ops import native_library
from . import environment as machine
from .engines import EAGER, OURS
from .measure import Measured
from .peers import OK

FORMAT = 1
LABELS = {EAGER: "plain PyTorch", "compile": "torch.compile"}
PACKAGES = ("diffusers", "numpy", "onnx", "onnxruntime", "openvino", "triton")


def environment() -> dict[str, Any]:
    """The machine, versions and variables; nothing that names a user or a folder."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    python = collect_env.guarded(collect_env.python)
    python.pop("executable", None)
    reason = native_library.unavailable()
    return {
        "coalescer_fast": __version__,
        **machine.environment(),
        "instruction_set": f"none: {reason}" if reason else native_library.isa(),
        "processor": collect_env.guarded(collect_env.cpu),
        "system": python,
        "packages": {name: found for name, found in machine.versions(*PACKAGES).items() if found},
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("OMP_", "KMP_"))},
        "load_before": load,
        "timestamp": machine.timestamp(),
        "machine": platform.machine(),
    }


def rows(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """What is known of each engine, for JSON; the first is the reference."""
    reference = _median(measured[0])
    found = []
    for one in measured:
        row: dict[str, Any] = {"engine": one.name, "dtype": one.dtype, "status": one.status}
        row |= {"prepare_s": one.prepare_s, **one.figures}
        if (times := one.milliseconds) is not None:
            row |= dict(zip(("median_ms", "low_ms", "high_ms"), times))
            row |= {"times_as_fast": reference / times[0], "percent_of_reference": 100 * times[0] / reference}
            row |= {"samples": len(one.samples), "quiet": all(sample.quiet for sample in one.samples)}
        found.append({name: _rounded(value) for name, value in row.items() if value is not None})
    return found


def _median(one: Measured) -> float:
    return math.nan if one.milliseconds is None else one.milliseconds[0]


def _rounded(value: Any) -> Any:
    """To six digits, and a number that JSON has not as text."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def to_json(facts: dict[str, Any], where: dict[str, Any], measured: Sequence[Measured], seconds: float) -> str:
    """The file of ``--json``."""
    found = {
        "format": FORMAT,
        "what": facts,
        "seconds": seconds,
        "environment": where,
        "reference": f"{EAGER}, float32, channels_last",
        "summary": summary(measured),
        "engines": rows(measured),
    }
    return json.dumps(found, indent=2) + "\n"


def text(title: str, where: dict[str, Any], measured: Sequence[Measured]) -> str:
    """A title, the machine, the table, and a sentence on what is gained."""
    lines = [["engine", "dtype", "ms", "20-80 %", "speed", "time, %", "agrees", "ready after, s"]]
    for one, row in zip(measured, rows(measured)):
        ready = "" if one.prepare_s is None else f"{one.prepare_s:.1f}"
        cells = [LABELS.get(one.name, one.name), one.dtype]
        if one.milliseconds is None:
            lines.append([*cells, "-", "", "", "", "", ready])
            continue
        mark = "" if row["quiet"] else "~"
        median, low, high = one.milliseconds
        times = (f"{figures(median)}{mark}", f"{figures(low)}-{figures(high)}")
        ratio = (f"{row['times_as_fast']:.2f}x", f"{row['percent_of_reference']:.0f}")
        lines.append([*cells, *times, *ratio, agreement(one), ready])
    noted = [f"{label(one)}: {one.status}" for one in measured if one.status != OK]
    if any(sample.quiet is False for one in measured for sample in one.samples):
        noted.append("~ other processes disturbed this time; percentages hold better than milliseconds")
    isa, count = where["instruction_set"], where["threads"]
    here = f"{where['cpu']}, {isa}, {count} thread{'s' * (count != 1)}, torch {where['torch']}"
    return "\n".join([title, here, "", table(lines, "<<>>>><>"), "", *noted, summary(measured)])


def figures(value: float) -> str:
    """Three digits."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value < 100 else f"{value:.0f}"


def label(one: Measured) -> str:
    return f"{LABELS.get(one.name, one.name)} {one.dtype}"


def agreement(one: Measured) -> str:
    """How far the results are from the reference's."""
    if "psnr_min_db" in one.figures:
        return f"{one.figures['psnr_min_db']:.0f} dB"
    return f"{one.figures['relative_error']:.1e}" if "relative_error" in one.figures else "reference"


def summary(measured: Sequence[Measured]) -> str:
    """A sentence: what accelerate gains over plain PyTorch in float32, and over the fastest of the other engines."""
    timed = [one for one in measured if one.samples]
    ours = min((one for one in timed if one.name == OURS), key=_median, default=None)
    if ours is None:
        return "coalescer_fast was not measured."
    others = [one for one in timed if one.name != OURS]
    said = f"{label(ours)} is {compared(_median(others[0]) / _median(ours))} plain PyTorch in float32"
    best = min(others, key=_median)
    if best is not others[0]:
        said += f", and {compared(_median(best) / _median(ours))} the fastest other, {label(best)}"
    return f"{said}."


def compared(ratio: float) -> str:
    return f"{ratio:.2f} times as fast as" if ratio >= 1 else f"slower, {1 / ratio:.2f} times the time of"


def status(measured: Sequence[Measured]) -> int:
    """The exit status: 1 if a result of `accelerate` is wrong."""
    return int(any(one.name == OURS and one.status.startswith("FAIL") for one in measured))
