"""Wheels for other machines, and the library of this one: what it shows, needs and computes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs pyelftools, which auditwheel brings")

from coalescer_fast.ops import native_library

from . import wheels

ROOT = Path(__file__).parents[1]
CALLS = ROOT / "tests" / "csrc" / "random_calls.cpp"
CROSS, QEMU, SYSROOT = "aarch64-linux-gnu-g++", "qemu-aarch64-static", "/usr/aarch64-linux-gnu"
HERE = native_library.FOLDER / "libcoalescer_fast_cpu.so"

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
zig = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs zig (pip install ziglang==0.17.1)")


@linux
@pytest.mark.skipif(bool(native_library.unavailable()), reason=native_library.unavailable() or "there is a library")
def test_a_library_shows_the_functions_of_the_interface_and_no_others():
    assert wheels.exported(HERE) == wheels.declared()
    names, _ = wheels.needed(HERE)
    assert not {name for name in names if "stdc++" in name or "gcc" in name}


def packed(path: Path, library: bytes, tag: str = "py3-none-manylinux2014_x86_64") -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(wheels.LIBRARY, library)
        file.writestr("coalescer_fast-0.1.0.dist-info/WHEEL", f"Tag: {tag}\n")
    return path


@linux
@pytest.mark.parametrize(
    ("name", "tag", "said"),
    [
        ("py3-none-manylinux2014_x86_64", "py3-none-any", "its name has other tags"),
        ("cp311-cp311-manylinux2014_x86_64", "", "it is for cp311-cp311"),
        ("py3-none-manylinux2014_aarch64", "", "its library is for EM_X86_64, not EM_AARCH64"),
        ("py3-none-macosx_11_0_arm64", "", "its library is not one for arm64"),
    ],
)
def test_a_wheel_that_is_not_what_its_name_says_is_found(tmp_path, capsys, name, tag, said):
    wheel = packed(tmp_path / f"coalescer_fast-0.1.0-{name}.whl", Path(sys.executable).read_bytes(), tag or name)
    assert wheels.main([str(wheel)]) == 1
    assert said in capsys.readouterr().err


@linux
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_symbol_too_many_is_found(tmp_path):
    functions = "".join(f"void {name}() {{}}\n" for name in [*wheels.declared(), "another"])
    library = tmp_path / "library.so"
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", library]
    subprocess.run(command, input=f'extern "C" {{ {functions} }}', text=True, check=True)
    with pytest.raises(wheels.WrongWheel, match=r"has these symbols, or lacks them: .*another"):
        wheels.check_linux(library, f"manylinux2014_{os.uname().machine}")


def built(target: str, folder: Path) -> Path:
    """The wheel, by the zig of this environment."""
    commands = ("build", "--build-base", folder / "build", "bdist_wheel", "--dist-dir", folder)
    command = [sys.executable, "setup.py", "-q", *commands, "--bdist-dir", folder / "bdist"]
    environment = os.environ | {"COALESCER_FAST_TARGET": target}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    [wheel] = folder.glob("*.whl")
    return wheel


def library_of(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as file:
        return Path(file.extract(wheels.LIBRARY, folder))


def said_by(command: list, library: Path) -> list[str]:
    result = subprocess.run(
        [*command, "12"], env=os.environ | {"LD_LIBRARY_PATH": str(library.parent)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
@linux
@zig
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="needs an x86 processor")
@pytest.mark.skipif(bool(native_library.unavailable()), reason="needs the library of this machine's own compiler")
def test_the_wheel_for_x86_64(tmp_path):
    """Its library has the bits of this machine's compiler, on every instruction set, and draws the same picture."""
    wheel = built("x86_64-linux", tmp_path)
    wheels.check(wheel)
    library = library_of(wheel, tmp_path / "unpacked")
    calls = tmp_path / "calls"
    subprocess.run(["c++", "-std=c++17", "-O1", "-w", CALLS, library, "-pthread", "-o", calls], check=True)
    lines = said_by([calls], library)
    assert lines == said_by([calls], HERE)
    assert lines[-1].startswith(f"{native_library.isa()}: ")

    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", tmp_path / "site", wheel], check=True)
    pictures = []
    for site in (tmp_path / "site", ROOT):
        command = [sys.executable, "-m", "coalescer_fast", "--quiet", "sample", "octopus", "--seed", "3"]
        environment = os.environ | {"PYTHONPATH": str(site)}
        subprocess.run(
            [*command, "--backend", "cpu", "-o", tmp_path / "1.png"], cwd=tmp_path, env=environment, check=True
        )
        pictures.append((tmp_path / "1.png").read_bytes())
        (tmp_path / "1.png").unlink()
    assert pictures[0] == pictures[1]


@pytest.mark.slow
@linux
@zig
@pytest.mark.skipif(None in map(shutil.which, (CROSS, QEMU)), reason=f"needs {CROSS} and {QEMU}")
def test_the_wheel_for_aarch64(tmp_path):
    """The random calls of the very library that is in the wheel, run by qemu."""
    wheel = built("aarch64-linux", tmp_path)
    wheels.check(wheel)
    library = library_of(wheel, tmp_path / "unpacked")
    calls = tmp_path / "calls"
    subprocess.run([CROSS, "-std=c++17", "-O1", "-w", CALLS, library, "-pthread", "-o", calls], check=True)
    command = [QEMU, "-L", SYSROOT, "-E", f"LD_LIBRARY_PATH={library.parent}", calls]
    [line] = said_by(command, library)
    assert line.startswith("portable: 12 rounds, ")


@pytest.mark.slow
@zig
def test_the_wheel_for_macos(tmp_path):
    """It is made; it has not run anywhere."""
    wheels.check(built("aarch64-macos", tmp_path))
