"""What a processor can run, csrc/cpu/processor.h: as the compiler's own library says, and for other processors."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coalescer_fast.ops import native_library

ISAS = ("avx2", "avx2_vnni", "avx512", "avx512_bf16")
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86 processor")


class Identification(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("leaf_1_c", "leaf_7_b", "leaf_7_c", "leaf_7_1_a", "saved")]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which(cxx := os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs a C++ compiler")
    target = tmp_path_factory.mktemp("processor") / "processor.so"
    flags = ["-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([cxx, *flags, Path(__file__).with_name("processor.cpp"), "-o", target], check=True)
    return ctypes.CDLL(str(target))


def named(found: ctypes.Array) -> set[str]:
    return {isa for isa, has in zip(ISAS, found, strict=True) if has}


def instructions(library, identification: Identification) -> set[str]:
    library.instructions_of(ctypes.byref(identification), found := (ctypes.c_uint8 * len(ISAS))())
    return named(found)


@x86
def test_it_says_what_the_compiler_says(library):
    library.identify_here(ctypes.byref(here := Identification()))
    library.instructions_by_compiler(found := (ctypes.c_uint8 * len(ISAS))())
    assert instructions(library, here) == named(found)
    flags = set(Path("/proc/cpuinfo").read_text("utf-8").split())
    assert ("avx2" in instructions(library, here)) == (flags >= {"avx2", "fma", "f16c"})


ALL = 2**32 - 1
# Where one bit is missing, what the processor has nevertheless. Numbers of bits: Intel's manual, volume 2, CPUID; and
# volume 1, 13.3, of registers that the system saves.
MISSING = [
    ("leaf_1_c", 12, set()),  # FMA
    ("leaf_1_c", 27, set()),  # OSXSAVE: the system may save nothing
    ("leaf_1_c", 28, set()),  # AVX
    ("leaf_1_c", 29, set()),  # F16C
    ("leaf_7_b", 5, set()),  # AVX2
    *(("leaf_7_b", bit, {"avx2", "avx2_vnni"}) for bit in (16, 17, 30, 31)),  # AVX-512 F, DQ, BW, VL
    ("leaf_7_c", 11, {"avx2", "avx2_vnni", "avx512"}),  # AVX512_VNNI
    ("leaf_7_1_a", 4, {"avx2", "avx512", "avx512_bf16"}),  # AVX-VNNI
    ("leaf_7_1_a", 5, {"avx2", "avx2_vnni", "avx512"}),  # AVX512_BF16
    ("saved", 1, set()),  # XMM
    ("saved", 2, set()),  # YMM
    *(("saved", bit, {"avx2", "avx2_vnni"}) for bit in (5, 6, 7)),  # masks, ZMM, ZMM16 to ZMM31
]
USED = {(register, bit) for register, bit, _ in MISSING}


def test_of_nothing_and_of_all(library):
    assert instructions(library, Identification()) == set()
    assert instructions(library, Identification(*[ALL] * 5)) == set(ISAS)


def test_nothing_else_is_needed(library):
    wanted = Identification()
    for register, bit in USED:
        setattr(wanted, register, getattr(wanted, register) | 1 << bit)
    assert instructions(library, wanted) == set(ISAS)


@pytest.mark.parametrize(("register", "bit", "left"), MISSING)
def test_without_one_bit(library, register, bit, left):
    without = Identification(*[ALL] * 5)
    setattr(without, register, ALL & ~(1 << bit))
    assert instructions(library, without) == left


@x86
@pytest.mark.parametrize(
    ("cpu", "isa"),
    [
        ("Nehalem", "portable"),
        ("Haswell", "avx2"),
        ("Haswell,-fma", "portable"),
        ("Haswell,-f16c", "portable"),
        ("Haswell,-xsave", "portable"),
    ],
)
def test_the_library_on_another_processor(cpu, isa):
    """qemu's has AVX2 from version 7.2 on, and nothing later."""
    if shutil.which("qemu-x86_64-static") is None:
        pytest.skip("needs qemu-x86_64-static (Debian's qemu-user-static)")
    if reason := native_library.unavailable():
        pytest.skip(reason)
    code = (
        "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).cf_cpu_isa; f.restype = ctypes.c_char_p; print(f().decode())"
    )
    library = native_library.FOLDER / "libcoalescer_fast_cpu.so"
    command = ["qemu-x86_64-static", "-cpu", cpu, sys.executable, "-S", "-c", code, library]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout == f"{isa}\n"
