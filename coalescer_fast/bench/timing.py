"""Seconds per call of several functions, measured in turn: on the CPU by the clock, on a GPU by events.

A timer turns a function into another one that measures it once: ``warm`` on caches that the function itself has just
filled, ``cold`` on caches filled with something else. `interleave` takes such measurements in turn, so that whatever
disturbs the machine disturbs all alike, and sets aside those during which a thread of this process had to wait for a
CPU: with OpenMP, one thread that waits holds up all others, for milliseconds.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from . import Row

Function = Callable[[], object]

SAMPLE_SECONDS = 200e-6  # shortest time to measure: the clock and the loop take less than a hundredth of it
LONG_SECONDS = 5e-3  # a call that takes this long does not depend on how the caches were filled before it
ROUNDS = (5, 200)  # at least and at most
PATIENCE = 4  # budgets to spend where most measurements are disturbed
REST = 5e-3  # seconds until the idle threads of whatever ran before have stopped spinning
DISTURBED = 0.02  # share of a measurement that was spent waiting for a CPU
DEFAULT_CACHE = 32 * 2**20  # bytes
EVICTIONS = 4  # sizes of a GPU's cache to read, since it does not evict the oldest lines first
TIMES = ("y_value_50", "y_value_20", "y_value_80")  # columns of a time: median, 20 % and 80 % quantile


@dataclass
class Measurement:
    """A measured time.

    Attributes:
        seconds: per call.
        quiet: whether no other process had the CPUs meanwhile, as far as the system says.
    """

    seconds: float
    quiet: bool = True


Sample = Callable[[], Measurement]


class CpuTimer:
    """Measures by the clock.

    Args:
        synchronize: waits for a GPU, where calls are launched on one; then launches are in the time.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None):
        self.synchronize = synchronize
        self.cache_bytes = last_level_cache()
        self.evictor = torch.empty(0, dtype=torch.float32)

    def measure(self, function: Function, calls: int, fill: bool = False) -> Measurement:
        """The time of a call, from so many in a row; with ``fill``, one more before the clock starts."""
        waited = seconds_waited()
        if fill:
            function()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        self.synchronize()
        seconds = time.perf_counter() - start
        return Measurement(seconds / calls, seconds_waited() - waited <= DISTURBED * seconds)

    def warm(self, function: Function) -> Sample:
        once = math.inf
        for n in range(4):  # the shortest of them: a disturbed one would make a short call look long
            once = min(once, self.measure(function, 1).seconds)
            if n and once > LONG_SECONDS:
                break
        calls, fill = calls_for(once), once < LONG_SECONDS
        return lambda: self.measure(function, calls, fill)

    def cold(self, function: Function) -> Sample:
        if not self.evictor.numel():
            self.evictor = torch.ones(2 * self.cache_bytes // 4 + 2**20, dtype=torch.float32)

        def sample() -> Measurement:
            self.evictor.sum()  # reads only: dirty lines would be written back during the function's time
            return self.measure(function, 1)

        return sample


class CudaTimer:
    """Measures by CUDA events around the replay of a CUDA graph, so that launches from the host are not in the time.

    Warm, many calls are in one graph, and a call's time is that of its kernels and of the gaps between them. Cold, it
    is one call, whose time includes the start of the graph and is no finer than the events, half a microsecond. Nothing
    is subtracted; a kernel that has nothing to do, measured in the same way, shows how much that is. The GPU is kept
    busy until the host has queued event, graph and event, or the time would include the queueing.
    """

    def __init__(self) -> None:
        self.cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.evictor = torch.empty(0, dtype=torch.float32)
        self.stream = torch.cuda.Stream()
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def capture(self, function: Function, calls: int) -> torch.cuda.CUDAGraph:
        """A graph of so many calls. Raises what the function raises, and RuntimeError if it cannot be captured."""
        home = torch.cuda.current_stream()
        self.stream.wait_stream(home)
        with torch.cuda.stream(self.stream):  # what is done only once, such as workspaces, stays out of the graph
            for _ in range(3):
                function()
        home.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for _ in range(calls):
                    function()
        finally:
            torch.cuda.set_stream(home)  # a capture that fails leaves its own stream current
        return graph

    def measure(self, before: Function, graph: torch.cuda.CUDAGraph, calls: int) -> Measurement:
        before()
        self.start.record()
        graph.replay()
        self.end.record()
        self.end.synchronize()
        return Measurement(self.start.elapsed_time(self.end) / 1e3 / calls)

    def warm(self, function: Function) -> Sample:
        calls, wanted = 0, 1
        while wanted > 1.5 * calls:  # most of the time of a short graph is its start, which makes a call look long
            calls = wanted
            graph = self.capture(function, calls)
            wanted = calls_for(self.measure(graph.replay, graph, calls).seconds)
        return lambda: self.measure(graph.replay, graph, calls)

    def cold(self, function: Function) -> Sample:
        if not self.evictor.numel():
            self.evictor = torch.ones(EVICTIONS * self.cache_bytes // 4, dtype=torch.float32, device="cuda")
        graph = self.capture(function, 1)
        graph.replay()  # the first replay uploads the graph to the device
        # reads only: dirty lines would be written back during the function's time
        return lambda: self.measure(self.evictor.sum, graph, 1)


def calls_for(seconds: float) -> int:
    """How many calls of this time make a measurement."""
    return max(1, min(1000, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))


def interleave(
    samples: dict[str, Sample], budget: float, rounds: tuple[int, int] | None = None, patience: float | None = None
) -> dict[str, list[Measurement]]:
    """Take measurements in turn, each round beginning with another function.

    Args:
        samples: what takes a measurement of each function.
        budget: seconds to spend in all; more, up to ``patience`` times, while few measurements are quiet.
        rounds: how many measurements of each, at least and at most; `ROUNDS` if None.
        patience: `PATIENCE` if None.

    Returns:
        The quiet measurements of a function that has enough of them, else all of its measurements.
    """
    names, taken = list(samples), {name: list[Measurement]() for name in samples}
    least, most = rounds or ROUNDS
    longest = budget * (PATIENCE if patience is None else patience)
    start = time.perf_counter()
    for n in range(most):
        spent = time.perf_counter() - start
        enough = all(sum(m.quiet for m in mine) >= least for mine in taken.values())
        if n >= least and spent > (budget if enough else longest):
            break
        first = n % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(samples[name]())
    quiet = {name: [m for m in mine if m.quiet] for name, mine in taken.items()}
    return {name: quiet[name] if len(quiet[name]) >= least else mine for name, mine in taken.items()}


def rested(sample: Sample) -> Sample:
    """Wait before a measurement until the threads of what ran before, which spin for a while, are idle."""

    def measure() -> Measurement:
        time.sleep(REST)
        return sample()

    return measure


def seconds_waited() -> float:
    """Seconds for which threads of this process have waited for a CPU so far; 0 where the system does not say."""
    waited = 0
    try:
        for thread in os.scandir("/proc/self/task"):
            with open(f"{thread.path}/schedstat", "rb") as file:
                waited += int(file.read().split()[1])
    except OSError:  # not Linux, or a thread that has just ended
        pass
    return waited * 1e-9


def quantiles(taken: list[Measurement]) -> tuple[float, float, float]:
    """The 50, 20 and 80 % quantiles of the seconds."""
    median, low, high = (
        torch.tensor([m.seconds for m in taken], dtype=torch.float64)
        .quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
        .tolist()
    )
    return median, low, high


def columns(taken: list[Measurement], scale: float) -> Row:
    """The columns of a time in units of 1 / ``scale`` seconds, the number of samples, and whether all were quiet."""
    times = (seconds * scale for seconds in quantiles(taken))
    return {**dict(zip(TIMES, times)), "samples": len(taken), "quiet": int(all(m.quiet for m in taken))}


def last_level_cache() -> int:
    """Bytes of the first CPU's largest cache; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KM])", path.read_text("utf-8").strip()):
            sizes.append(int(match[1]) * {"K": 2**10, "M": 2**20}[match[2]])
    return max(sizes, default=DEFAULT_CACHE)


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory, as torch does on a GPU; returns whether it could be done.

    Otherwise every large result takes new pages from the system, whose page faults can cost ten times a copy.
    """
    if not sys.platform.startswith("linux"):
        return False
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


@contextmanager
def settings(threads: int | None, keep: bool) -> Iterator[None]:
    """Set the number of torch's threads inside, unless None; with ``keep``, freed memory is kept from here on."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    if keep:
        keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(before)
