"""Seconds a call, of several functions side by side: on the CPU by the clock, on a GPU by events.

A timer makes of a function another one, which measures it once: ``warm`` on caches that the function itself has just filled, ``cold`` on
caches filled with something else. `interleave` takes such measurements in turn, so that whatever disturbs the machine disturbs all alike.
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

Function = Callable[[], object]
Sample = Callable[[], float]

SAMPLE_SECONDS = 200e-6  # shortest stretch to time: the clock and the loop are below a hundredth of it
LONG_SECONDS = 5e-3  # a call of this length has no use for caches filled beforehand
ROUNDS = (5, 200)  # at least and at most
DEFAULT_CACHE = 32 * 2**20


class CpuTimer:
    """By the clock, which ``synchronize`` makes wait for a GPU: then it is what calls cost on the host."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None):
        self.synchronize = synchronize
        self.cache_bytes = last_level_cache()
        self.evictor = torch.empty(0)

    def seconds(self, function: Function, calls: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        self.synchronize()
        return (time.perf_counter() - start) / calls

    def warm(self, function: Function) -> Sample:
        self.seconds(function, 1)
        once = self.seconds(function, 1)
        calls = calls_for(once)

        def sample() -> float:
            if once < LONG_SECONDS:
                function()
            return self.seconds(function, calls)

        return sample

    def cold(self, function: Function) -> Sample:
        if not self.evictor.numel():
            self.evictor = torch.ones(2 * self.cache_bytes // 4 + 2**20)

        def sample() -> float:
            self.evictor.sum()  # reads only: dirty lines would be written back at the function's expense
            return self.seconds(function, 1)

        return sample


class CudaTimer:
    """By CUDA events around the replay of a CUDA graph, so that launches from the host are not in the time. Not yet run on a GPU."""

    def __init__(self) -> None:
        self.cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.evictor = torch.empty(2 * self.cache_bytes, dtype=torch.int8, device="cuda")

    def capture(self, function: Function, calls: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is done once, such as workspaces, is not for the graph
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        return graph

    def seconds(self, graph: torch.cuda.CUDAGraph, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def warm(self, function: Function) -> Sample:
        graph = self.capture(function, 1)
        self.seconds(graph, 1)
        calls = calls_for(self.seconds(graph, 1))
        graph = self.capture(function, calls)

        def sample() -> float:
            graph.replay()
            return self.seconds(graph, calls)

        return sample

    def cold(self, function: Function) -> Sample:
        graph = self.capture(function, 1)

        def sample() -> float:
            self.evictor.zero_()
            return self.seconds(graph, 1)

        return sample


def calls_for(seconds: float) -> int:
    return max(1, min(1000, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))


def interleave(samples: dict[str, Sample], budget: float) -> dict[str, list[float]]:
    """Measurements in turn, each round beginning with another, until ``budget`` seconds have gone by."""
    names, times = list(samples), {name: list[float]() for name in samples}
    least, most = ROUNDS
    end = time.perf_counter() + budget
    for n in range(most):
        if n >= least and time.perf_counter() > end:
            break
        first = n % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(samples[name]())
    return times


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """The 50, 20 and 80 % quantiles."""
    median, low, high = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    return median, low, high


def last_level_cache() -> int:
    """Bytes of the first CPU's largest cache, 32 MiB where nothing says."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KM])", path.read_text("utf-8").strip()):
            sizes.append(int(match[1]) * {"K": 2**10, "M": 2**20}[match[2]])
    return max(sizes, default=DEFAULT_CACHE)


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, as torch does on a GPU: else every result above its threshold is new pages from the system, whose
    faults can cost ten times a copy, and depend on what was freed before. Returns whether it could be done."""
    if not sys.platform.startswith("linux"):
        return False
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))
