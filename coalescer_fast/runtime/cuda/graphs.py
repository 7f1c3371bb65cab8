"""CUDA graphs of functions of tensors: captured once, held with static inputs, and replayed."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from ...models.unet import Conditioning
from ..base import counted

# What a function is given. Tensors are copied always, and conditioning, which nobody writes to, when it is another.
Input = Tensor | Conditioning | float | None
Output = Tensor | tuple[Tensor, ...]
T = TypeVar("T", bound=Output)

_capturing = threading.Lock()  # torch captures one graph at a time in a process


class GraphCapture(ABC):
    """Captures graphs on a device and owns their memory."""

    @abstractmethod
    def make(self, function: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """Capture a function.

        Returns:
            What replays its work, and the output that every replay writes.
        """

    @abstractmethod
    def turn(self) -> AbstractContextManager[None]:
        """Inside, the caller's stream has the graphs to itself."""

    @abstractmethod
    def bytes(self) -> int:
        """Memory that the captured graphs hold, their inputs aside."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until what was replayed last is done."""

    @abstractmethod
    def clear(self) -> None:
        """Give the memory back; no graph is left."""


@dataclass
class Graph:
    """A captured graph with its static inputs.

    Attributes:
        inputs: copies that stay where they are, which the graph reads.
        given: what was copied there last, None for a tensor.
        replay: does the work again.
        output: what each replay writes.
        bytes: what the graph added to those that were held.
    """

    inputs: list[Tensor | Conditioning | None]
    given: list[Input]
    replay: Callable[[], object]
    output: Output
    bytes: int

    def fill(self, given: Sequence[Input]) -> None:
        """Copy what is given into the static inputs."""
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for mine, last, new in zip(self.inputs, self.given, given):
            if isinstance(mine, Conditioning) and isinstance(new, Conditioning) and new is not last:
                targets += mine.tensors()
                sources += new.tensors()
            elif isinstance(mine, Tensor) and isinstance(new, Tensor):
                targets.append(mine)
                sources.append(new)
            elif isinstance(mine, Tensor) and isinstance(new, float) and new != last:
                mine.fill_(new)
        torch._foreach_copy_(targets, sources)
        self.given = [None if isinstance(new, Tensor) else new for new in given]


class Graphs:
    """Runs functions of tensors as graphs, captured once for each key. Any number of threads may `run` them.

    Args:
        capture: makes the graphs.
        most: graphs to hold; the least recently used goes.
        most_bytes: memory to hold, in all. Where another graph does not fit, all others make room for it. One is held
            whatever it takes; 0 is no graphs.

    Attributes:
        held: the graphs by key, the least recently used first.
        captures: how many were captured.
    """

    def __init__(self, capture: GraphCapture, most: int, most_bytes: int):
        self.capture, self.most, self.most_bytes = capture, most, most_bytes
        self.held: OrderedDict[Hashable, Graph] = OrderedDict()
        self.captures = 0
        self._lock = threading.RLock()

    def run(self, key: Hashable, given: Sequence[Input], function: Callable[..., T]) -> T:
        """Compute ``function(*given)``.

        Args:
            key: equal for equal functions and equal shapes of what they are given.
            given: the arguments.
            function: returns a tensor or a tuple of tensors.

        Returns:
            The result, in memory that no later call writes to.
        """
        if not self.most_bytes:
            return function(*given)
        with self._lock, self.capture.turn():
            graph = self.held.get(key)
            if graph is None:
                graph = self._add(key, given, function)
            else:
                graph.fill(given)
            self.held.move_to_end(key)
            graph.replay()
            return cast(T, own(graph.output))

    def _add(self, key: Hashable, given: Sequence[Input], function: Callable[..., Output]) -> Graph:
        if len(self.held) >= self.most:
            self.capture.wait()
            self.held.popitem(last=False)
            if not self.held:
                self.capture.clear()
        graph = self.held[key] = self._captured(given, function)
        if self.bytes() > self.most_bytes and len(self.held) > 1:
            del graph  # torch gives memory that graphs share back when none of them is left
            self.clear()
            graph = self.held[key] = self._captured(given, function)
        return graph

    def _captured(self, given: Sequence[Input], function: Callable[..., Output]) -> Graph:
        before = self.capture.bytes()
        # ordinary tensors, which may be written to in and out of inference mode
        with torch.inference_mode(False), torch.no_grad():
            device = next(x.device for x in given if isinstance(x, Tensor))
            inputs = [static(x, device) for x in given]
            try:
                with _capturing:
                    replay, output = self.capture.make(lambda: function(*inputs))
            except BaseException:
                if not self.held:
                    self.capture.clear()
                raise
        self.captures += 1
        graph = counted(Graph(inputs, [None if isinstance(x, Tensor) else x for x in given], replay, output, 0))
        graph.bytes = input_bytes(graph) + self.capture.bytes() - before
        return graph

    def bytes(self) -> int:
        """Memory that all graphs hold."""
        with self._lock:
            return self.capture.bytes() + sum(map(input_bytes, self.held.values()))

    def sizes(self) -> list[tuple[Hashable, int]]:
        """Each key, and the memory that its graph added."""
        with self._lock:
            return [(key, graph.bytes) for key, graph in self.held.items()]

    def clear(self) -> None:
        """Drop all graphs and give their memory back."""
        with self._lock:
            if self.held:
                self.capture.wait()
                self.held.clear()
                self.capture.clear()


def static(given: Input, device: torch.device) -> Tensor | Conditioning | None:
    """A copy that a graph can read; of a tensor (N, C, H, W) with channels innermost, as the networks take it."""
    if isinstance(given, Conditioning):
        return given.map(torch.clone)
    if isinstance(given, float):
        return torch.full((), given, dtype=torch.float64, device=device)
    if given is None:
        return None
    return given.clone(memory_format=torch.channels_last if given.ndim == 4 else torch.contiguous_format)


def own(output: Output) -> Output:
    """A contiguous copy for the caller."""
    if isinstance(output, Tensor):
        return output.clone(memory_format=torch.contiguous_format)
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in output)


def input_bytes(graph: Graph) -> int:
    """Memory of a graph's static inputs."""
    tensors = [t for x in graph.inputs if x is not None for t in (x.tensors() if isinstance(x, Conditioning) else [x])]
    return sum(t.nbytes for t in tensors)


class CudaGraphCapture(GraphCapture):
    """Captures CUDA graphs of one device.

    All are in one memory pool, so they are replayed one after the other, whatever the streams of their callers.
    """

    WARM_UPS = 2  # the first compiles, chooses and makes workspaces; the second has nothing of that left to do

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.done = torch.cuda.Event()
            self.pool = torch.cuda.graph_pool_handle()

    def make(self, function: Callable[[], T]) -> tuple[Callable[[], object], T]:
        home = torch.cuda.current_stream()
        self.stream.wait_stream(home)
        with torch.cuda.stream(self.stream):
            for _ in range(self.WARM_UPS):
                function()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: what other threads do meanwhile, such as allocating, is neither captured nor an error
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                output = function()
        finally:
            torch.cuda.set_stream(home)  # a capture that fails leaves its own stream as the current one
        home.wait_stream(self.stream)
        return graph.replay, output

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            try:
                yield
            finally:
                self.done.record(stream)

    def bytes(self) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(
            segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(self.pool)
        )

    def wait(self) -> None:
        self.done.synchronize()

    def clear(self) -> None:
        with torch.cuda.device(self.device):
            self.pool = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()
