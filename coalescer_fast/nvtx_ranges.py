"""Named ranges around the stages of a call, for profilers (Nsight Systems); off unless asked for.

``COALESCER_FAST_NVTX=1``, read when a pipeline is first imported, or `enable`, turns them on; they need the package ``nvtx``. A call
has ``encode`` (styles are chosen), ``condition``, then for step i ``evaluate[i]``, and ``evaluate_empty[i]`` where it is guided, and
``decode``; where steps and decoder are one CUDA graph, ``graph``, in which those are opened while it is captured. All in the domain
"coalescer_fast".
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

logger = logging.getLogger(__name__)

DOMAIN = "coalescer_fast"
_NOTHING = nullcontext()
_open: Callable[..., AbstractContextManager[Any]] | None = None  # None: off


def span(name: str) -> AbstractContextManager[Any]:
    """A context that is the range ``name`` on a profiler's time line; while off, one that does nothing, always the same (0.2 us)."""
    return _NOTHING if _open is None else _open(name, domain=DOMAIN)


def enable() -> None:
    """Open ranges from now on. Raises ImportError if the package nvtx is missing or broken."""
    global _open
    try:
        from nvtx import annotate
    except Exception as error:
        raise ImportError(f"NVTX ranges need the package nvtx ({error}): run pip install nvtx") from error
    _open = annotate


def disable() -> None:
    """Open no more ranges."""
    global _open
    _open = None


def _read_environment() -> None:
    if os.environ.get("COALESCER_FAST_NVTX") == "1":
        try:
            enable()
        except ImportError as error:  # a profiler's switch is no reason not to draw
            logger.warning("COALESCER_FAST_NVTX=1 has no effect: %s", error)


_read_environment()
