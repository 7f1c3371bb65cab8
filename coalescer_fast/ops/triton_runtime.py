"""What the Triton kernels of every op share: whether they can run here, and the table of their configurations."""

from __future__ import annotations

import functools
import os

# Triton's own switch, read when a kernel is decorated: the kernels then run in its interpreter, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable() -> str:
    """Why Triton kernels cannot run in this process, or ""."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
        return f"triton is {triton.__version__}; expected 3.5 or newer"
    return ""
