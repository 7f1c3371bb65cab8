"""What a call of native code costs, in three ways to pass the arguments of bias_residual.

    pip install apache-tvm-ffi
    python -m benchmarks.kernels.native_calls

All three end in the same kernel of the CPU library, on tensors of 1x8x2x2 in float32, with one thread:

- struct: what `coalescer_fast.ops` does, a structure packed in Python and a function called by ctypes;
- tvm_ffi: a C++ function that takes views of tensors, by Apache TVM FFI;
- stable: an op in C++ with torch's stable ABI, called by torch's dispatcher.

docs/design-notes.md says what follows from the figures.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coalescer_fast import ops
from coalescer_fast.ops import native_library
from coalescer_fast.ops.binding import NativeKernel
from coalescer_fast.ops.op import OPS

ROOT = Path(__file__).parents[2]
LIBRARY = native_library.FOLDER / "libcoalescer_fast_cpu.so"
ROUNDS, CALLS = 20, 5000

FILL = """
    cf_bias_residual_args a{};
    a.x = x.data_ptr(), a.y = y.data_ptr(), a.channels_last = channels_last, a.threads = threads;
    a.n = x.size(0), a.c = x.size(1), a.spatial = x.size(2) * x.size(3);
    if (residual) a.residual = residual.value().data_ptr();
    if (bias) a.bias = {bias.value().data_ptr(), CF_FLOAT32};
    cf_cpu_bias_residual(&a);
"""
TVM_FFI = """
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include "csrc/abi.h"
using tvm::ffi::Optional, tvm::ffi::TensorView;
void bias_residual(TensorView x, Optional<TensorView> bias, Optional<TensorView> residual, TensorView y,
                   bool channels_last, int64_t threads) { %s }
TVM_FFI_DLL_EXPORT_TYPED_FUNC(bias_residual, bias_residual);
"""
STABLE = """
#include <optional>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include "csrc/abi.h"
using torch::stable::Tensor;
Tensor bias_residual(const Tensor& x, std::optional<Tensor> bias, std::optional<Tensor> residual, bool channels_last,
                     int64_t threads) { Tensor y = torch::stable::empty_like(x); %s return y; }
STABLE_TORCH_LIBRARY(native_calls, m) {
    m.def("bias_residual(Tensor x, Tensor? bias, Tensor? residual, bool channels_last, int threads) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(native_calls, CompositeExplicitAutograd, m) {
    m.impl("bias_residual", TORCH_BOX(&bias_residual));
}
"""


def build(source: str, target: str, *flags: str) -> str:
    """Compile the C++ source into the shared library ``target``, linked to the CPU library."""
    standard = ("-O2", "-shared", "-fPIC", "-std=c++20", f"-I{ROOT}", "-x", "c++", "-", "-x", "none")
    command = ["c++", *standard, *flags, str(LIBRARY), f"-Wl,-rpath,{LIBRARY.parent}", "-o", target]
    subprocess.run(command, input=source % FILL, text=True, check=True)
    return target


def main() -> int:
    try:
        import tvm_ffi
    except ImportError:
        print("tvm_ffi is not installed: pip install apache-tvm-ffi", file=sys.stderr)
        return 2
    if reason := native_library.unavailable():
        print(reason, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    calls: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        config = [sys.executable, "-m", "tvm_ffi.config"]
        flags = [subprocess.run([*config, each], capture_output=True, text=True, check=True).stdout
                 for each in ("--cxxflags", "--ldflags", "--libs")]  # fmt: skip
        path = build(TVM_FFI, f"{folder}/tvm_ffi.so", *shlex.split(" ".join(flags).replace("-std=c++17", "")))
        by_tvm_ffi = tvm_ffi.load_module(path).bias_residual
        home = Path(torch.__file__).parent
        include = (f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include")
        torch.ops.load_library(build(STABLE, f"{folder}/stable.so", *include, f"-L{home}/lib", "-ltorch_cpu"))
        by_stable = torch.ops.native_calls.bias_residual.default

        x, residual = (torch.randn(1, 8, 2, 2).contiguous(memory_format=torch.channels_last) for _ in range(2))
        bias, column, y = torch.randn(8), torch.randn(1, 8, 1, 1), torch.empty_like(x)
        kernel = OPS["bias_residual"].implementation("cpu")
        assert isinstance(kernel, NativeKernel)
        launch = kernel.launcher(x, bias, residual)
        calls["empty_like, which each but the next has in it"] = lambda: torch.empty_like(x)
        calls["tvm_ffi into a given tensor"] = lambda: by_tvm_ffi(x, bias, residual, y, True, 1)
        calls["tvm_ffi"] = lambda: by_tvm_ffi(x, bias, residual, torch.empty_like(x), True, 1)
        calls["struct"] = lambda: launch(x, bias, residual)
        calls["stable"] = lambda: by_stable(x, bias, residual, True, 1)
        calls["ops.bias_residual: struct, and the look-up of the launcher"] = lambda: ops.bias_residual(
            x, bias, residual, backend="cpu"
        )
        calls["x + column + residual in torch"] = lambda: x + column + residual
        expected = ops.bias_residual(x, bias, residual, backend="reference")
        calls["tvm_ffi into a given tensor"]()
        for result in (y, calls["struct"](), calls["stable"]()):
            torch.testing.assert_close(result, expected)
        best = dict.fromkeys(calls, float("inf"))
        for _ in range(ROUNDS):
            for name, call in calls.items():
                best[name] = min(best[name], timeit.timeit(call, number=CALLS) / CALLS)
    for name, seconds in best.items():
        print(f"{1e6 * seconds:6.2f} us  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
