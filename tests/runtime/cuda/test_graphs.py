from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch

from coalescer_fast.models.unet import Conditioning
from coalescer_fast.runtime.cuda import graphs
from coalescer_fast.runtime.cuda.graphs import CudaGraphCapture, Graphs

PLENTY = 10**9


def conditioning(value: float) -> Conditioning:
    return Conditioning(
        [(torch.full((1, 2), value, dtype=torch.float32), torch.zeros(1, 2))],
        None,
        [],
        torch.ones(1, 3, dtype=torch.bool),
    )


def scaled(x: torch.Tensor, conditioning: Conditioning, nothing: None, scale: float | torch.Tensor) -> torch.Tensor:
    assert nothing is None
    return x * conditioning.film[0][0][0, 0] * scale


def given(x: float, factor: float, scale: float, size: int = 2):
    return torch.full((1, 3, size, size), x, dtype=torch.float32), conditioning(factor), None, scale


def test_captured_once_and_replayed_on_what_is_given(capture):
    held = Graphs(capture, 4, PLENTY)
    for x, factor, scale in ((1.0, 2.0, 3.0), (2.0, 2.0, 3.0), (2.0, 5.0, 3.0), (2.0, 5.0, 0.5)):
        assert (held.run("key", given(x, factor, scale), scaled) == x * factor * scale).all()
    assert held.captures == 1
    assert capture.replays == 4


def test_a_result_is_the_callers_own(capture):
    held = Graphs(capture, 4, PLENTY)
    first = held.run("key", given(1, 1, 1.0), scaled)
    second = held.run("key", given(2, 1, 1.0), scaled)
    second += 1
    assert (first == 1).all()
    assert (held.run("key", given(3, 1, 1.0), scaled) == 3).all()
    assert (second == 3).all()
    assert first.is_contiguous()


def test_a_tensor_is_copied_always_and_conditioning_when_it_is_another(capture):
    held = Graphs(capture, 4, PLENTY)
    x, factor = torch.ones(1, 3, 2, 2), conditioning(2)
    held.run("key", (x, factor, None, 1.0), scaled)
    x += 1
    factor.film[0][0].fill_(7)  # which nobody does
    assert (held.run("key", (x, factor, None, 1.0), scaled) == 4).all()
    assert (held.run("key", (x, conditioning(7), None, 1.0), scaled) == 14).all()


def test_in_and_out_of_inference_mode(capture):
    held = Graphs(capture, 4, PLENTY)
    with torch.inference_mode():
        inside = held.run("key", given(1, 2, 1.0), scaled)
    with torch.no_grad():
        assert torch.equal(held.run("key", given(1, 2, 1.0), scaled), inside)
    with torch.inference_mode():
        assert (held.run("key", given(3, 2, 1.0), scaled) == 6).all()
    assert held.captures == 1


def test_the_least_recently_used_goes(capture):
    held = Graphs(capture, 2, PLENTY)
    for key in "abbacaca":
        held.run(key, given(1, 1, 1.0), scaled)
    assert [key for key, _ in held.sizes()] == ["c", "a"]
    assert held.captures == 3
    assert capture.waits == 1  # nothing may run on memory that goes
    held.run("b", given(1, 1, 1.0), scaled)
    assert held.captures == 4
    one = Graphs(capture, 1, PLENTY)
    for key in "aab":
        one.run(key, given(1, 1, 1.0), scaled)
    assert one.captures == 2
    assert capture.clears == 1  # a pool without a graph is no more


def test_where_another_does_not_fit_all_make_room(capture):
    size = 3 * 8 * 8 * 4
    held = Graphs(capture, 10, 5 * size)
    for key in "abab":
        held.run(key, given(1, 1, 1.0, 8), scaled)
    assert held.bytes() >= 4 * size  # inputs and outputs
    assert capture.clears == 0
    assert (held.run("c", given(2, 1, 1.0, 8), scaled) == 2).all()
    assert [key for key, _ in held.sizes()] == ["c"]
    assert capture.clears == 1
    assert 2 * size <= held.bytes() < 3 * size
    held.run("large", given(1, 1, 1.0, 100), scaled)
    assert [key for key, _ in held.sizes()] == ["large"]  # it is held though it is too large
    captures = held.captures
    held.run("large", given(1, 1, 1.0, 100), scaled)
    assert held.captures == captures


def test_sizes_are_what_each_graph_added(capture):
    held = Graphs(capture, 10, PLENTY)
    held.run("a", given(1, 1, 1.0, 8), scaled)
    held.run("b", given(1, 1, 1.0, 16), scaled)
    small, large = (size for _, size in held.sizes())
    assert 2 * 3 * 8 * 8 * 4 < small < 2 * 3 * 16 * 16 * 4 < large
    assert small + large == held.bytes()


