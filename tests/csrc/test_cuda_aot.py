"""Every CUDA kernel compiles for every target, within its limits, and planted faults are found: no GPU is needed."""

from __future__ import annotations

import json
import re
import sys

import pytest

from benchmarks.kernels import cuda_aot
from coalescer_fast.ops import cuda_library, native_library

needs_nvcc = pytest.mark.skipif(bool(cuda_aot.missing()), reason=cuda_aot.missing() or "can run")


@pytest.fixture(scope="module", params=[(90,), pytest.param(cuda_aot.TARGETS, marks=pytest.mark.slow)], ids=str)
def targets(request):
    """One target takes a quarter of the time of all."""
    return request.param


@pytest.fixture(scope="module")
def rows(targets):
    return list(cuda_aot.report(targets))


@needs_nvcc
def test_no_kernel_has_a_fault(rows):
    found = [
        (row["kernel"], row["types"], row["vector"], row["layout"], row["target"], row["faults"])
        for row in rows
        if row["faults"]
    ]
    assert found == []


@needs_nvcc
def test_every_kernel_is_there_for_every_target(rows, targets):
    sources = "".join(path.read_text("utf-8") for path in (cuda_aot.ROOT / "csrc" / "cuda").glob("*.cu"))
    names = re.findall(r"__global__ void __launch_bounds__\([^)]*\)\s+(\w+)\(", sources)
    assert len(names) == sources.count("__global__")
    assert {(row["kernel"], row["target"]) for row in rows} == {(name, target) for name in names for target in targets}


@needs_nvcc
def test_every_kernel_that_streams_has_vectors_of_every_type(rows, targets):
    types = {(row["kernel"], row["target"], row["types"][0]) for row in rows if row["vector"] > 1}
    assert types == {
        (name, target, dtype) for name in cuda_aot.STREAMS for target in targets for dtype in cuda_aot.TYPES.values()
    }


@needs_nvcc
def test_planned_launches_are_possible(rows, targets):
    if reason := native_library.find("cuda", cuda_library.PATH)[1]:
        pytest.skip(reason)
    launches = list(cuda_aot.plans(targets, cuda_aot.bounds(rows)))
    assert [(row["call"], row["dtype"], row["target"], row["faults"]) for row in launches if row["faults"]] == []
    assert {row["cluster"] for row in launches if row["target"] == 80} <= {1}
    assert max(row["cluster"] for row in launches if row["target"] == 90) > 1
    assert {row["vector"] for row in launches if row["call"].startswith("l ")} == {4, 8}


PLANTED = """
template <typename T, int V> struct Vector { using type = T; };
template <> struct Vector<float, 4> { using type = float4; };

template <typename T, int V>
__global__ void __launch_bounds__(256) bias_residual(const T* x, T* y) {  // eight vectors, if they are such
    using Raw = typename Vector<T, V>::type;
    const Raw* from = reinterpret_cast<const Raw*>(x) + 8 * (blockIdx.x * 256 + threadIdx.x);
    Raw* to = reinterpret_cast<Raw*>(y) + 8 * (blockIdx.x * 256 + threadIdx.x);
    Raw held[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) held[i] = from[i];
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = held[7 - i];
}
template __global__ void bias_residual<float, 4>(const float*, float*);  // good
template __global__ void bias_residual<int, 4>(const int*, int*);        // by 32 bits

extern "C" __global__ void __launch_bounds__(256) local(const float* x, float* y, const int* at) {
    float held[16] = {};
    for (int i = 0; i < 64; ++i) held[at[i]] += x[i];
    for (int i = 0; i < 64; ++i) y[i] = held[at[64 + i]];
}

extern "C" __global__ void __launch_bounds__(1024, 2) spills(const float* x, float* y) {
    float held[96], sum = 0;
#pragma unroll
    for (int i = 0; i < 96; ++i) held[i] = x[i * 1024 + threadIdx.x], sum += held[i];
#pragma unroll
    for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = held[i] * sum;
}

extern "C" __global__ void unbounded(const float* x, float* y) {
    float held[96], sum = 0;
#pragma unroll
    for (int i = 0; i < 96; ++i) held[i] = x[i * 1024 + threadIdx.x], sum += held[i];
#pragma unroll
    for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = held[i] * sum;
}
"""


@needs_nvcc
def test_planted_faults_are_found(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED, "utf-8")
    rows = list(cuda_aot.report((90,), [source]))
    good, narrow = sorted(
        (row for row in rows if row["kernel"] == "bias_residual"), key=lambda row: row["types"], reverse=True
    )
    assert (good["types"], good["vector"], good["threads"], good["faults"]) == (["float32"], 4, 256, [])
    assert narrow["faults"] == ["0 loads of 128 bits, not 8", "8 stores of 32 bits"]
    local, spills, unbounded = (
        next(row for row in rows if row["kernel"] == name) for name in ("local", "spills", "unbounded")
    )
    assert local["stack"] > 0
    assert local["local"] > 0
    assert "of stack" in local["faults"][0]
    assert spills["spills"] > 0
    assert "bytes of spills" in spills["faults"][0]
    assert unbounded["faults"] == [f"{unbounded['registers']} registers in 1024 threads"]


