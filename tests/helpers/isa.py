"""The instruction sets of the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from coalescer_fast.ops import native_library

# Those that multiply 8-bit integers.
EIGHT_BITS = ("avx2", "avx2_vnni", "avx512", "avx512_bf16")


def available() -> list[str]:
    """Those that the processor and the library have, the best one last."""
    names, best = [], native_library.isa()
    for name in reversed(native_library.ISAS):
        try:
            native_library.set_isa(name)
            names.append(name)
        except ValueError:
            continue
    native_library.set_isa(best)
    return names


@contextmanager
def using(name: str) -> Iterator[None]:
    """Inside, kernels have this instruction set; the test is skipped where it is not there."""
    if native_library.unavailable() or name not in available():
        pytest.skip(native_library.unavailable() or f"the processor does not have {name}")
    best = native_library.isa()
    native_library.set_isa(name)
    try:
        yield
    finally:
        native_library.set_isa(best)
