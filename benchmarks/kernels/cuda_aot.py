"""Compiles the CUDA kernels ahead of time, without a GPU, and reports what each needs of one.

    python -m benchmarks.kernels.cuda_aot [--targets 80,90,100,120] [--json FILE]

Needs nvcc, and a cuobjdump: the toolkit's, or the one that Triton brings. A row is one instantiation of a kernel on one
target:

- threads: the launch bound; registers, stack (bytes): of a thread; spills: bytes that are stored and loaded
- local: local loads and stores in the machine code; barriers: of a block
- shared: bytes of static shared memory, with the 1024 that the system has for itself in some kernels from sm_90 on
- loads, copies, stores: global loads, asynchronous copies to shared memory and stores in the machine code, by their
  bits
- cluster_barriers: in the machine code; unpaired: conversions to half precision of a single number

With the library of CUDA kernels built, the launches that it plans for the networks' own calls are checked too.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from coalescer_fast import ops
from coalescer_fast.ops import cuda_library, native_library
from coalescer_fast.ops.binding import NativeKernel
from coalescer_fast.ops.op import OPS

from . import shapes
from .triton_aot import SHARED, TARGETS

ROOT = Path(__file__).parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")  # how the package compiles them
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}  # A100, H100, B200, RTX 5090
TYPES = {"f": "float32", "__half": "float16", "__nv_bfloat16": "bfloat16"}
BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
# Kernels that read whole tensors: how, in how many places of the source (loops over constants unrolled), and whether
# they store such tensors alone. In instantiations for vectors these accesses must have 128 bits, or those of the whole
# vector.
STREAMS = {
    "group_norm_statistics": ("loads", 2, False),
    "group_norm_apply": ("loads", 2, True),
    "group_norm_fused": ("copies", 1, True),
    "bias_residual": ("loads", 8, True),
    "coalesce_step": ("loads", 7, True),
    "dual_head_heads": ("loads", 18, False),
}
CLUSTERS = ("group_norm_fused", "coalesce_step")


def cuobjdump() -> str:
    """Its path, or ""."""
    if found := shutil.which(
        "cuobjdump", path=f"{Path(SETUP['nvcc']()).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    ):
        return found
    try:
        import triton

        return triton.knobs.nvidia.cuobjdump.path
    except (ImportError, RuntimeError):
        return ""


def missing(targets: Sequence[int] = TARGETS) -> str:
    """Why kernels cannot be compiled for the targets, or not be read, here, or ""."""
    if not (nvcc := SETUP["nvcc"]()):
        return "there is no nvcc: install the CUDA toolkit, or set CUDA_HOME"
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    if unknown := [f"sm_{target}" for target in targets if f"sm_{target}" not in known]:
        return f"nvcc does not know {', '.join(unknown)}: install a newer CUDA toolkit"
    return "" if cuobjdump() else "there is no cuobjdump: install it with the CUDA toolkit, or Triton, which brings one"


def take(text: str) -> tuple[str, str]:
    """The name that the text begins with, after its length, and what follows; "" if there is none."""
    digits = re.match(r"\d*", text)[0]  # type: ignore[index]
    end = len(digits) + int(digits or 0)
    return text[len(digits) : end], text[end:]


def demangle(symbol: str) -> tuple[str, list[str]]:
    """A kernel's name without its namespaces, and its template arguments: types and integers (Itanium C++ ABI)."""
    rest, name = re.sub("^_ZN?", "", symbol), ""
    arguments: list[str] = []
    while (found := take(rest))[0]:
        name, rest = found
    rest = rest[1:] if name and rest[:1] == "I" else "E"
    while rest[:1] != "E":
        if literal := re.match(r"L[a-z](\d+)E", rest):
            argument, rest = literal[1], rest[literal.end() :]
        elif again := re.match(r"S\w*?_", rest):  # the class that was named before
            argument, rest = arguments[-1], rest[again.end() :]
        else:
            argument, rest = take(rest) if rest[0].isdigit() else (rest[0], rest[1:])
        arguments.append(argument)
    return name or symbol, arguments


def compiler_says(log: str) -> dict[str, dict[str, int]]:
    """By symbol, what ptxas -v says of a kernel and the functions that it calls."""
    said = {}
    for text in log.split("Compiling entry function '")[1:]:
        barriers = re.search(r"used (\d+) barriers", text)
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        said[text.partition("'")[0]] = {"spills": spills, "barriers": int(barriers[1]) if barriers else 0}
    return said


