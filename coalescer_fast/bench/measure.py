"""Prepare engines one after the other, compare their results with the reference's, and time them in turn."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from . import timing
from .engines import Call, Engine, Subject
from .peers import OK, TimeIsOver, alarm, attempt

PREPARING = 0.6  # share of the time in which engines are prepared; the rest is for measuring
ROUNDS = (3, timing.ROUNDS[1])  # at least and at most


@dataclass
class Measured:
    """What is known of an engine.

    Attributes:
        name: of the engine.
        dtype: of its networks.
        status: "ok", or why it has no time.
        prepare_s: seconds to its first result.
        figures: how far its results are from the reference's.
        samples: of its time; empty without one.
    """

    name: str
    dtype: str
    status: str = OK
    prepare_s: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    samples: list[timing.Measurement] = field(default_factory=list)

    @property
    def milliseconds(self) -> tuple[float, float, float] | None:
        """Of a call: median, 20 % and 80 % quantile."""
        if not self.samples:
            return None
        median, low, high = timing.quantiles(self.samples)
        return 1e3 * median, 1e3 * low, 1e3 * high


def measure(subject: Subject, seconds: float, progress: bool = False) -> list[Measured]:
    """Measure all engines of a subject, the reference first.

    Args:
        subject: what is measured.
        seconds: for all of it. An engine that is not ready in time is left out. A call that is itself long makes it
            longer: each is timed `ROUNDS` times.
        progress: whether to show a bar.
    """
    from tqdm import tqdm

    start = time.monotonic()
    end, rows, runs = start + PREPARING * seconds, [], dict[str, Call]()
    expected: list[Tensor] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(subject.engines, disable=None if progress else True, leave=False) as bar,
    ):
        for engine in bar:
            bar.set_description(f"{engine.name} {engine.dtype}")
            row = Measured(engine.name, engine.dtype)
            rows.append(row)
            if not expected:  # the reference: what it raises is the user's to know
                calls = list(engine.prepare(Path(folder)))
                expected, row.prepare_s = timed(calls)
                runs[key(row)] = calls[0]
                continue
            call = tried(subject, engine, row, expected, Path(folder), end - time.monotonic())
            if call is not None:
                runs[key(row)] = call
        bar.set_description("timing all in turn")
        timer = timing.CpuTimer()
        samples = {name: timing.rested(timer.warm(call)) for name, call in runs.items()}
        left = max(0.1 * seconds, start + seconds - time.monotonic())
        taken = timing.interleave(samples, left, rounds=ROUNDS, patience=1)
    for row in rows:
        row.samples = taken.get(key(row), [])
    return rows


def key(row: Measured) -> str:
    return f"{row.name} {row.dtype}"


def timed(calls: Sequence[Call]) -> tuple[list[Tensor], float]:
    """The results of calls, and the seconds of the first of them."""
    start = time.monotonic()
    results = [calls[0]()]
    seconds = time.monotonic() - start
    return results + [call() for call in calls[1:]], seconds


def tried(
    subject: Subject, engine: Engine, row: Measured, expected: Sequence[Tensor], folder: Path, left: float
) -> Call | None:
    """The call to measure of an engine that is ready in time and agrees with the reference; what is found is noted."""
    if left <= 0:
        row.status = "left out: the time was over, give more --seconds"
        return None

    def work() -> tuple[Call, list[Tensor]]:
        start = time.monotonic()
        calls = list(engine.prepare(folder))
        first = calls[0]()
        row.prepare_s = time.monotonic() - start
        return calls[0], [first, *(call() for call in calls[1:])]

    try:
        with alarm(left):
            done, row.status = attempt(work)
    except TimeIsOver:
        done, row.status = None, f"left out: it was not ready after {left:.0f} s, give more --seconds"
    if done is None:
        return None
    call, results = done
    agreement = subject.compare(results, expected, engine.dtype)
    row.figures = agreement.figures
    if agreement.wrong:
        row.status = f"FAIL: {agreement.wrong}"
        return None
    return call
