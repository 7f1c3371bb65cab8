"""Builds the native kernels where they can be built; everything else stands in pyproject.toml.

The library is plain C behind csrc/abi.h, loaded by ctypes: no torch and no Python header, so one wheel serves every torch and Python.
COALESCER_FAST_BUILD=off builds nothing, =cpu the CPU kernels, =auto (the default) what can be built, and =require makes a part that cannot
be built fail the installation; else it is left out, with one line that says why, which `coalescer_fast.ops.backends` repeats.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CHOICES = ("auto", "off", "cpu", "require")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi")
# Instruction sets are chosen at run time, so each has its own file and flags.
AVX2 = ("-mavx2", "-mfma", "-mf16c")
# -Wno-...: the compiler's own intrinsics
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
X86_FLAGS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": (*AVX512, "-mavx512bf16")}


def chosen() -> str:
    value = os.environ.get("COALESCER_FAST_BUILD", "auto")
    if value not in CHOICES:
        raise SystemExit(f"COALESCER_FAST_BUILD is {value!r}; use one of {', '.join(CHOICES)}")
    return value


def compiler() -> list[str]:
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    return [next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")]


def build_cpu(target: Path) -> str:
    """Compile csrc/cpu into the shared library ``target``; returns why that cannot be done, or ""."""
    if os.name != "posix":
        return f"it is not built on {platform.system()}"
    cxx = compiler()
    if not shutil.which(cxx[0]):
        return f"there is no C++ compiler{' ' + cxx[0] if cxx[0] else ''}: install g++ or set CXX"
    extra = {"runtime": (), "portable": ()} | (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else {})
    with tempfile.TemporaryDirectory() as scratch:

        def run(*arguments: str) -> str:
            result = subprocess.run([*cxx, *arguments], capture_output=True, text=True)
            return (result.stderr.strip() or f"{cxx[0]} failed") if result.returncode else ""

        def compile_one(name: str) -> str:
            return run(*FLAGS, *extra[name], "-c", str(ROOT / "csrc" / "cpu" / f"{name}.cpp"), "-o", f"{scratch}/{name}.o")

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failures = list(filter(None, pool.map(compile_one, extra)))
        if not failures:
            static = [] if sys.platform == "darwin" else ["-static-libstdc++", "-static-libgcc"]
            failures = [run("-shared", *static, "-o", str(target), *(f"{scratch}/{name}.o" for name in extra))]
    return f"{cxx[0]} cannot compile it: {failures[0].splitlines()[0]}" if failures[0:1] and failures[0] else ""


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        package = ROOT / "coalescer_fast" if self.editable_mode else Path(self.build_lib) / "coalescer_fast"
        folder = package / "lib"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "libcoalescer_fast_cpu.so"
        target.unlink(missing_ok=True)
        missing = "COALESCER_FAST_BUILD=off when it was installed" if chosen() == "off" else build_cpu(target)
        if missing and chosen() == "require":
            raise SystemExit(f"coalescer_fast: the CPU kernels cannot be built, which COALESCER_FAST_BUILD=require asks for: {missing}")
        if missing:
            print(f"coalescer_fast: installed without the CPU kernels (ops run on plain PyTorch): {missing}", file=sys.stderr)
        (folder / "build.json").write_text(json.dumps({"cpu": missing}) + "\n", encoding="utf-8")


class BdistWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3: nothing in the wheel links to it."""
        return ("py3", "none", super().get_tag()[2])


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return chosen() != "off"


setup(distclass=NativeDistribution, cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