@needs_nvcc
def test_what_does_not_compile_is_said(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { nonsense(); }\n", "utf-8")
    with pytest.raises(RuntimeError, match=r"nvcc cannot compile broken\.cu for sm_90: .*nonsense"):
        list(cuda_aot.report((90,), [source]))


ROW = {
    "kernel": "coalesce_step", "types": ["bfloat16", "bfloat16"], "vector": 8, "target": 90,
    "registers": 128, "threads": 512, "spills": 0, "stack": 0, "local": 0, "loads": {128: 7, 16: 1}, "copies": {},
    "stores": {128: 3}, "cluster_barriers": 4, "unpaired": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"vector": 1, "loads": {16: 8}, "stores": {16: 3}, "unpaired": 3}, []),
        ({"loads": {256: 7}, "stores": {256: 3}}, []),
        ({"registers": 129}, ["129 registers in 512 threads"]),
        ({"local": 2}, ["0 bytes of spills, 0 of stack, 2 local accesses"]),
        ({"loads": {128: 4, 64: 6}}, ["4 loads of 128 bits, not 7"]),
        ({"stores": {128: 2, 64: 2}}, ["2 stores of 64 bits"]),
        ({"stores": {}}, ["no stores"]),
        ({"unpaired": 8}, ["8 conversions of single numbers"]),
        ({"cluster_barriers": 0}, ["0 cluster barriers"]),
        ({"target": 80}, ["4 cluster barriers"]),
        ({"target": 80, "cluster_barriers": 0}, []),
        ({"kernel": "group_norm_fused", "copies": {32: 4}}, ["0 copies of 128 bits, not 1"]),
        ({"kernel": "dual_head_heads", "loads": {128: 18}, "stores": {16: 1}, "cluster_barriers": 0}, []),
    ],
)
def test_faults(change, found):
    assert cuda_aot.faults(ROW | change) == found


def test_faults_of_plans():
    row = {"target": 120, "shared_memory": 99 * 1024, "threads": 512, "cluster": 8}
    assert cuda_aot.plan_faults(row, 512) == []
    assert cuda_aot.plan_faults(row, 256) == ["threads is 512, at most 256 can be"]
    assert cuda_aot.plan_faults(row | {"shared_memory": 99 * 1024 + 1}, 512) == [
        "shared_memory is 101377, at most 101376 can be"
    ]
    assert cuda_aot.plan_faults(row | {"target": 80}, 512) == ["cluster is 8, at most 1 can be"]


@pytest.mark.parametrize(("stores", "status"), [(128, 0), (32, 1)])
def test_the_command_fails_for_a_fault(monkeypatch, tmp_path, capsys, stores, status):
    row = ROW | {"layout": "", "stores": {stores: 3}}
    monkeypatch.setattr(cuda_aot, "report", lambda targets: [row | {"faults": cuda_aot.faults(row)}])
    monkeypatch.setattr(cuda_aot, "missing", lambda targets: "")
    monkeypatch.setattr(cuda_aot.native_library, "find", lambda *args: (None, "it is not built"))
    monkeypatch.setattr(sys, "argv", ["cuda_aot", "--json", str(tmp_path / "rows.json")])
    assert cuda_aot.main() == status
    assert [row["kernel"] for row in json.loads((tmp_path / "rows.json").read_text("utf-8"))["kernels"]] == [
        "coalesce_step"
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("bfloat16 bfloat16 x8 " + (f"  ! 3 stores of {stores} bits" if status else ""))
    assert lines[2] == "no planned launches: the library of CUDA kernels is not built"


def test_names():
    space = "_ZN2cf4step39_GLOBAL__N__59e33f1a_7_step_cu_bf9ab12d"
    assert cuda_aot.demangle(f"{space}13coalesce_stepI6__halfS3_Li8EEEvNS1_4CallE") == (
        "coalesce_step",
        ["__half", "__half", "8"],
    )
    assert cuda_aot.demangle(f"{space}13coalesce_stepIf13__nv_bfloat16Li1EEEvNS1_4CallE") == (
        "coalesce_step",
        ["f", "__nv_bfloat16", "1"],
    )
    assert cuda_aot.demangle(f"{space}13coalesce_stepIffLi1ELb1EEEvNS1_4CallE") == (
        "coalesce_step",
        ["f", "f", "1", "1"],
    )
    assert cuda_aot.demangle(f"{space}6finishENS1_4CallE") == ("finish", [])
    assert cuda_aot.demangle("_Z4heldPKf") == ("held", [])
    assert cuda_aot.demangle("plain") == ("plain", [])


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4headf' for 'sm_80'
ptxas info    : Function properties for _Z4headf
    8 bytes stack frame, 4 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 8 bytes cumulative stack size, 688 bytes cmem[0]
ptxas info    : Compile time = 114.699 ms
ptxas info    : Compiling entry function '_Z4stepf' for 'sm_80'
ptxas info    : Function properties for _Z4stepf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 56 registers, 592 bytes cmem[0]
"""


def test_what_the_compiler_says():
    assert cuda_aot.compiler_says(LOG) == {
        "_Z4headf": {"spills": 68, "barriers": 1},
        "_Z4stepf": {"spills": 0, "barriers": 0},
    }


def test_accesses_by_their_bits():
    opcodes = (
        "LDG.E",
        "LDG.E.U16.CONSTANT",
        "LDG.E.LTC128B.128",
        "LDG.E.64",
        "LDG.E.64.STRONG.GPU",
        "LDGSTS.E.BYPASS.128",
        "STG.E.U8",
    )
    assert cuda_aot.access([(opcode, "") for opcode in opcodes], "LDG") == {32: 1, 16: 1, 128: 1, 64: 2}
    assert cuda_aot.access([(opcode, "") for opcode in opcodes], "LDGSTS") == {128: 1}
    assert cuda_aot.access([(opcode, "") for opcode in opcodes], "STG") == {8: 1}
