"""The CPU kernels on aarch64, compiled by Debian's cross compiler and run by qemu."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CPU = HERE.parents[1] / "csrc" / "cpu"
CXX, OBJDUMP, QEMU = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64-static"

pytestmark = pytest.mark.skipif(
    None in map(shutil.which, (CXX, OBJDUMP, QEMU)),
    reason=f"needs {CXX} and {QEMU} (Debian's g++-aarch64-linux-gnu and qemu-user-static)",
)


def test_random_calls_pass_with_fused_products(tmp_path):
    program, objects = tmp_path / "calls", []
    for source in [HERE / "random_calls.cpp", *(path for path in CPU.glob("*.cpp") if not path.stem.startswith("avx"))]:
        objects.append(tmp_path / f"{source.stem}.o")
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno"]
        flags += ["-w"] if source.parent == HERE else ["-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
        subprocess.run([CXX, *flags, "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([CXX, "-static", *objects, "-pthread", "-o", program], check=True)
    result = subprocess.run([QEMU, program, "4"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("portable: 4 rounds, ")
    code = subprocess.run([OBJDUMP, "-d", tmp_path / "portable.o"], capture_output=True, text=True, check=True).stdout
    assert code.count("\tfmla\t") > 100