def test_without_bytes_there_are_no_graphs(capture):
    held = Graphs(capture, 10, 0)
    assert (held.run("a", given(2, 3, 1.5), scaled) == 9).all()
    assert held.captures == 0
    assert held.bytes() == 0


def test_what_is_dropped_is_freed(capture):
    held = Graphs(capture, 1, PLENTY)
    outputs = []

    def noted(*given):
        result = scaled(*given)
        outputs.append(weakref.ref(given[0]))
        return result

    held.run("a", given(1, 1, 1.0), noted)
    held.run("b", given(1, 1, 1.0), noted)
    held.clear()
    gc.collect()
    assert all(output() is None for output in outputs)


def test_a_capture_that_fails_leaves_nothing(capture):
    held = Graphs(capture, 4, PLENTY)

    def broken(*given):
        raise RuntimeError("no kernel")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no kernel"):
            held.run("key", given(1, 1, 1.0), broken)
    assert capture.clears == 2
    assert (held.run("key", given(2, 1, 1.0), scaled) == 2).all()
    with pytest.raises(RuntimeError, match="no kernel"):
        held.run("other", given(1, 1, 1.0), broken)
    assert [key for key, _ in held.sizes()] == ["key"]
    assert capture.clears == 2


def test_threads(capture):
    held = Graphs(capture, 2, PLENTY)

    def one(i: int) -> bool:
        return bool((held.run(i % 3, given(i, 2, 1.0, 2 + i % 3), scaled) == 2 * i).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(300)))


class Log:
    """Every method call on it, by name."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def __getattr__(self, method: str):
        return lambda *args, **kwargs: self.log.append(
            f"{self.name}.{method}({', '.join(getattr(a, 'name', str(a)) for a in args)})"
        )


def test_order_of_streams_and_events(monkeypatch):
    """On torch.cuda as it is spelled; what it does needs a GPU."""
    log: list[str] = []
    current = [Log("home", log)]

    @contextmanager
    def stream(new):
        current.append(new)
        yield
        current.pop()

    class Capture:
        def __init__(self, graph, pool, stream, capture_error_mode):
            assert (pool, stream.name, capture_error_mode) == ("pool", "side", "thread_local")

        def __enter__(self):
            log.append("capture")

        def __exit__(self, *args):
            log.append("end")

    for name, value in {
        "Stream": lambda: Log("side", log),
        "Event": lambda: Log("done", log),
        "graph_pool_handle": lambda: "pool",
        "device": lambda device: nullcontext(),
        "current_stream": lambda: current[-1],
        "set_stream": lambda new: log.append(f"set {new.name}"),
        "stream": stream,
        "CUDAGraph": lambda: Log("graph", log),
        "graph": Capture,
        "memory_snapshot": lambda: [{"segment_pool_id": pool, "total_size": 5} for pool in ("pool", "other", "pool")],
        "empty_cache": lambda: log.append("empty_cache"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    capture = CudaGraphCapture(torch.device("cuda:0"))
    with capture.turn():
        replay, _ = capture.make(lambda: log.append(f"function on {current[-1].name}"))
        replay()
    assert log == [
        "home.wait_event(done)",
        "side.wait_stream(home)",
        "function on side",
        "function on side",
        "capture",
        "function on home",  # Capture does not change the stream here
        "end",
        "set home",
        "home.wait_stream(side)",
        "graph.replay()",
        "done.record(home)",
    ]
    assert capture.bytes() == 10
    capture.wait()
    capture.clear()
    assert log[-2:] == ["done.synchronize()", "empty_cache"]


@pytest.mark.gpu
def test_a_cuda_graph_and_its_pool():
    capture = CudaGraphCapture(torch.device("cuda", torch.cuda.current_device()))
    held = Graphs(capture, 2, PLENTY)

    def on(*items):
        x, factor, nothing, scale = items
        return x.cuda(), factor.map(torch.Tensor.cuda), nothing, scale

    for key, size in (("a", 512), ("b", 1024), ("a", 512), ("c", 256)):
        for x in (1.0, 2.0):
            assert (held.run(key, on(*given(x, 3, 0.5, size)), scaled) == x * 1.5).all()
    assert held.captures == 3
    assert capture.bytes() > 0
    held.clear()
    assert capture.bytes() == held.bytes() == 0
    assert (held.run("a", on(*given(1, 3, 0.5)), scaled) == 1.5).all()


def test_inputs_of_a_graph_are_counted():
    graph = graphs.Graph([torch.zeros(2, 3, 4, 4), conditioning(1), None], [], lambda: None, torch.zeros(1), 0)
    assert graphs.input_bytes(graph) == 2 * 3 * 16 * 4 + 2 * 2 * 4 + 3
