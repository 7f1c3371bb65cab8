"""The instruction sets of the CPU kernels."""

from __future__ import annotations

from coalescer_fast.ops import native_library


def available() -> list[str]:
    """Those that the processor and the library have, the best one last."""
    names, best = [], native_library.isa()
    for name in ("portable", "avx2", "avx512", "avx512_bf16"):
        try:
            native_library.set_isa(name)
            names.append(name)
        except ValueError:
            continue
    native_library.set_isa(best)
    return names
