"""Building the package with and without a compiler (setup.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(target: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("CXX", "COALESCER_FAST_BUILD")}
    arguments = [sys.executable, "setup.py", "-q", *(command or ("build_py", "--build-lib", str(target)))]
    return subprocess.run(arguments, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False)


def built(target: Path) -> tuple[bool, str]:
    folder = target / "coalescer_fast" / "lib"
    return (folder / "libcoalescer_fast_cpu.so").is_file(), json.loads((folder / "build.json").read_text())["cpu"]


def test_with_a_compiler(tmp_path):
    result = build(tmp_path, COALESCER_FAST_BUILD="require")
    assert result.returncode == 0, result.stderr
    assert built(tmp_path) == (True, "")


@pytest.mark.parametrize(
    ("cxx", "reason"),
    [
        ("no-such-compiler", "there is no C++ compiler no-such-compiler: install g++ or set CXX"),
        ("false", "false cannot compile it: false failed"),
    ],
)
def test_without_one_the_package_is_there_and_one_line_says_what_is_missing(tmp_path, cxx, reason):
    result = build(tmp_path, CXX=cxx)
    assert result.returncode == 0
    assert [line for line in result.stderr.splitlines() if line.startswith("coalescer_fast: ")] == [
        f"coalescer_fast: installed without the CPU kernels (ops run on plain PyTorch): {reason}"
    ]
    assert built(tmp_path) == (False, reason)
    assert (tmp_path / "coalescer_fast" / "ops" / "dispatch.py").is_file()


def test_required_and_missing_fails(tmp_path):
    result = build(tmp_path, CXX="no-such-compiler", COALESCER_FAST_BUILD="require")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith("coalescer_fast: the CPU kernels cannot be built, which COALESCER_FAST_BUILD=require")


def test_switched_off(tmp_path):
    assert build(tmp_path, COALESCER_FAST_BUILD="off").returncode == 0
    assert built(tmp_path) == (False, "COALESCER_FAST_BUILD=off when it was installed")


def test_unknown_choice(tmp_path):
    result = build(tmp_path, COALESCER_FAST_BUILD="gpu")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == "COALESCER_FAST_BUILD is 'gpu'; use one of auto, off, cpu, require"


def test_the_source_distribution_has_all_that_a_build_needs(tmp_path):
    assert build(tmp_path, "sdist", "--dist-dir", str(tmp_path)).returncode == 0
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert wanted | {"setup.py", "pyproject.toml"} <= names
