"""Faults planted in the kernels, which the random calls must find: missing barriers, wrong indices and counts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from emulate import EMULATION, compile_all, link

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
PLAIN, ADDRESS, THREAD = (), ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), ("-fsanitize=thread",)

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation runs on Linux"),
]

BARRIER = re.compile(r"\b(__syncthreads\(\)|__syncwarp\(\w*\)|\w+(\(\))?\.sync\(\)|__pipeline_wait_prior\(\d+\));")
BARRIERS = [
    (path.name, number)
    for path in sorted((CSRC / "cuda").iterdir())
    for number, line in enumerate(path.read_text().splitlines())
    if BARRIER.search(line)
]

# file, what it has once, what it gets
WRONG_RESULTS = [
    (
        "group_norm.cu",
        "for (int row = lane; row < rows; row += p.lanes)",
        "for (int row = lane; row <= rows; row += p.lanes)",
    ),
    ("group_norm.cu", "if (r >= rows) break;", "if (r > rows) break;"),
    ("group_norm.cu", "lane < p.lanes && column < width", "lane < p.lanes && column <= width"),
    ("group_norm.cu", "(rows - lane + p.lanes - 1) / p.lanes", "(rows - lane + p.lanes) / p.lanes"),
    ("group_norm.cu", "(end - 1) / V - first + 1", "(end - 1) / V - first"),
    ("group_norm.cu", "step = d * __frcp_rn(merged)", "step = d"),
    ("group_norm.cu", "if (--left == 0 || j == V - 1)", "if (j == V - 1)"),
    ("group_norm.cu", "merge(p.splits * p.tiles_per_group,", "merge(p.tiles_per_group,"),
    ("group_norm.cu", "merge(p.splits * p.tiles_per_group,", "merge(p.splits,"),
    ("group_norm.cu", "min(p.rows_per_split, p.rows - split * p.rows_per_split)", "p.rows_per_split"),
    ("group_norm.cu", "min(p.rows_per_split, p.rows - rank * p.rows_per_split)", "p.rows_per_split"),
    (
        "group_norm.h",
        "p.splits = static_cast<int>(cdiv(p.rows, p.rows_per_split))",
        "p.splits = p.rows / p.rows_per_split",
    ),
    ("group_norm.h", "(p.vector % p.per_group ? 2 : 0)", "(p.vector % p.per_group ? 1 : 0)"),
    ("head.cu", "column >= 0 && column < p.width", "column >= 0 && column <= p.width"),
    ("head.cu", "row < 0 || row >= p.height", "row < 0 || row > p.height"),
    ("head.cu", "i < p.blocks_of_sample;", "i + 1 < p.blocks_of_sample;"),
    ("step.cu", "rank < p.cluster;", "rank + 1 < p.cluster;"),
    ("device.h", "i < blockDim.x / WARP;", "i + 1 < blockDim.x / WARP;"),
]
# The results stay right: what is read too much is not used.
READ_OUTSIDE = [
    ("head.cu", "if (first + o >= p.cz) break;", "if (first + o > p.cz) break;"),
    ("residual.cu", "if (row >= p.rows) break;\n        left", "if (row > p.rows) break;\n        left"),
]

# Of the steps on a CPU: sanitizers, and as above.
STEPS = [
    (
        ADDRESS,
        "image.h",
        "fill(origin + (height + 1) * image.row, width + 2);",
        "fill(origin + (height + 1) * image.row, width + 3);",
    ),
    (ADDRESS, "convolution.h", "WHOLE ? W : a.outputs - c;", "W;"),
    (
        ADDRESS,
        "threads.cpp",
        "for (int64_t rank = 1; rank < mine.size; ++rank)",
        "for (int64_t rank = 2; rank < mine.size; ++rank)",
    ),
    (THREAD, "threads.cpp", "(&mine.posted, posted, __ATOMIC_RELEASE);", "(&mine.posted, posted, __ATOMIC_RELAXED);"),
]


class Calls:
    """random_cuda_calls of CUDA sources."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.common = compile_all([EMULATION / "emulation.cpp", HERE / "random_cuda_calls.cpp"], folder)
        sources = sorted((CSRC / "cuda").glob("*.cu"))
        self.sound = dict(zip([source.name for source in sources], compile_all(sources, folder)))

    def run(self, objects: list[Path], rounds: int, *flags: str) -> subprocess.CompletedProcess:
        program = self.folder / "calls"
        link([*self.common, *objects], program, "-pie", *flags)
        small = ["small"] if flags == THREAD else []
        environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
        return subprocess.run(
            [program, str(rounds), *small], capture_output=True, text=True, check=False, timeout=300, env=environment
        )

    def find(self, name: str, text: str, flags: tuple[str, ...], folder: Path) -> bool:
        """Whether the calls fail once the file `name` has the `text`; sanitizers see the sources that have it only."""
        shutil.copytree(CSRC, folder / "csrc", dirs_exist_ok=True)
        changed = folder / "csrc" / "cuda" / name
        changed.write_text(text)
        sources = [source for source in sorted(changed.parent.glob("*.cu")) if name in parts(source)]
        objects = self.sound | dict(zip([source.name for source in sources], compile_all(sources, folder, *flags)))
        result = self.run([*objects.values()], 60 if flags == THREAD else 240, *flags)
        print(result.stdout, result.stderr)
        return result.returncode != 0


