"""Items that arrive together run as one batch, in one thread."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


class QueueFull(Exception):
    """There is no place for more items.

    Attributes:
        seconds: after which it is worth another try, a whole number.
    """

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full: try again in {seconds} s")
        self.seconds = seconds


@dataclass
class Entry(Generic[T, R]):
    """An item that waits.

    Attributes:
        item: what `Batcher.submit` was given.
        future: of its result; once cancelled, the item has left the queue.
        arrived: on the clock of time.monotonic.
    """

    item: T
    future: Future[R] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher(Generic[T, R]):
    """Runs items in batches, those that came first in the first one.

    A batch begins as soon as the largest size has arrived or its first item has waited ``delay`` seconds, and takes the
    largest of ``sizes`` that there are items for; the rest follows at once. Sizes are few, for what runs them prepares
    each once. Where a batch fails, its items run alone, so that only the guilty one does.

    Args:
        run: called with the items of a batch, which have the same key; returns their results in order.
        key: of an item.
        sizes: of batches; 1 is among them.
        delay: in seconds.
        capacity: most items that wait.
    """

    def __init__(
        self,
        run: Callable[[list[T]], list[R]],
        key: Callable[[T], Hashable],
        sizes: Sequence[int],
        delay: float,
        capacity: int,
    ):
        self.run, self.key, self.sizes, self.delay, self.capacity = run, key, sorted(sizes), delay, capacity
        self._entries: list[Entry[T, R]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._seconds_an_item = 0.0  # in the last batch
        self._thread = threading.Thread(target=self._work, name="coalescer-fast drawing", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Run what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """How many items wait."""
        with self._changed:
            return len(self._waiting())

    def submit(self, items: Sequence[T]) -> list[Future[R]]:
        """Add items to the queue, all or none.

        Returns:
            A future each; cancelling it gives the place free, unless the item runs already.

        Raises:
            QueueFull: if they do not fit.
            RuntimeError: once it is closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            waiting = self._waiting()
            if len(waiting) + len(items) > self.capacity:
                raise QueueFull(max(1, math.ceil(len(waiting) * self._seconds_an_item)))
            added: list[Entry[T, R]] = [Entry(item) for item in items]
            waiting += added
            self._changed.notify_all()
        return [entry.future for entry in added]

    def _waiting(self) -> list[Entry[T, R]]:
        """The queue, without those whose client has gone."""
        self._entries = [entry for entry in self._entries if not entry.future.cancelled()]
        return self._entries

    def _work(self) -> None:
        while batch := self._next_batch():
            started = time.monotonic()
            self._run(batch)
            seconds = (time.monotonic() - started) / len(batch)
            self._seconds_an_item = (
                seconds if not self._seconds_an_item else 0.8 * self._seconds_an_item + 0.2 * seconds
            )

    def _next_batch(self) -> list[Entry[T, R]]:
        """Wait for a batch. Returns [] once it is closed and nothing is left."""
        with self._changed:
            while True:
                waiting = self._waiting()
                if not waiting:
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                first = self.key(waiting[0].item)
                alike = [entry for entry in waiting if self.key(entry.item) == first]
                left = waiting[0].arrived + self.delay - time.monotonic()
                if len(alike) < self.sizes[-1] and left > 0 and not self._closed:
                    self._changed.wait(left)
                    continue
                size = max(size for size in self.sizes if size <= len(alike))
                batch = [entry for entry in alike[:size] if entry.future.set_running_or_notify_cancel()]
                self._entries = [entry for entry in waiting if not entry.future.running()]
                if batch:
                    return batch

    def _run(self, batch: list[Entry[T, R]]) -> None:
        try:
            results = self.run([entry.item for entry in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            logger.info("a batch of %d has failed, and runs one by one: %s", len(batch), error)
            for entry in batch:
                self._run([entry])
            return
        for entry, result in zip(batch, results, strict=True):
            entry.future.set_result(result)
