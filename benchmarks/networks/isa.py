"""Capping every library to an instruction set, and seeing whether a process obeys.

Linux notes when a thread was last found with AVX-512 registers in use, each time that it puts the thread aside
(AVX512_elapsed_ms in /proc/PID/task/TID/arch_status). A thread that is never put aside while it computes is not found,
so `avx512_percent` runs the calls beside other busy processes, a few for each CPU. What it says was checked on Zen 5:

- It tells AVX-512 from AVX2, provided that the C library, whose memcpy has AVX-512, is capped, too: of torch's
  operations, convolutions, products in bfloat16 and attention were seen with the library's cap alone, and nothing
  with all of `CAPS`.
- OpenVINO has no cap of its own in releases. Its copy of oneDNN obeys ONEDNN_MAX_CPU_ISA, which leaves AVX-512 to
  three kinds of layers: MVN, Interpolate and FakeQuantize (``execType`` in its runtime model). Linear layers whose
  weights are in float32 run in another library, MLAS, with AVX-512, so that under a cap weights are in half precision.
- ONNX Runtime computes with MLAS and obeys nothing: it is left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

# AVX-512 in the C library and in numpy would be taken for the peer's own
GLIBC_FEATURES = ("AVX512F", "AVX512VL", "AVX512BW", "AVX512DQ", "AVX512CD", "EVEX")
NUMPY_FEATURES = ("X86_V4", "AVX512F", "AVX512CD", "AVX512_SKX", "AVX512_ICL", "AVX512_SPR")
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels, and the vectors of torch.compile
    "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",  # the C++ compiler of torch.compile
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # torch's convolutions and products; OpenVINO's copy of oneDNN reads it, too
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=" + ",".join(f"-{name}" for name in GLIBC_FEATURES),
    "NPY_DISABLE_CPU_FEATURES": " ".join(NUMPY_FEATURES),
}
# VNNI multiplies 8-bit integers, which oneDNN alone does.
CAPS = {
    "avx2": AVX2,
    "avx2_vnni": AVX2 | {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "DNNL_MAX_CPU_ISA": "AVX2_VNNI"},
}
BUSY = "import time; end = time.time() + 120\nwhile time.time() < end: pass"  # no longer, if this process is killed
SECONDS = 2.0  # of calls that are watched
LOOK = 0.02  # seconds between two looks; the system counts in ticks of up to 0.01


def last_use() -> float | None:
    """Seconds since a thread of this process was last found with AVX-512 in use, None if never; the newest of all.

    Raises:
        OSError: the system does not say.
    """
    found = []
    for thread in os.scandir("/proc/self/task"):
        milliseconds = int(Path(thread.path, "arch_status").read_text("ascii").split()[1])
        if milliseconds >= 0:
            found.append(milliseconds / 1e3)
    return min(found, default=None)


def avx512_percent(call: Callable[[], object], seconds: float = SECONDS) -> float | None:
    """In how many of 100 looks during calls a thread of this process was found with AVX-512 in use since the last look.

    Args:
        call: what is watched.
        seconds: to repeat it for, once at least.

    Returns:
        None where the system does not say.
    """
    try:
        last_use()
    except (OSError, IndexError, ValueError):
        return None
    looks: list[bool] = []
    done = threading.Event()

    def watch() -> None:
        before = time.monotonic()
        while not done.wait(LOOK):
            ago, now = last_use(), time.monotonic()
            looks.append(ago is not None and ago < now - before)
            before = now

    others = [subprocess.Popen([sys.executable, "-S", "-c", BUSY]) for _ in range(2 * (os.cpu_count() or 1))]
    watcher = threading.Thread(target=watch)
    try:
        start = time.monotonic()
        watcher.start()
        while time.monotonic() - start < seconds:
            call()
    finally:
        done.set()
        watcher.join()
        for other in others:
            other.kill()
            other.wait()
    return 100 * sum(looks) / max(1, len(looks))
