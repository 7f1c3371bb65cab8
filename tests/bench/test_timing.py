from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import benchmarks
from coalescer_fast.bench import timing


class FakeGpu:
    """What CudaTimer uses of torch.cuda, with a clock of microseconds: what was queued in order, and for how long."""

    START, KERNEL, READ = 4.0, 2.0, 60.0  # of a graph, of a call, of the evictor

    def __init__(self):
        self.now, self.log, self.capturing, self.current = 0.0, [], None, "default"
        self.stream_made = 0

    def run(self, what: str, us: float) -> None:
        self.log.append(what)
        self.now += us

    def call(self) -> None:
        if self.capturing is None:
            self.run(f"call on {self.current}", self.KERNEL)
        else:
            self.capturing.calls += 1

    def modules(self):
        gpu = self

        class Stream:
            def wait_stream(self, other):
                gpu.log.append("wait")

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                gpu.log.append("event")
                self.at = gpu.now

            def synchronize(self):
                gpu.log.append("synchronize")

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        class CUDAGraph:
            calls = 0

            def replay(self):
                gpu.run(f"graph of {self.calls}", gpu.START + gpu.KERNEL * self.calls)

        class capture:
            def __init__(self, graph, stream):
                self.graph, self.stream = graph, stream

            def __enter__(self):
                gpu.capturing, gpu.current = self.graph, self.stream

            def __exit__(self, kind, *rest):
                gpu.capturing = None  # like torch's, one that fails leaves its stream as the current one
                if kind is None:
                    gpu.current = "default"

        class stream:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                self.before, gpu.current = gpu.current, "side"

            def __exit__(self, *rest):
                gpu.current = self.before

        home = Stream()

        def set_stream(stream):
            assert stream is home
            gpu.current = "default"

        class Properties:
            L2_cache_size = 1000

        names = {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": capture,
            "stream": stream,
            "set_stream": set_stream,
        }
        names |= {
            "current_stream": lambda: home,
            "current_device": lambda: 0,
            "get_device_properties": lambda n: Properties,
        }
        return names


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    fake = FakeGpu()
    for name, value in fake.modules().items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "ones", lambda n, dtype, device: Evictor(fake, n, dtype, device))
    return fake


class Evictor:
    def __init__(self, gpu, n, dtype, device):
        assert n * 4 >= 2 * 1000
        assert (dtype, device) == (torch.float32, "cuda")
        self.sum = partial(gpu.run, "evict", gpu.READ)
        self.numel = lambda: n


def test_warm_calls_on_a_gpu_fill_a_graph(gpu):
    timer = timing.CudaTimer()
    sample = timer.warm(gpu.call)
    assert gpu.log[:5] == ["wait", *["call on side"] * 3, "wait"]
    gpu.log.clear()
    seconds = sample().seconds
    graph = gpu.log[0]
    assert gpu.log == [
        graph,
        "event",
        graph,
        "event",
        "synchronize",
    ]  # busy with the first replay while the second is queued
    calls = int(graph.split()[-1])
    assert calls * gpu.KERNEL >= 1e6 * timing.SAMPLE_SECONDS / 1.5
    assert seconds == pytest.approx(1e-6 * (gpu.KERNEL + gpu.START / calls))
    gpu.KERNEL = 1e4
    gpu.log.clear()
    timer.warm(gpu.call)()
    assert set(gpu.log) == {"wait", "call on side", "graph of 1", "event", "synchronize"}


def test_cold_calls_on_a_gpu_follow_the_eviction(gpu):
    timer = timing.CudaTimer()
    sample = timer.cold(gpu.call)
    gpu.log.clear()
    assert sample().seconds == pytest.approx(1e-6 * (gpu.START + gpu.KERNEL))
    assert gpu.log == ["evict", "event", "graph of 1", "event", "synchronize"]


def test_a_capture_that_fails_leaves_the_stream_as_it_was(gpu):
    def function():
        if gpu.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        timing.CudaTimer().warm(function)
    assert gpu.current == "default"


def test_measurements_are_taken_in_turn(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", (2, 3))
    taken = []

    def sample(name: str) -> timing.Measurement:
        taken.append(name)
        return timing.Measurement(float(len(taken)))

    times = timing.interleave({name: partial(sample, name) for name in "abc"}, 0.0)
    assert "".join(taken) == "abcbca"
    assert [m.seconds for m in times["a"]] == [1.0, 6.0]
    six = [timing.Measurement(float(n)) for n in range(1, 7)]
    assert timing.quantiles(six) == pytest.approx((3.5, 2.0, 5.0))


def test_disturbed_measurements_are_set_aside_if_there_are_others(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", (2, 6))
    seen = iter(range(100))
    often = timing.interleave({"a": lambda: timing.Measurement(1.0, next(seen) % 3 == 2)}, 0.01)
    assert [m.quiet for m in often["a"]] == [True, True]
    always = timing.interleave({"a": lambda: timing.Measurement(1.0, False)}, 0.01)
    assert len(always["a"]) == 6


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux with scheduler statistics")
def test_waiting_for_a_cpu_is_noticed():
    """Two processes bound to one CPU wait for each other."""
    cpus = os.sched_getaffinity(0)
    code = f"import os; os.sched_setaffinity(0, [{min(cpus)}])\nprint(flush=True)\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        os.sched_setaffinity(0, {min(cpus)})
        assert not timing.CpuTimer().measure(lambda: sum(range(3_000_000)), 1).quiet
    finally:
        os.sched_setaffinity(0, cpus)
        other.kill()
        other.wait()


def test_a_sample_is_long_enough_to_time():
    assert timing.calls_for(3e-6) == 67
    assert timing.calls_for(1.0) == 1
    assert timing.calls_for(0.0) == 1000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    code = """
import resource, sys, torch
from coalescer_fast.bench import timing
assert timing.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**21)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum(faults() < 100 for _ in range(40)) >= 20)  # 2048 pages, were they new
"""
    folder = str(Path(benchmarks.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}){code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "True"
