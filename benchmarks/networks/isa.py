"""Capping every library to an instruction set, and seeing whether a process obeys.

Linux notes when a thread was last found with AVX-512 registers in use, each time that it puts the thread aside
(AVX512_elapsed_ms in /proc/PID/task/TID/arch_status). A thread that is never put aside while it computes is not found,
so `uses_avx512` runs the calls beside other busy processes, a few for each CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ISAS = ("avx2",)
# AVX-512 in the C library and in numpy would be taken for the peer's own
GLIBC_FEATURES = ("AVX512F", "AVX512VL", "AVX512BW", "AVX512DQ", "AVX512CD", "EVEX")
NUMPY_FEATURES = ("X86_V4", "AVX512F", "AVX512CD", "AVX512_SKX", "AVX512_ICL", "AVX512_SPR")
CAPS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels, and what torch.compile generates
        "ONEDNN_MAX_CPU_ISA": "AVX2",  # torch's convolutions and products; OpenVINO's copy of oneDNN reads it, too
        "DNNL_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=" + ",".join(f"-{name}" for name in GLIBC_FEATURES),
        "NPY_DISABLE_CPU_FEATURES": " ".join(NUMPY_FEATURES),
    }
}
BUSY = "while True: pass"
SECONDS = 2.0  # of calls that are watched
SLACK = 0.1  # seconds: the system counts in ticks


def last_use() -> float | None:
    """Seconds since a thread of this process was last found with AVX-512 in use, None if never; the newest of all.

    Raises:
        OSError: if the system does not say.
    """
    found = []
    for thread in os.scandir("/proc/self/task"):
        words = Path(thread.path, "arch_status").read_text("ascii").split()
        if int(words[1]) >= 0:
            found.append(int(words[1]) / 1e3)
    return min(found, default=None)


def uses_avx512(call: Callable[[], object], seconds: float = SECONDS) -> bool | None:
    """Whether this process uses AVX-512 during calls, as far as Linux sees; None where it does not say."""
    try:
        last_use()
    except (OSError, IndexError, ValueError):
        return None
    others = [subprocess.Popen([sys.executable, "-S", "-c", BUSY]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        time.sleep(SLACK)
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            call()
        ago, passed = last_use(), time.monotonic() - start
        return ago is not None and ago < passed - SLACK
    finally:
        for other in others:
            other.kill()
            other.wait()