def parts(path: Path) -> set[str]:
    """The names of a source and of the headers beside it that it includes."""
    includes = re.findall(r'#include "(\w+\.h)"', path.read_text())
    return {path.name}.union(*(parts(path.parent / include) for include in includes))


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    return Calls(tmp_path_factory.mktemp("calls"))


def without_barrier(name: str, number: int) -> str:
    lines = (CSRC / "cuda" / name).read_text().splitlines(keepends=True)
    lines[number] = "\n"
    return "".join(lines)


def replaced(name: str, old: str, new: str) -> str:
    text = (CSRC / "cuda" / name).read_text()
    assert text.count(old) == 1
    return text.replace(old, new)


def test_kernels_without_a_fault_pass(calls):
    result = calls.run([*calls.sound.values()], 40)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_missing_barrier_and_a_wrong_count_are_found(calls, tmp_path):
    assert calls.find("step.cu", without_barrier(*next(b for b in BARRIERS if b[0] == "step.cu")), PLAIN, tmp_path)
    assert calls.find("step.cu", replaced("step.cu", "rank < p.cluster;", "rank + 1 < p.cluster;"), PLAIN, tmp_path)


@pytest.mark.planted
@pytest.mark.parametrize(("name", "number"), BARRIERS, ids=[f"{name}:{number + 1}" for name, number in BARRIERS])
def test_a_missing_barrier_is_found(calls, tmp_path, name, number):
    text = without_barrier(name, number)
    assert calls.find(name, text, PLAIN, tmp_path) or calls.find(name, text, THREAD, tmp_path)


@pytest.mark.planted
@pytest.mark.parametrize(
    ("name", "old", "new"), WRONG_RESULTS, ids=[f"{name}: {new}" for name, _, new in WRONG_RESULTS]
)
def test_a_wrong_index_or_count_is_found(calls, tmp_path, name, old, new):
    assert calls.find(name, replaced(name, old, new), PLAIN, tmp_path)


@pytest.mark.planted
@pytest.mark.parametrize(("name", "old", "new"), READ_OUTSIDE, ids=[f"{name}: {new}" for name, _, new in READ_OUTSIDE])
def test_a_read_outside_is_found(calls, tmp_path, name, old, new):
    assert calls.find(name, replaced(name, old, new), ADDRESS, tmp_path)


@pytest.mark.slow
def test_a_missing_barrier_is_a_race(calls, tmp_path):
    name, number = next(b for b in BARRIERS if b[0] == "device.h")
    assert calls.find(name, without_barrier(name, number), THREAD, tmp_path)


def run_cpu_calls(csrc: Path, flags: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess:
    """random_calls of the portable CPU kernels under `csrc`."""
    program = folder / "calls"
    kernels = [path for path in sorted((csrc / "cpu").glob("*.cpp")) if not path.stem.startswith("avx")]
    command = [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
        "-O0",
        "-g",
        "-ffp-contract=off",
        "-w",
        "-DCF_PORTABLE_ONLY",
        *flags,
    ]
    subprocess.run([*command, HERE / "random_calls.cpp", *kernels, "-pthread", "-o", program], check=True)
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program, "60"], capture_output=True, text=True, check=False, timeout=300, env=environment)


@pytest.mark.slow
def test_steps_without_a_fault_pass(tmp_path):
    result = run_cpu_calls(CSRC, ADDRESS, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "name", "old", "new"), STEPS, ids=[f"{name}: {new or old}" for _, name, old, new in STEPS]
)
def test_a_fault_of_a_step_is_found(tmp_path, flags, name, old, new):
    shutil.copytree(CSRC, tmp_path / "csrc")
    changed = tmp_path / "csrc" / "cpu" / name
    text = changed.read_text()
    assert text.count(old) == 1
    changed.write_text(text.replace(old, new))
    assert run_cpu_calls(tmp_path / "csrc", flags, tmp_path).returncode != 0
