"""Every Triton kernel with every configuration of the table compiles for every target, within its limits: no GPU is
needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
from benchmarks.kernels import triton_aot, tune_triton

pytest.importorskip("triton")

ROOT = Path(benchmarks.__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
    "PYTHONPATH": str(ROOT)
}
# float32 on the target with the least shared memory alone, for time; `python -m benchmarks.kernels.triton_aot` compiles
# it for all
FEW, ALL = (("bfloat16", "120"),), (("bfloat16", "80,90,100,120"), ("float32", "120"))


@pytest.fixture(
    scope="module", params=[FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["one target", "all targets"]
)
def runs(request):
    return request.param


@pytest.fixture(scope="module")
def rows(runs, tmp_path_factory):
    rows = []
    for dtype, targets in runs:
        path = tmp_path_factory.mktemp("aot") / "rows.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.kernels.triton_aot",
            "--dtypes",
            dtype,
            "--targets",
            targets,
            "--json",
            str(path),
        ]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr
        rows += json.loads(path.read_text("utf-8"))
    return rows


def test_no_kernel_has_a_fault(rows):
    assert [
        (row["kernel"], row["target"], row["dtype"], row["call"], row["faults"]) for row in rows if row["faults"]
    ] == []


def test_every_configuration_is_compiled_for_every_target(rows, runs):
    compiled = {(tuple(row["key"]), row["target"]) for row in rows}
    wanted = {dtype: set(map(int, targets.split(","))) for dtype, targets in runs}
    for key in tune_triton.CANDIDATES:
        targets = wanted.get("float32" if "float32" in key else "bfloat16", set())
        assert {target for place, target in compiled if place == key} == targets


def test_kernels_that_stream_do_so_by_16_bytes(rows):
    """Said again from the machine code, which knows no lines of the source."""
    for row in rows:
        if row["kernel"] in triton_aot.STREAMS:
            assert row["load"] >= 128, row
        if row["kernel"] in ("apply_kernel", "bias_residual_kernel", "coalesce_step_kernel"):
            assert row["store"] >= 128, row


PLANTED = """
import json, sys, torch
from benchmarks.kernels import triton_aot, tune_triton

def compiled(key, configuration, op, *args):
    tune_triton.use(key, configuration)
    for launch in triton_aot.record(lambda: triton_aot.implementation(op)(*args)):
        if launch.key == key:
            return triton_aot.row(launch, "", "planted", int(sys.argv[1]))["faults"]

def tensor(*shape, memory_format=torch.contiguous_format, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)

x, odd = (tensor(1, channels, 64, 64, memory_format=torch.channels_last) for channels in (320, 321))
norm = (32, None, None, 1e-5, None, None, None, None, "silu")
pipeline = {"BLOCK_P": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 24}
heads = (tensor(4, 320, 3, 3), tensor(4), tensor(320), tensor(1), None, None)
tile = {"BLOCK_R": 64, "BLOCK_C": 64, "num_warps": 4}
statistics = ("group_norm_silu.statistics", "channels_last", "large")
print(json.dumps({
    "spills": compiled(statistics, tile | {"BLOCK_R": 256}, "group_norm_silu", x, *norm), "shared":
    compiled(("dual_head.heads", "half", "large"), pipeline, "dual_head", x, *heads), "narrow": compiled(statistics,
    tile, "group_norm_silu", tensor(1, 321, 64, 64, memory_format=torch.channels_last), 3, *norm[1:]), "odd":
    compiled(("bias_residual", "contiguous", "any"), tile, "bias_residual", tensor(1, 32, 5, 5), None, None),
}))
"""


def test_planted_faults_are_found():
    done = subprocess.run(
        [sys.executable, "-c", PLANTED, "120"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    faults = json.loads(done.stdout)
    assert "spills" in faults["spills"][0]
    assert "bytes of shared memory" in faults["shared"][0]
    assert "is accessed by 16 bits" in faults["narrow"][0]
    assert faults["narrow"][0].startswith("x:")
    assert {fault.partition(":")[0] for fault in faults["odd"]} == {"x", "y"}


def test_registers_of_a_program_are_limited():
    row = {
        "kernel": "",
        "target": 90,
        "spills": 0,
        "stack": 0,
        "shared": 0,
        "registers": 129,
        "threads": 512,
        "loads": {},
        "stores": {},
    }
    assert triton_aot.faults(row) == ["129 registers in 512 threads"]
    assert triton_aot.faults(row | {"registers": 128}) == []


def test_the_interpreter_is_no_compiler():
    command = [sys.executable, "-m", "benchmarks.kernels.triton_aot"]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "TRITON_INTERPRET is set: nothing is compiled in the interpreter; unset it\n"


ONES = """
import torch
from benchmarks.kernels import triton_aot

def tensor(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")

def compiled(op, *args):
    for launch in triton_aot.record(lambda: triton_aot.implementation(op)(*args)):
        triton_aot.compile_launch(launch, 90)

for c in (1, 8):
    x, v, film = tensor(1, c, 1, 1), tensor(c), tensor(1, c)
    weights = tensor(1, c, 3, 3), tensor(1), tensor(1, c), tensor(1)
    compiled("group_norm_silu", x, 1, v, v, 1e-5, film, film, None, v, "silu")
    compiled("group_norm_silu", x, 1, None, None, 1e-5, None, None, x, None, None)
    compiled("bias_residual", x, v, x)
    compiled("dual_head", x, *weights, None, None)
    compiled("dual_head", x, *weights, tensor(1, 1, 1, 1), tensor(1, 1, 1, 1))
    compiled("coalesce_step", x, x, tensor(1), 1.0, "unit", 1e-6)
"""


def test_sizes_of_one_compile():
    """The compiler takes an integer of 1 for a constant, which has no methods; the interpreter does not."""
    done = subprocess.run([sys.executable, "-c", ONES], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
