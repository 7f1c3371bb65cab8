from __future__ import annotations

import threading
import time

import pytest

from coalescer_fast.serving.batching import Batcher, QueueFull


class Recorder:
    """Runs batches of numbers: their double. Negative ones fail; each batch waits for `gate`."""

    def __init__(self):
        self.batches: list[list[int]] = []
        self.gate, self.begun = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.begun.set()
        assert self.gate.wait(10)
        if min(items) < 0:
            raise ValueError("negative")
        return [2 * item for item in items]


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def batcher(recorder):
    """Keys are the tens digits."""
    found = Batcher(recorder, lambda item: abs(item) // 10, [1, 2, 4], 0.05, 8)
    found.start()
    yield found
    recorder.gate.set()
    found.close()


def held(batcher, recorder) -> None:
    """Have the thread in the middle of a batch."""
    recorder.gate.clear()
    batcher.submit([99])
    assert recorder.begun.wait(10)
    recorder.batches.clear()


def test_items_that_arrive_together_run_together(batcher, recorder):
    futures = batcher.submit([1, 2]) + batcher.submit([3, 4])
    assert [future.result(10) for future in futures] == [2, 4, 6, 8]
    assert recorder.batches == [[1, 2, 3, 4]]


def test_a_full_batch_begins_at_once_and_another_after_the_delay(batcher, recorder):
    batcher.delay = 0.3
    started = time.monotonic()
    for future in batcher.submit([1, 2, 3, 4]):
        future.result(10)
    assert time.monotonic() - started < 0.3
    started = time.monotonic()
    assert batcher.submit([5])[0].result(10) == 10
    assert 0.3 <= time.monotonic() - started < 1


def test_batches_have_the_sizes_that_are_prepared(batcher, recorder):
    held(batcher, recorder)
    futures = batcher.submit([1, 2, 3, 4, 5, 6, 7])
    recorder.gate.set()
    assert [future.result(10) for future in futures] == [2, 4, 6, 8, 10, 12, 14]
    assert recorder.batches == [[1, 2, 3, 4], [5, 6], [7]]


def test_items_of_different_keys_run_apart_and_the_oldest_first(batcher, recorder):
    held(batcher, recorder)
    futures = batcher.submit([11, 21, 12, 22])
    recorder.gate.set()
    assert [future.result(10) for future in futures] == [22, 42, 24, 44]
    assert recorder.batches == [[11, 12], [21, 22]]


def test_a_queue_is_bounded_and_takes_all_or_none(batcher, recorder):
    held(batcher, recorder)
    batcher.submit([1] * 7)
    with pytest.raises(QueueFull) as raised:
        batcher.submit([2, 3])
    assert raised.value.seconds >= 1
    assert batcher.waiting == 7
    batcher.submit([2])
    assert batcher.waiting == 8


def test_a_cancelled_item_frees_its_place_and_never_runs(batcher, recorder):
    held(batcher, recorder)
    futures = batcher.submit([1, 2, 3, 4, 5, 6, 7, 8])
    assert futures[0].cancel()
    assert batcher.waiting == 7
    futures += batcher.submit([9])
    recorder.gate.set()
    assert [future.result(10) for future in futures[1:]] == [4, 6, 8, 10, 12, 14, 16, 18]
    assert all(1 not in batch for batch in recorder.batches)


def test_only_the_guilty_item_of_a_batch_fails(batcher, recorder):
    futures = batcher.submit([1, -2, 3, 4])
    with pytest.raises(ValueError, match="negative"):
        futures[1].result(10)
    assert [futures[i].result(10) for i in (0, 2, 3)] == [2, 6, 8]
    assert batcher.alive


def test_closing_runs_what_waits_and_takes_no_more(batcher, recorder):
    held(batcher, recorder)
    futures = batcher.submit([1, 2, 3])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    recorder.gate.set()
    closing.join(10)
    assert [future.result(0) for future in futures] == [2, 4, 6]
    assert not batcher.alive
    with pytest.raises(RuntimeError):
        batcher.submit([1])
