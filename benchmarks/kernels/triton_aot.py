"""Compiles the Triton kernels ahead of time, without a GPU, and reports what each needs of one.

    python -m benchmarks.kernels.triton_aot [--targets 80,90] [--dtypes bfloat16,float32] [--all-flags] [--json FILE]

The ops themselves say what they would launch: they are called on tensors of the meta device, each launch is noted down
instead of made, and compiled with the specialisation that the just-in-time compiler would derive from its arguments. A
row is one kernel with one configuration of `triton_configs.json`, one set of dtypes, layout and flags, on one target:

- shared: bytes of shared memory; registers: of a thread; stack: bytes of a thread's stack
- spills: local loads and stores in the machine code
- load, store: bits of the widest global access in the machine code
- loads, stores: bits of the widest access that each line of the kernel's source became
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from coalescer_fast.ops import gate, triton_launch
from coalescer_fast.ops.abi import cf_function

# what lies in Triton's cache has the source paths of another checkout
os.environ.setdefault("TRITON_ALWAYS_COMPILE", "1")

OPS = ("group_norm_silu", "dual_head", "bias_residual", "coalesce_step", "gate")
TARGETS = (80, 90, 100, 120)
# what a program may have of shared memory, kilobytes (CUDA C++ Programming Guide, table of compute capabilities)
SHARED = {80: 163, 90: 227, 100: 227, 120: 99}
# the tensors that a kernel reads whole, by the names of its pointers: these loads must be 16 bytes wide
STREAMS = {
    "statistics_kernel": ("x", "skip"),
    "apply_kernel": ("x", "skip", "out"),
    "bias_residual_kernel": ("x", "residual", "y"),
    "coalesce_step_kernel": ("sample", "direction", "moved"),
    "heads_kernel": ("h", "direction_weight"),
    "gate_kernel": ("x", "y"),
}


class Launch(NamedTuple):
    """What an op would launch: the kernel, its arguments, its block sizes and the compiler's options, and their place
    in the table."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    key: tuple[str, str, str]

    @property
    def constants(self) -> dict[str, Any]:
        """The options that are the kernel's own."""
        return {name: value for name, value in self.options.items() if name in self.kernel.arg_names}


