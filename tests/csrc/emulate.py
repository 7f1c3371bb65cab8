"""CUDA sources compiled for the host, with emulation/ in the place of CUDA's headers."""

from __future__ import annotations

import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EMULATION = Path(__file__).with_name("emulation")
JOBS = 2


def build(sources: list[Path], target: Path, *flags: str) -> None:
    """Compiles `sources` (.cu, .cpp) and the emulation into the shared library `target`, or into a program if "-pie" is among `flags`.

    `flags` go to the compiler (CXX, c++ unless set) for the sources and for linking, after -O1 -g. The emulation itself is compiled without
    them: it must not be instrumented. Raises RuntimeError with the compiler's output if one fails.
    """
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-fPIC", "-g"]
    kind = [] if "-pie" in flags else ["-shared"]
    with tempfile.TemporaryDirectory() as folder:
        commands = [[*compiler, "-O2", "-c", EMULATION / "emulation.cpp", "-o", f"{folder}/emulation.o"]]
        objects = [f"{folder}/emulation.o"]
        for i, source in enumerate(sources):
            objects.append(f"{folder}/{i}.o")
            own = ["-O1", "-fno-strict-aliasing", "-fno-omit-frame-pointer", "-Wno-unknown-pragmas", f"-I{EMULATION}"]
            commands.append([*compiler, *own, *(flag for flag in flags if flag != "-pie"), "-x", "c++", "-c", source, "-o", objects[-1]])
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(_run, commands))
        _run([*compiler, *kind, *flags, *objects, "-pthread", "-o", target])


def _run(command: list) -> None:
    result = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}")