def access(instructions: list[tuple[str, str]], name: str) -> dict[int, int]:
    """Bits of the accesses by such instructions, LDG.E.128 and the like, and how many there are of each."""
    sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    suffixes = [opcode.split(".")[1:] for opcode, _ in instructions if opcode.partition(".")[0] == name]
    return dict(Counter(next((sizes[part] for part in suffix if part in sizes), 32) for suffix in suffixes))


def compile_one(source: Path, target: int) -> list[dict[str, Any]]:
    """The rows of a source's kernels. Raises RuntimeError if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/kernels.cubin"
        command = [
            SETUP["nvcc"](),
            *SETUP["NVCC_FLAGS"],
            "-Xptxas=-v",
            f"-arch=sm_{target}",
            "-cubin",
            str(source),
            "-o",
            cubin,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"nvcc cannot compile {source.name} for sm_{target}: {done.stderr.strip() or done.stdout.strip()}"
            )
        text = subprocess.run(
            [cuobjdump(), "-res-usage", "-elf", "-sass", cubin], capture_output=True, text=True, check=True
        ).stdout
    said, rows = compiler_says(done.stderr), []
    sections = re.findall(r"^\.nv\.info\.(\S+)\n((?:\t.*\n)*)", text, re.MULTILINE)
    bounds = {
        symbol: re.search(r"MAX_THREADS\n.*\n\s*Value:\s*(\w+) (\w+) (\w+)", information)
        for symbol, information in sections
    }
    usages = {
        symbol: map(int, usage)
        for symbol, *usage in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    }
    for code in re.split(r"\n\s*Function : ", text)[1:]:
        symbol = code.split(maxsplit=1)[0]
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", code)
        opcodes = Counter(opcode.partition(".")[0] for opcode, _ in instructions)
        name, arguments = demangle(symbol)
        numbers = [int(argument) for argument in arguments if argument.isdigit()]
        registers, stack, shared = usages[symbol]
        bound = bounds[symbol]
        row = {
            "kernel": name,
            "types": [TYPES[argument] for argument in arguments if argument in TYPES],
            "vector": numbers[0] if numbers else 1,
            "layout": ("contiguous", "channels_last")[numbers[1]] if len(numbers) > 1 else "",
            "target": target,
            "registers": registers,
            "threads": int(bound[1], 0) * int(bound[2], 0) * int(bound[3], 0)
            if bound
            else 1024,  # what a launch may have at most
            **said[symbol],
            "stack": stack,
            "shared": shared,
            "local": opcodes["LDL"] + opcodes["STL"],
            "loads": access(instructions, "LDG"),
            "copies": access(instructions, "LDGSTS"),
            "stores": access(instructions, "STG"),
            "cluster_barriers": opcodes["UCGABAR_ARV"] + opcodes["UCGABAR_WAIT"],
            "unpaired": sum(opcode[:3] in ("F2F", "F2FP") and "RZ" in operands for opcode, operands in instructions),
        }
        rows.append(row | {"faults": faults(row)})
    return rows


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with the kernel of a row."""
    found = []
    if row["spills"] or row["stack"] or row["local"]:
        found.append(f"{row['spills']} bytes of spills, {row['stack']} of stack, {row['local']} local accesses")
    # registers are given out to warps in units of 8 a thread
    if -(-row["registers"] // 8) * 8 * row["threads"] > 65536:
        found.append(f"{row['registers']} registers in {row['threads']} threads")
    if row["kernel"] in STREAMS and row["vector"] > 1:
        how, least, stores = STREAMS[row["kernel"]]
        bits = min(128, row["vector"] * (BITS[row["types"][0]] if row["types"] else 32))
        if (wide := sum(count for each, count in row[how].items() if each >= bits)) < least:
            found.append(f"{wide} {how} of {bits} bits, not {least}")
        narrow = {bits: count for bits, count in row["stores"].items() if bits < 128}
        if stores and (narrow or not row["stores"]):
            found.append(", ".join(f"{count} stores of {bits} bits" for bits, count in narrow.items()) or "no stores")
        if stores and row["unpaired"]:
            found.append(f"{row['unpaired']} conversions of single numbers")
    if row["kernel"] in CLUSTERS and (row["target"] >= 90) != (row["cluster_barriers"] > 0):
        found.append(f"{row['cluster_barriers']} cluster barriers")
    return found


def report(targets: Sequence[int], sources: Sequence[Path] = ()) -> Iterator[dict[str, Any]]:
    """The rows of the sources, by default csrc/cuda/*.cu; as many are compiled at once as there are processors."""
    pairs = itertools.product(sources or sorted((ROOT / "csrc" / "cuda").glob("*.cu")), targets)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from itertools.chain.from_iterable(pool.map(lambda pair: compile_one(*pair), pairs))


class Sizes(shapes.Draw):
    """Tensors without memory."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device, self.generator = dtype, device, None  # type: ignore[assignment]

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def packed(call: shapes.Call, batch: int, dtype: torch.dtype) -> bytes:
    """The call's arguments as the library takes them; an address in them says only that there is a tensor."""
    with mock.patch.object(shapes, "Draw", Sizes), mock.patch.object(torch.Tensor, "data_ptr", return_value=16):
        bound = inspect.signature(getattr(ops, call.op)).bind(**call.inputs(batch, dtype, torch.device("meta")))
        bound.apply_defaults()
        arguments = [bound.arguments[name] for name in OPS[call.op].names]
        kernel = OPS[call.op].implementation("cpu")
        assert isinstance(kernel, NativeKernel)
        return kernel.packed(*arguments)


def plans(targets: Sequence[int], threads: dict[str, int]) -> Iterator[dict[str, Any]]:
    """How the networks' calls are launched; threads: launch bounds of the kernels, by name. Needs the library."""
    for name, calls in shapes.CALLS.items():
        for call, batch, dtype in itertools.product(calls, (1, 16, 64), (torch.float32, torch.bfloat16)):
            arguments = packed(call, batch, dtype)
            most = min(
                (bound for kernel, bound in threads.items() if kernel.startswith(call.op.removesuffix("silu"))),
                default=1024,
            )
            for target in targets:
                device = cuda_library.Device(0, target, MULTIPROCESSORS[target], SHARED[target] * 1024)
                row = {
                    "call": f"{name} {call.op} {call} batch {batch}",
                    "dtype": str(dtype).removeprefix("torch."),
                    "target": target,
                }
                row |= cuda_library.plan(call.op, arguments, device)._asdict()
                yield row | {"faults": plan_faults(row, most)}


def plan_faults(row: dict[str, Any], threads: int) -> list[str]:
    """What a GPU would refuse."""
    limits = {
        "shared_memory": SHARED[row["target"]] * 1024,
        "threads": threads,
        "cluster": 8 if row["target"] >= 90 else 1,
    }
    return [f"{name} is {row[name]}, at most {most} can be" for name, most in limits.items() if row[name] > most]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.cuda_aot", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)), help="compute capabilities times ten")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows")
    arguments = parser.parse_args()
    targets, kernels = tuple(map(int, arguments.targets.split(","))), []
    if unknown := sorted({*targets} - {*TARGETS}):
        parser.error(f"--targets has {', '.join(map(str, unknown))}; expected some of {', '.join(map(str, TARGETS))}")
    if reason := missing(targets):
        print(reason, file=sys.stderr)
        return 2
    print(
        f"{'kernel':21} {'target':>6} {'regs':>4} {'threads':>7} {'spills':>6} {'local':>5} "
        f"{'load':>4} {'store':>5}  instantiation"
    )
    for row in report(targets):
        kernels.append(row)
        load, store = max((*row["loads"], *row["copies"], 0)), max((*row["stores"], 0))
        cells = f"{row['kernel']:21} {row['target']:6} {row['registers']:4} {row['threads']:7} "
        cells += f"{row['spills']:6} {row['local']:5}"
        of = " ".join([*row["types"], f"x{row['vector']}", row["layout"]])
        print(f"{cells} {load:4} {store:5}  {of}", *row["faults"], sep="  ! ", flush=True)
    launches = [] if native_library.find("cuda", cuda_library.PATH)[1] else list(plans(targets, bounds(kernels)))
    print(
        f"{len(launches)} planned launches"
        if launches
        else "no planned launches: the library of CUDA kernels is not built"
    )
    for row in launches:
        if row["faults"]:
            print(f"{row['call']} {row['dtype']} sm_{row['target']}", *row["faults"], sep="  ! ")
    if arguments.json:
        arguments.json.write_text(json.dumps({"kernels": kernels, "plans": launches}, indent=1) + "\n", "utf-8")
    return 1 if any(row["faults"] for row in kernels + launches) else 0


def bounds(kernels: list[dict[str, Any]]) -> dict[str, int]:
    """By kernel, the threads that each of its instantiations can have."""
    return {
        row["kernel"]: min(other["threads"] for other in kernels if other["kernel"] == row["kernel"]) for row in kernels
    }


if __name__ == "__main__":
    sys.exit(main())
