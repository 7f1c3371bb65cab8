"""What is particular to the native CPU kernels: instruction sets, threads, streaming stores, the library and its
interface."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coalescer_fast import ops
from coalescer_fast.ops import native_library
from coalescer_fast.ops.op import OPS

from ..helpers.isa import available
from ..helpers.numerics import FLOAT_AT_MOST_32, LAYOUTS, arrange, randn
from ..helpers.processes import python
from ..helpers.rules import bias_residual, coalesce_step, dual_head, group_norm_silu


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_processor_has_more_than_portable_code_and_the_best_is_chosen():
    assert native_library.isa() == available()[-1]
    flags = Path("/proc/cpuinfo")
    if flags.exists() and "avx2" in flags.read_text():
        assert native_library.isa() != "portable"


def test_avx_vnni_is_used_where_the_processor_has_it_alone():
    if "avx2_vnni" in available():
        assert "avx_vnni" in Path("/proc/cpuinfo").read_text()


def test_a_processor_without_avx_vnni_does_not_get_it():
    """valgrind's processor has AVX2, and nothing later."""
    if shutil.which("valgrind") is None or "avx2" not in available():
        pytest.skip("needs valgrind, and a processor with AVX2")
    code = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).cf_cpu_isa; f.restype = ctypes.c_char_p; print(f())"
    library = native_library.FOLDER / "libcoalescer_fast_cpu.so"
    command = ["valgrind", "-q", sys.executable, "-S", "-c", code, library]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == "b'avx2'\n"


def test_an_unknown_instruction_set():
    with pytest.raises(ValueError, match="isa is 'mmx'; expected one that this processor has"):
        native_library.set_isa("mmx")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_AT_MOST_32, ids=str)
@pytest.mark.parametrize(("channels", "groups"), [(3, 3), (20, 2), (64, 8), (70, 7)])
def test_every_instruction_set_normalises(isa, channels, groups, dtype, layout):
    """Vectors with and without a rest, more positions than a chunk, a seam inside a vector."""
    x, skip = (
        arrange(randn(2, c, 9, 8, dtype=dtype, seed=seed), layout) for seed, c in enumerate((channels, 2 * groups))
    )
    total = channels + 2 * groups
    film = {
        "scale": randn(2, total, seed=3),
        "shift": randn(2, total, seed=4),
        "pre_bias": randn(total, dtype=dtype, seed=5),
    }
    group_norm_silu.check("cpu", x, groups, randn(channels, seed=1), randn(channels, seed=2))
    group_norm_silu.check("cpu", x, groups, randn(total, seed=1), randn(total, seed=2), skip=skip, **film)
    group_norm_silu.check("cpu", arrange(1e3 + randn(2, channels, 9, 8), layout).to(dtype), groups, activation=None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_AT_MOST_32, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 40, 3, 3), (2, 3, 5, 19)], ids=str)
def test_every_instruction_set_adds(isa, shape, dtype, layout):
    x, other = (arrange(randn(*shape, dtype=dtype, seed=seed), layout) for seed in (0, 1))
    bias_residual.check("cpu", x, randn(shape[1], seed=2), other)
    bias_residual.check("cpu", x, None, other)


@pytest.mark.parametrize("dtype", FLOAT_AT_MOST_32, ids=str)
@pytest.mark.parametrize(
    ("channels", "latent", "size"), [(6, 3, (3, 5)), (40, 16, (9, 4)), (32, 5, (70, 3)), (1, 1, (1, 1))], ids=str
)
def test_every_instruction_set_has_two_heads(isa, channels, latent, size, dtype):
    points = [
        arrange(randn(2, latent, *size, seed=seed), layout)
        for seed, layout in ((1, "contiguous"), (2, "channels_last"))
    ]
    dual_head.check(
        "cpu",
        arrange(randn(2, channels, *size, dtype=dtype), "channels_last"),
        dual_head.parameters(channels, latent),
        *points,
    )


@pytest.mark.parametrize("mode", coalesce_step.MODES)
@pytest.mark.parametrize("dtype", FLOAT_AT_MOST_32, ids=str)
@pytest.mark.parametrize("shape", [(3,), (4, 5, 7), (3000,)], ids=str)
def test_every_instruction_set_steps(isa, shape, dtype, mode):
    coalesce_step.check("cpu", *coalesce_step.batch(shape=shape, dtype=dtype), mode=mode)


def test_silu_far_out(isa):
    x = torch.tensor(
        [-torch.inf, -1e30, -200.0, -104.0, -80.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 80.0, 200.0, 1e30, torch.nan]
    )
    # one group a value, whose normalised value is 0: shift is what SiLU sees
    result = ops.group_norm_silu(torch.zeros(1, len(x), 1), len(x), shift=x[None], backend="cpu").view(-1)
    expected = x.double() * torch.sigmoid(x.double())
    assert result[-1].isnan()
    torch.testing.assert_close(
        result[1:-1].double(), expected[1:-1], rtol=1e-6, atol=1e-30 if isa.startswith("avx512") else 1e-6
    )