def record(call: Callable[[], Any]) -> list[Launch]:
    """The launches that ``call`` would make on a GPU with 132 multiprocessors."""
    launches: list[Launch] = []
    key = ("", "", "")

    def look_up(*place: str) -> dict[str, int]:
        nonlocal key
        key = place  # type: ignore[assignment]
        return triton_launch.configuration(*place)

    def note(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
        launches.append(Launch(kernel, args, options, key))

    with ExitStack() as stack:
        for op in OPS:
            stack.enter_context(mock.patch(f"coalescer_fast.ops.kernels.{op}.triton.launch", note))
            stack.enter_context(mock.patch(f"coalescer_fast.ops.kernels.{op}.triton.configuration", look_up))
        stack.enter_context(
            mock.patch("coalescer_fast.ops.kernels.group_norm_silu.triton.multiprocessors", return_value=132)
        )
        call()
    return launches


def calls(
    dtype: torch.dtype, all_flags: bool = False, device: str = "meta"
) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Calls that between them reach every configuration: what is called, the op, and its arguments but the backend, in
    canonical order.

    With the most demanding flags, or with every set of flags that a UNet uses.
    """

    def tensor(*shape: int, channels_last: bool = False, dtype: torch.dtype = dtype) -> torch.Tensor:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format).normal_()

    for layout in ("channels_last", "contiguous"):
        nhwc = layout == "channels_last"
        for side, n, channels, groups in ((8, 1, 96, 8), (64, 1, 320, 32)):
            c = 2 * channels
            film = (tensor(n, 2 * c)[:, :c], tensor(n, 2 * c)[:, c:])
            x = tensor(n, channels, side, side, channels_last=nhwc)
            affine = (tensor(c), tensor(c))
            flags: dict[str, Any] = {
                "skip, film, pre_bias, silu": (x, groups, *affine, 1e-5, *film, x, tensor(c), "silu")
            }
            if all_flags:
                one = tensor(n, c, side, side, channels_last=nhwc)
                flags |= {
                    "silu": (one, groups, *affine, 1e-5, None, None, None, None, "silu"),
                    "skip, silu": (x, groups, *affine, 1e-5, None, None, x, None, "silu"),
                    "film, pre_bias, silu": (one, groups, *affine, 1e-5, *film, None, tensor(c), "silu"),
                    "": (one, groups, *affine, 1e-6, None, None, None, None, None),
                    "one group": (one, 1, *affine, 1e-5, None, None, None, None, "silu"),
                    "C groups": (one, c, *affine, 1e-5, None, None, None, None, "silu"),
                }
            for name, args in flags.items():
                yield f"{layout} {side}x{side} {name}", "group_norm_silu", args
        x = tensor(2, 320, 64, 64, channels_last=nhwc)
        yield layout, "bias_residual", (x, tensor(320), x)
        if all_flags:
            yield f"{layout} residual", "bias_residual", (x, None, x)
            yield f"{layout} bias", "bias_residual", (x, tensor(320), None)
        for side, channels, latent in ((8, 96, 16), (64, 320, 4)):
            h = tensor(2, channels, side, side, channels_last=nhwc)
            weights = (
                tensor(latent, channels, 3, 3, channels_last=True),
                tensor(latent),
                tensor(1, channels),
                tensor(1),
            )
            point = tensor(2, latent, side, side, channels_last=nhwc, dtype=torch.float32)
            yield f"{layout} {side}x{side} anchor", "dual_head", (h, *weights, point, point + 1)
            if all_flags:
                yield f"{layout} {side}x{side}", "dual_head", (h, *weights, None, None)
    for shape in ((4, 16, 8, 8), (4, 4, 32, 32), (4, 4, 64, 64)):
        r, direction, distance = tensor(*shape, dtype=torch.float32), tensor(*shape), tensor(4, dtype=torch.float32)
        for mode in ("unit", "raw") if all_flags else ("unit",):
            yield f"{'x'.join(map(str, shape[1:]))} {mode}", "coalesce_step", (r, direction, distance, 1.0, mode, 1e-6)

    rows = tensor(2, 4096, 2 * 1280)
    for function in gate.FUSED if all_flags else (cf_function.CF_GELU,):
        yield function.name, "gate", (rows, 0, 1280, 1280, function)


def implementation(op: str, file: str = "triton") -> Callable[..., Any]:
    """The op's function in that file of its folder."""
    return getattr(importlib.import_module(f"coalescer_fast.ops.kernels.{op}.{file}"), op)


def specialise(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes of the launch, as the just-in-time compiler derives them."""
    types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    values = dict(zip(launch.kernel.arg_names, launch.args)) | launch.constants
    for parameter in launch.kernel.params:
        name, value = parameter.name, values[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and free):
            signature[name], constants[parameter.num,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = types[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[parameter.num,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if free and value % 16 == 0:
                attributes[parameter.num,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, target: int) -> Any:
    """The compiled kernel of a launch, for compute capability target / 10."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constexprs, attrs = specialise(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    compiler = {name: value for name, value in launch.options.items() if name not in launch.constants}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=compiler)


def widths(ptx: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bits of the widest global load and store that each line "file:line" of the source became."""
    files = {number: path for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.MULTILINE)}
    loads: dict[str, int] = {}
    stores: dict[str, int] = {}
    where = ""
    for line in ptx.splitlines():
        if found := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            where = f"{files[found[1]]}:{found[2]}"
        elif found := re.search(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", line):
            into, bits = loads if found[1] == "ld" else stores, int(found[2] or 1) * int(found[3])
            into[where] = max(into.get(where, 0), bits)
        elif found := re.search(r"\bcp\.async\.c[ag]\.shared\.global.*?\],\s*\[.*?\],\s*(0x[0-9a-f]+|\d+)", line):
            loads[where] = max(loads.get(where, 0), 8 * int(found[1], 0))
    return loads, stores


def pointer(where: str) -> str:
    """The name of the pointer that the load or store in that line of the source goes through."""
    path, _, number = where.rpartition(":")
    lines = Path(path).read_text("utf-8").splitlines()[int(number) - 1 :]
    found = re.search(r"tl\.(?:load|store)\(\s*(\w+)", " ".join(lines[:3])) if lines else None
    return found[1] if found else ""


def inspect(kernel: Any) -> dict[str, Any]:
    """What the compiled kernel needs, from its machine code."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", "-sass", str(path)], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text[:1000]

    def widest(instruction: str) -> int:
        """LDG.E.128 and the like; LDGSTS copies to shared memory."""
        found = re.findall(rf"\b{instruction}((?:\.\w+)*) ", text)
        sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
        return max(
            (max([sizes[part] for part in suffix.split(".") if part in sizes], default=32) for suffix in found),
            default=0,
        )

    loads, stores = widths(kernel.asm["ptx"])
    return {
        "shared": kernel.metadata.shared,
        "threads": 32 * kernel.metadata.num_warps,
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "load": max(widest("LDG"), widest("LDGSTS")),
        "store": widest("STG"),
        "loads": {f"{pointer(where)}:{where.rpartition(':')[2]}": bits for where, bits in loads.items()},
        "stores": {f"{pointer(where)}:{where.rpartition(':')[2]}": bits for where, bits in stores.items()},
    }


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with the kernel of a row: spilled registers, too much of a resource, main accesses narrower than 16
    bytes."""
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"{row['spills']} spills, {row['stack']} bytes of stack")
    if row["shared"] > SHARED[row["target"]] * 1024:
        found.append(f"{row['shared']} bytes of shared memory")
    # registers are given out to warps in units of 8 a thread
    if -(-row["registers"] // 8) * 8 * row["threads"] > 65536:
        found.append(f"{row['registers']} registers in {row['threads']} threads")
    streams = STREAMS.get(row["kernel"], ())
    for name, bits in (*row["loads"].items(), *row["stores"].items()):
        if name.partition(":")[0] in streams and bits < 128:
            found.append(f"{name} is accessed by {bits} bits")
    reached = {name.partition(":")[0] for name in (*row["loads"], *row["stores"])}
    if streams and streams[0] not in reached:
        found.append(f"no load of {streams[0]}")
    return found


def row(launch: Launch, dtype: str, call: str, target: int) -> dict[str, Any]:
    """Compile the launch and say what became of it."""
    what = {
        "kernel": launch.kernel.__name__,
        "key": launch.key,
        "dtype": dtype,
        "call": call,
        "options": launch.options,
        "target": target,
    }
    result = what | inspect(compile_launch(launch, target))
    return result | {"faults": faults(result)}


def report(targets: tuple[int, ...], dtypes: tuple[str, ...], all_flags: bool = False) -> Iterator[dict[str, Any]]:
    """The rows, compiled one after another; what several calls launch alike is compiled once."""
    seen = set()
    for dtype in dtypes:
        for call, op, args in calls(getattr(torch, dtype), all_flags):
            for launch in record(functools.partial(implementation(op), *args)):
                key = (launch.kernel.__name__, str(specialise(launch)), str(launch.options))
                if key not in seen:
                    seen.add(key)
                    yield from (row(launch, dtype, call, target) for target in targets)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.triton_aot", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)), help="compute capabilities times ten")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of the activations")
    parser.add_argument("--all-flags", action="store_true", help="not only the most demanding set of flags")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET is set: nothing is compiled in the interpreter; unset it", file=sys.stderr)
        return 2
    rows = []
    print(
        f"{'kernel':22} {'target':>6} {'dtype':9} {'shared':>6} {'regs':>4} {'spills':>6} "
        f"{'load':>4} {'store':>5}  call"
    )
    for each in report(
        tuple(map(int, arguments.targets.split(","))), tuple(arguments.dtypes.split(",")), arguments.all_flags
    ):
        rows.append(each)
        cells = f"{each['kernel']:22} {each['target']:6} {each['dtype']:9} {each['shared']:6} "
        cells += f"{each['registers']:4} {each['spills']:6}"
        print(f"{cells} {each['load']:4} {each['store']:5}  {each['call']}", *each["faults"], sep="  ! ", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return 1 if any(each["faults"] for each in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
