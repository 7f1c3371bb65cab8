"""Named ranges around the stages of a call, for profilers (Nsight Systems); off unless asked for.

``COALESCER_FAST_NVTX=1``, read when a pipeline is first imported, or `enable` turns them on. They need the package
``nvtx`` and are in the domain "coalescer_fast".

A call has ``encode`` (styles are chosen), ``condition``, for step i ``evaluate[i]`` and, where it is guided,
``evaluate_empty[i]``, and ``decode``. Where steps and decoder are one CUDA graph, they are the range ``graph``, and the
ranges of the steps open while it is captured.
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
    """A context manager for the range ``name``; while ranges are off, always the same one, which does nothing."""
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
        except ImportError as error:  # no reason not to draw
            logger.warning("COALESCER_FAST_NVTX=1 has no effect: %s", error)


_read_environment()
