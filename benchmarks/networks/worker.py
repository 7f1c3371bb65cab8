"""A process of the benchmark: it prepares one provider, says what that took, and measures when it is told to.

    python -m benchmarks.networks.worker TASK STARTED

TASK is a `Task` as JSON, STARTED the monotonic time at which the process was started. Answers are lines of JSON on
standard output, to which nothing else is written. Lines on standard input ask for more: "measure" for one measurement,
"avx512" for how often AVX-512 is found in use; at their end the process ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coalescer_fast.bench.peers import Missing

from . import providers
from .task import Task

Say = Callable[[dict[str, Any]], None]


def main(argv: list[str]) -> int:
    task, started = Task.from_json(argv[0]), float(argv[1])
    say = answers()
    Path("/proc/self/oom_score_adj").write_text("1000")  # what goes first where memory ends is this process
    try:
        if task.stage == "peak":
            say({"peak": providers.peak(task)})
        elif task.stage == "convert":
            conversion = providers.CONVERSIONS[task.name]
            providers.missing(conversion.imports)
            start = time.monotonic()
            conversion.run(task)
            say({"seconds": time.monotonic() - start, "peak_rss_mb": peak_rss_mb()})
        else:
            run(task, started, say)
    except Missing as reason:
        say({"missing": str(reason)})
    return 0


def answers() -> Say:
    """What writes an answer to standard output; what libraries print goes to standard error from here on."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    return say


def run(task: Task, started: float, say: Say) -> None:
    provider = providers.PROVIDERS[task.name]
    providers.missing(provider.imports)
    imported = time.monotonic()
    loaded = provider.load(task)
    begun = time.monotonic()
    call = provider.prepare(task, loaded)
    call()
    ready = time.monotonic()
    del loaded
    call()
    answer = {"prepare_s": ready - begun, "cold_s": ready - begun + imported - started, "peak_rss_mb": peak_rss_mb()}
    save(call(), task.result)
    say(answer)
    measure = None
    for line in sys.stdin:
        if line.strip() == "measure":
            from coalescer_fast.bench import timing

            timer = timing.CpuTimer()
            measure = measure or timer.warm(call)
            taken = measure()
            say({"seconds": taken.seconds, "quiet": taken.quiet})
        elif line.strip() == "avx512":
            from . import isa

            say({"avx512_percent": isa.avx512_percent(call)})


def peak_rss_mb() -> float:
    """The most memory that this process has held so far, in millions of bytes; NaN where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    except (OSError, StopIteration):
        return float("nan")


def save(result: Any, path: Path) -> None:
    import numpy as np

    array = result if isinstance(result, np.ndarray) else result.float().numpy()
    np.save(path, np.array(array, dtype=np.float32))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
