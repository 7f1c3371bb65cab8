"""The CUDA and the Triton kernels on a CPU: in the emulation of tests/csrc, and in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from coalescer_fast.ops import cuda_library, triton_launch


def use() -> None:
    """Run both on CPU tensors from here on. Python is started again where Triton was set up for a GPU.

    Raises:
        ValueError: there is no C++ compiler for the emulation.
    """
    if not triton_launch.INTERPRETED:  # read when the package is imported
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})
    import_module("tests.conftest")  # it builds the emulation, and sets it up
    if not cuda_library.INTERPRETED:
        raise ValueError("the emulation of CUDA needs Linux and a C++ compiler: install g++ or set CXX")
