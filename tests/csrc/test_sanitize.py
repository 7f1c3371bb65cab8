"""The native kernels under the sanitizers; the scripts here are for hand use as well."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler"),
]

# Ways that the calls of the CUDA kernels must have gone without sanitizers.
WAYS = [
    *(f"bias_residual: {layout}, vectors of {v}" for layout in ("contiguous", "channels last") for v in (1, 4, 8)),
    *(f"group_norm_silu: {layout}, vectors of {v}" for layout in ("contiguous", "channels last") for v in (1, 4, 8)),
    *(f"group_norm_silu: cluster of {blocks}" for blocks in (1, 2, 4, 8)),
    *(f"group_norm_silu: 2 launches, {slots} slots a group" for slots in ("1", "2 to 4", "many")),
    *(f"group_norm_silu: {of} channels a group" for of in (" 3", "10", "12", "30")),
    "group_norm_silu: groups that begin within a vector",
    "group_norm_silu: groups wider than a tile",
    *(f"coalesce_step: cluster of {blocks}" for blocks in (1, 2, 3, 8)),
    *(f"coalesce_step: raw, {blocks}" for blocks in ("one block", "many blocks")),
    *(f"coalesce_step: vectors of {v}" for v in (1, 8)),
    *(
        f"dual_head: {kind}, {blocks}"
        for kind in ("anchored", "not anchored")
        for blocks in ("one block", "many blocks")
    ),
    *(f"dual_head: vectors of {v}" for v in (1, 4)),
]


def run(script: str, rounds: int) -> str:
    result = subprocess.run(
        ["bash", Path(__file__).with_name(script), str(rounds)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_random_calls_are_clean():
    assert run("sanitize.sh", 15).count("portable: 15 rounds") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the emulation runs on Linux")
def test_random_cuda_calls_are_clean():
    output = run("sanitize_cuda.sh", 60)
    assert re.findall(r"^\d+ rounds$", output, re.MULTILINE) == ["240 rounds", "240 rounds", "60 rounds"]
    reached = re.findall(r"^ *\d+ (.*)$", output[: output.index("== address")], re.MULTILINE)
    assert not set(WAYS) - set(reached)
