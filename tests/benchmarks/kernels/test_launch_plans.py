from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
import torch

from benchmarks.harness.results import read
from benchmarks.kernels import launch_plans
from coalescer_fast.ops import cuda_library
from coalescer_fast.ops.cuda_library import MODEL
from coalescer_fast.ops.kernels.group_norm_silu.native import cf_group_norm_silu_args

RESULTS = launch_plans.ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3" / "launch_plans.csv"
COSTS = np.array(launch_plans.costs_of_header())


@pytest.mark.skipif(bool(cuda_library.unavailable()), reason="no library of CUDA kernels")
def test_the_model_chooses_what_the_library_chooses():
    measured = launch_plans.times(read(RESULTS))
    assert len(measured) == len(launch_plans.CALLS) * len(launch_plans.BATCHES)
    for (name, n), plans in measured.items():
        call = launch_plans.CALLS[name]
        given = cf_group_norm_silu_args()
        sizes = {"n": n, "c1": call.channels, "c2": call.skip, "spatial": call.size**2, "groups": call.groups}
        skip = {"skip": 64} if call.skip else {}  # an address, that nothing reads
        for field, value in {**sizes, **skip, "dtype": 2, "channels_last": 1}.items():
            setattr(given, field, value)
        plan = cuda_library.plan("group_norm_silu", bytes(given), MODEL)
        table = np.array([each for each, _ in plans], float)
        few = (table[:, 0] == 2) & (table[:, 1] < 4)
        model = launch_plans.microseconds(table, COSTS) * np.where(few, launch_plans.UNMEASURED, 1)
        best = plans[int(model.argmin())][0]
        assert (best.launches, best.blocks) == (plan.launches, plan.blocks), name


def test_a_fit_is_no_worse_than_what_is_there(capsys):
    assert launch_plans.main(["--fit", str(RESULTS), "--draws", "20"]) == 0
    words, line = capsys.readouterr().out.splitlines()
    assert words.startswith("9028 plans of 212 calls: 1.0")
    costs = [float(number) for number in line.removeprefix("constexpr Costs COSTS = {").removesuffix("};").split(",")]
    plans, us, ends = launch_plans.arrays(read(RESULTS))
    loss = launch_plans.losses(plans, us, ends, np.array(costs))
    assert loss.min() == 1
    assert loss.mean() <= launch_plans.losses(plans, us, ends, COSTS).mean() + 0.005


def test_worse_costs_lose():
    plans, us, ends = launch_plans.arrays(read(RESULTS))
    worse = COSTS.copy()
    worse[5] /= 20  # two launches for next to nothing
    loss, of_worse = (launch_plans.losses(plans, us, ends, costs).mean() for costs in (COSTS, worse))
    assert of_worse > loss + 0.1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_program_compiles(tmp_path):
    source, csrc = launch_plans.ROOT / "benchmarks" / "kernels" / "launch_plans.cu", launch_plans.ROOT / "csrc"
    argv = [
        "nvcc",
        "-std=c++17",
        "-arch=sm_90",
        "-w",
        "-I",
        csrc / "cuda",
        "-I",
        csrc,
        "-o",
        tmp_path / "program",
        source,
    ]
    subprocess.run(argv, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu(capsys, tmp_path):
    assert launch_plans.main(["--csv", str(tmp_path / "F.csv")]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
