"""Workers on this machine: processes, one of which that dies is replaced, and its shard made again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, cast

from ..console import unforeseen
from .job import Drawn, Event, Job, Ready
from .prompt_file import Prompt
from .settings import Facts

ATTEMPTS = 5  # of a shard, and of starting a worker
START = -1  # counted like a shard


@dataclass
class _Failed:
    """A worker's error.

    Attributes:
        message: in one sentence.
        details: its traceback.
    """

    message: str
    details: str


@dataclass
class _Worker:
    process: BaseProcess
    ready: bool = False
    shard: int | None = None
    drawn: int = 0


def run(
    job: Job, tasks: Sequence[int], rows: Callable[[int], list[Prompt]], workers: Callable[[Facts | None], int]
) -> Generator[Event, None, None]:
    """Make shards in processes.

    Args:
        job: what they need to know.
        tasks: the shards; if there are none, the model is loaded all the same.
        rows: the prompts of a shard.
        workers: how many processes there shall be, by the facts of the first, or None while there are none.

    Yields:
        `Ready` of each worker, before it has begun with a shard; `Drawn`; and the shards that are made.

    Raises:
        ValueError: what has failed in a worker, and a worker that has died too often.
    """
    waiting, died = deque(tasks), Counter[int]()
    pool: dict[Connection, _Worker] = {}
    facts: Facts | None = None
    try:
        while facts is None or waiting or any(worker.shard is not None for worker in pool.values()):
            busy = sum(worker.shard is not None for worker in pool.values())
            while len(pool) < min(workers(facts), max(busy + len(waiting), 1)):
                connection, process = _start(job)
                pool[connection] = _Worker(process)
            for connection in cast("list[Connection]", wait(list(pool))):
                worker = pool[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    del pool[connection]
                    connection.close()
                    worker.process.join()
                    _count(died, worker)
                    if worker.shard is not None:
                        yield Drawn(-worker.drawn)
                        waiting.appendleft(worker.shard)
                    continue
                if isinstance(message, _Failed):
                    raise ValueError(message.message) from RuntimeError(f"in a worker:\n{message.details}")
                if isinstance(message, Ready):
                    facts, worker.ready = message.facts, True
                    died[START] = 0
                elif isinstance(message, Drawn):
                    worker.drawn += message.pictures
                else:
                    worker.shard = None
                yield message
            for connection, worker in pool.items():
                if worker.ready and worker.shard is None and waiting:
                    worker.shard, worker.drawn = waiting.popleft(), 0
                    with suppress(ConnectionError):  # one that has died is found above
                        connection.send((worker.shard, rows(worker.shard)))
    finally:
        for connection, worker in pool.items():
            connection.close()  # by which one that waits ends
            if worker.shard is not None or not worker.ready:
                worker.process.kill()
            worker.process.join()


def _count(died: Counter[int], worker: _Worker) -> None:
    """Count a death. Raises ValueError where it was one too many."""
    shard = START if worker.shard is None else worker.shard
    died[shard] += 1
    if died[shard] >= ATTEMPTS:
        status = worker.process.exitcode or 0
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        when = "before it could draw" if worker.shard is None else f"in shard {worker.shard:05d}"
        raise ValueError(
            f"a worker has ended with {how} {when}, {died[shard]} times: look whether there is enough memory, and ask "
            "for fewer workers"
        )


def context() -> BaseContext:
    """What processes are started by: new interpreters, for a fork of one that has threads may hang."""
    return multiprocessing.get_context("spawn")


def _start(job: Job) -> tuple[Connection, BaseProcess]:
    ours, theirs = multiprocessing.Pipe()
    # context() has types for each method of starting a process, and Process for none
    process: BaseProcess = context().Process(target=_work, args=(theirs, job), daemon=True)  # type: ignore[attr-defined]
    with _interrupts_ignored():
        process.start()
    theirs.close()
    return ours, process


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """What is started inside ignores Ctrl-C, which is meant for this process; it ends the others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(connection: Connection, job: Job) -> None:
    """Load the model, then make each shard that is sent, until the other side is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    send: Callable[[Any], None] = connection.send
    try:
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process would leave
        from .drawing import Drawer

        drawer = Drawer(job)
        send(Ready(drawer.facts))
        while True:
            shard, rows = connection.recv()
            send(drawer.make(shard, rows, lambda pictures: send(Drawn(pictures))))
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        send(_Failed(unforeseen(error), traceback.format_exc()))


def _end_with_parent() -> None:
    """End this process when the one that has started it is gone, however that has ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
