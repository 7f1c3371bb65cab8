"""CUDA graphs on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from coalescer_fast.runtime.cuda.graphs import GraphCapture, Output, own


def tensors(output: Output) -> tuple[torch.Tensor, ...]:
    return (output,) if isinstance(output, torch.Tensor) else output


class CpuGraphCapture(GraphCapture):
    """Stands in for a CUDA device: a graph is its function, run again at every replay, into the same output.

    As in a memory pool of torch, memory that a graph once took is held until `clear`.
    """

    def __init__(self) -> None:
        self.taken = self.waits = self.clears = self.replays = 0
        self.alone = threading.Lock()

    def make(self, function: Callable[[], Output]) -> tuple[Callable[[], object], Output]:
        assert self.alone.locked()
        for _ in range(2):
            function()
        output = own(function())
        for each in tensors(output):
            self.taken += each.nbytes
            each.fill_(torch.nan)  # a capture computes nothing

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for mine, new in zip(tensors(output), tensors(function())):
                    mine.copy_(new)

        return replay, output

    @contextmanager
    def turn(self) -> Iterator[None]:
        assert self.alone.acquire(blocking=False), "two callers at once"
        try:
            yield
        finally:
            self.alone.release()

    def bytes(self) -> int:
        return self.taken

    def wait(self) -> None:
        self.waits += 1

    def clear(self) -> None:
        self.taken = 0
        self.clears += 1