def calls() -> dict[str, tuple[tuple, dict]]:
    """Calls that are large enough to be shared between threads."""
    cl = torch.channels_last
    x, skip = randn(3, 80, 40, 40).to(memory_format=cl), randn(3, 40, 40, 40, seed=1).to(memory_format=cl)
    point = randn(3, 4, 40, 40, seed=2)
    return {
        "group_norm_silu": ((x, 12), {"skip": skip, "scale": randn(3, 120, seed=3)}),
        "bias_residual": ((x, randn(80, seed=3), x), {}),
        "dual_head": ((x, *dual_head.parameters(80, 4)), {"sample": point, "anchor": point + 1}),
        "coalesce_step": ((randn(40, 1000), randn(40, 1000, seed=1), randn(40, seed=2)), {}),
    }


@pytest.mark.parametrize("op", calls())
def test_threads_do_not_change_a_bit(threads, op):
    args, kwargs = calls()[op]
    results = []
    for n in (1, 2, 2, 3, 16):
        threads(n)
        result = getattr(ops, op)(*args, **kwargs, backend="cpu")
        results.append(result if isinstance(result, tuple) else (result,))
    for result in results[1:]:
        for one, other in zip(results[0], result):
            assert torch.equal(one, other)


def test_without_an_openmp_runtime_everything_runs_on_the_calling_thread():
    args, kwargs = calls()["group_norm_silu"]
    expected = ops.group_norm_silu(*args, **kwargs, backend="cpu")
    native, _ = native_library._load()
    native.cf_cpu_set_openmp(None, None, None)
    try:
        assert torch.equal(ops.group_norm_silu(*args, **kwargs, backend="cpu"), expected)
    finally:
        native.cf_cpu_set_openmp(*native_library._openmp())


def test_there_is_one_openmp_runtime_in_the_process_and_it_is_used(tmp_path):
    assert all(pointer for pointer in native_library._openmp())
    code = """
import torch, threadpoolctl
from coalescer_fast import ops
x = torch.randn(4, 64, 64, 64)
ops.group_norm_silu(x, 8, backend="cpu"), torch.nn.functional.silu(x)
print(len({i["filepath"] for i in threadpoolctl.threadpool_info() if i["user_api"] == "openmp"}))
"""
    assert python(code, tmp_path).split() == ["1"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOAT_AT_MOST_32, ids=str)
def test_results_larger_than_the_last_level_cache_are_written_past_it(dtype, layout):
    """Streaming stores and huge pages: 68 MB, more than the caches of most processors."""
    x = arrange(randn(1, 64, 416, 640 * (1 if dtype.itemsize == 4 else 2), dtype=dtype), layout)
    weight, bias = randn(64, seed=1), randn(64, seed=2)
    result, plain = (ops.group_norm_silu(x, 4, weight, bias, backend=backend) for backend in ("cpu", "reference"))
    truth = ops.group_norm_silu(x.double(), 4, weight.double(), bias.double(), backend="reference")
    ulp = torch.finfo(dtype).eps * float(truth.abs().max())
    assert (result.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + ulp
    added = ops.bias_residual(x, bias, x, backend="cpu")
    truth = x.double() * 2 + bias.view(-1, 1, 1).double()
    assert (added.double() - truth).abs().max() <= torch.finfo(dtype).eps * float(truth.abs().max())


def test_many_shapes_leave_memory_flat(tmp_path):
    code = """
import resource, torch
from coalescer_fast import ops
def loop(n):
    for i in range(n):
        ops.group_norm_silu(torch.randn(1 + i % 3, 8 + 4 * (i % 17), 5 + i % 23, 7), 4, backend="cpu")
loop(300)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loop(3000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(python(code, tmp_path)) < 4096  # kilobytes


def test_a_missing_library_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(native_library, "FOLDER", tmp_path)
    load = native_library._load.__wrapped__
    assert load()[1] == (
        f"the library of CPU kernels is not there: {tmp_path.parent} is a checkout that nothing was built in; "
        f"run `python setup.py build_native` or `pip install -e .` in {tmp_path.parents[1]}"
    )
    (tmp_path / "build.json").write_text(json.dumps({"cpu": "there is no C++ compiler: install g++ or set CXX"}))
    assert "there is no C++ compiler: install g++ or set CXX; install coalescer_fast again" in load()[1]
    (tmp_path / "libcoalescer_fast_cpu.so").write_bytes(b"not a library")
    assert "libcoalescer_fast_cpu.so cannot be loaded: " in load()[1]


def test_a_library_of_another_interface_is_refused(monkeypatch):
    version = native_library.ABI_VERSION
    monkeypatch.setattr(native_library, "ABI_VERSION", 99)
    assert (
        f"has interface version {version}; expected 99: install coalescer_fast again"
        in native_library._load.__wrapped__()[1]
    )


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if "cpu" in op.implementations])
def test_the_interface_refuses_a_dtype_that_does_not_exist(op):
    struct = OPS[op].implementation("cpu").binding.struct
    with pytest.raises(RuntimeError, match="reports an argument that it does not take"):
        native_library.function(f"cf_cpu_{op}")((9).to_bytes(8, "little") * len(struct.leaves()))
