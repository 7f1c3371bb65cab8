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
    """Compiles `sources` (.cu, .cpp) and the emulation into the shared library `target`, or into a program if "-pie" is
    among `flags`.

    `flags` go to the compiler (CXX, c++ unless set) for .cu and for linking, after -O1 -g. Raises RuntimeError with its
    output if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        link(compile_all([EMULATION / "emulation.cpp", *sources], Path(folder), *flags), target, *flags)


def compile_all(sources: list[Path], folder: Path, *flags: str) -> list[Path]:
    """The object files of `sources`, of different names, in `folder`.

    .cpp is compiled without `flags`: the emulation must not be instrumented, and its callers need not be.
    """
    objects = [folder / f"{source.stem}.o" for source in sources]
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-fPIC", "-g"]
    device = ["-O1", "-fno-strict-aliasing", "-fno-omit-frame-pointer", "-Wno-unknown-pragmas", f"-I{EMULATION}"]
    device += ["-fsanitize=alignment"]  # without its library: emulation.cpp has what it calls
    device += [*(flag for flag in flags if flag != "-pie"), "-x", "c++"]
    commands = [
        [*compiler, *(device if s.suffix == ".cu" else ["-O2"]), "-c", s, "-o", o] for s, o in zip(sources, objects)
    ]
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(_run, commands))
    return objects


def link(objects: list[Path], target: Path, *flags: str) -> None:
    kind = [] if "-pie" in flags else ["-shared"]
    _run([os.environ.get("CXX", "c++"), *kind, *flags, *objects, "-pthread", "-o", target])


def _run(command: list) -> None:
    result = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}")
