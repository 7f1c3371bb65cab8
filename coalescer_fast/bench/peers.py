"""What ours is compared with: registered by name, and prepared so that one that fails does not stop the others."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from ..console import sentence

OK = "ok"
T = TypeVar("T")
Prepare = TypeVar("Prepare", bound=Callable[..., Any])


@dataclass(frozen=True)
class Peer:
    """A way to compute the same as ours.

    Attributes:
        prepare: makes what is timed; its arguments are those of the family of benchmarks.
        dtypes: that it is measured in.
    """

    prepare: Callable[..., Any]
    dtypes: tuple[str, ...]


class Peers(dict[str, Peer]):
    """The peers of a family of benchmarks, by name."""

    def register(self, name: str, *dtypes: str) -> Callable[[Prepare], Prepare]:
        """Decorates the function that prepares the peer of this name."""

        def add(prepare: Prepare) -> Prepare:
            self[name] = Peer(prepare, dtypes)
            return prepare

        return add


class Missing(Exception):
    """Why a peer cannot run here, which is no failure of its own."""


class TimeIsOver(BaseException):
    """The seconds of a benchmark are over, wherever it is; no handler of errors takes it for one of its own."""


def attempt(work: Callable[[], T], *passed_on: type[Exception]) -> tuple[T | None, str]:
    """The result and the status "ok", or None and "skipped: why" or "FAIL: why".

    Whatever a compiler, an exporter or a kernel raises is its result.

    Args:
        work: what may fail.
        passed_on: exceptions that are raised all the same.
    """
    try:
        return work(), OK
    except Missing as reason:
        return None, f"skipped: {reason}"
    except passed_on:
        raise
    except Exception as error:
        return None, f"FAIL: {sentence(error)}"


def fresh_compiler_cache(needed: bool) -> AbstractContextManager[Any]:
    """Hide results of earlier compilations, if needed, so that the seconds to compile are those of a first time.

    A cache that TORCHINDUCTOR_CACHE_DIR names is used all the same.
    """
    if not needed or "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return nullcontext()
    from torch._inductor.utils import fresh_cache

    return fresh_cache()


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TimeIsOver inside after so many seconds, where the system can."""
    if seconds == float("inf") or not hasattr(signal, "setitimer"):
        yield
        return

    def over(*_: object) -> None:
        raise TimeIsOver

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
