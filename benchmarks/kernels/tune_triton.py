"""Chooses the configurations of the Triton kernels and writes `coalescer_fast/ops/triton_configs.json`.

    python -m benchmarks.kernels.tune_triton [--output FILE] [--kernel NAME]

With a CUDA device it times every candidate of every class of sizes (results checked against the reference, L2 cache
cleared) and keeps the fastest. Without one nothing is measured: it keeps the candidate that spills no register on any
target and has the most bytes of its tile in flight on a multiprocessor, as far as registers and shared memory let
programs share one; of equals, the first listed.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from coalescer_fast.ops import triton_launch

from . import triton_aot

Key = tuple[str, str, str]


def tiles(*candidates: tuple[int, int, int]) -> list[dict[str, int]]:
    return [{"BLOCK_R": r, "BLOCK_C": c, "num_warps": w} for r, c, w in candidates]


def products(*candidates: tuple[int, int, int, int]) -> list[dict[str, int]]:
    return [{"BLOCK_P": p, "BLOCK_K": k, "num_warps": w, "num_stages": s} for p, k, w, s in candidates]


def rows(*candidates: tuple[int, int]) -> list[dict[str, int]]:
    return [{"BLOCK": b, "num_warps": w} for b, w in candidates]


# Left out is what spills a register or two under one of Triton 3.5, 3.6 and 3.7, whose assemblers differ.
CANDIDATES: dict[Key, list[dict[str, int]]] = {
    ("bias_residual", "channels_last", "any"): tiles((32, 64, 4), (64, 64, 4), (64, 64, 8)),
    ("bias_residual", "contiguous", "any"): tiles((32, 64, 4), (64, 64, 4), (64, 64, 8)),
    ("coalesce_step", "any", "small"): rows((1024, 4), (1024, 8)),
    ("coalesce_step", "any", "medium"): rows((4096, 8), (4096, 16)),
    ("coalesce_step", "any", "large"): rows((8192, 16), (8192, 8)),
    ("dual_head.finish", "any", "any"): rows((1024, 4), (2048, 8)),
    ("dual_head.heads", "float32", "large"): products((64, 32, 4, 3), (32, 32, 4, 3), (64, 32, 8, 3)),
    ("dual_head.heads", "float32", "small"): products((32, 32, 2, 3), (16, 32, 2, 3), (32, 32, 4, 3)),
    ("dual_head.heads", "half", "large"): products((32, 64, 4, 4), (32, 64, 4, 3)),
    ("dual_head.heads", "half", "small"): products((32, 32, 2, 4), (16, 32, 1, 4), (32, 64, 2, 4)),
    ("gate", "rows", "any"): tiles((4, 256, 4), (8, 256, 4), (4, 512, 4)),
    ("group_norm_silu.apply", "channels_last", "large"): tiles((64, 64, 8), (64, 64, 4), (32, 64, 4)),
    ("group_norm_silu.apply", "channels_last", "small"): tiles((32, 64, 4), (16, 64, 4), (32, 32, 4)),
    ("group_norm_silu.apply", "contiguous", "large"): tiles((256, 16, 8), (128, 16, 4), (128, 32, 8)),
    ("group_norm_silu.apply", "contiguous", "small"): tiles((64, 32, 8), (32, 32, 4)),
    ("group_norm_silu.statistics", "channels_last", "large"): tiles((64, 64, 8), (64, 64, 4), (128, 64, 8)),
    ("group_norm_silu.statistics", "channels_last", "small"): tiles((64, 64, 8), (64, 32, 4), (64, 64, 4)),
    ("group_norm_silu.statistics", "contiguous", "large"): tiles((256, 16, 8), (128, 16, 4), (256, 16, 4)),
    ("group_norm_silu.statistics", "contiguous", "small"): tiles((64, 32, 4), (64, 16, 4), (64, 64, 8)),
}


def put(table: dict[str, Any], key: Key, entry: dict[str, Any]) -> None:
    kernel, layout, size = key
    table.setdefault(kernel, {}).setdefault(layout, {})[size] = entry


def use(key: Key, candidate: dict[str, int]) -> None:
    """Let the ops launch the candidate from now on."""
    put(triton_launch._table(), key, {"configuration": candidate})
    triton_launch.configuration.cache_clear()


def bytes_in_flight(row: dict[str, Any]) -> int:
    """Bytes of the main tile in flight on a multiprocessor: 64 Ki registers, 2048 or 1536 threads, 32 programs."""
    options, threads = row["options"], row["threads"]
    elements = options.get("BLOCK") or (options["BLOCK_P"] * options["BLOCK_K"] if "BLOCK_P" in options else 0)
    elements = elements or options["BLOCK_R"] * options["BLOCK_C"]
    registers = -(-row["registers"] // 8) * 8 * threads
    programs = min(65536 // registers, (1536 if row["target"] == 120 else 2048) // threads, 32)
    programs = min(programs, triton_aot.SHARED[row["target"]] * 1024 // max(row["shared"], 1))
    return programs * options.get("num_stages", 1) * elements * getattr(torch, row["dtype"]).itemsize


def compiled(key: Key, candidate: dict[str, int]) -> tuple[bool, int]:
    """Whether the candidate is without fault on every target, and the fewest bytes in flight of any."""
    use(key, candidate)
    faultless, least = True, sys.maxsize
    for dtype in ("bfloat16", "float32"):
        for name, op, args in triton_aot.calls(getattr(torch, dtype)):
            for launch in triton_aot.record(functools.partial(triton_aot.implementation(op), *args)):
                if launch.key == key:
                    for target in triton_aot.TARGETS:
                        row = triton_aot.row(launch, dtype, name, target)
                        faultless &= not row["faults"]
                        least = min(least, bytes_in_flight(row))
    return faultless, least


def measured(key: Key, candidate: dict[str, int]) -> float:
    """Microseconds, summed over the calls of the class in bfloat16 and float32."""
    from triton.testing import do_bench

    use(key, candidate)
    total = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        for name, op, args in triton_aot.calls(dtype, device="cuda"):
            run = functools.partial(triton_aot.implementation(op), *args)
            if all(launch.key != key for launch in triton_aot.record(run)):
                continue
            # the rounding of the reference itself: each of its half a dozen steps is in the dtype
            tolerance = 16 * torch.finfo(dtype).eps
            expected = triton_aot.implementation(op, "reference")(*args)
            torch.testing.assert_close(
                run(), expected, rtol=tolerance, atol=tolerance, msg=f"{name}: {candidate} is not the reference"
            )
            total += 1e3 * do_bench(run, return_mode="median")
    return total


def choose(key: Key, candidates: list[dict[str, int]]) -> dict[str, Any]:
    if torch.cuda.is_available():
        times = [measured(key, candidate) for candidate in candidates]
        best = times.index(min(times))
        basis = f"measured on {torch.cuda.get_device_name()}: {times[best]:.1f} us for the calls of its class"
    else:
        facts = [compiled(key, candidate) for candidate in candidates]
        best = facts.index(max(facts))
        basis = "compiled, not measured"
    use(key, candidates[best])
    return {"configuration": candidates[best], "basis": basis}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.tune_triton", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=triton_launch.CONFIGURATIONS)
    parser.add_argument(
        "--kernel", choices=sorted({kernel for kernel, _, _ in CANDIDATES}), help="choose for this one alone"
    )
    arguments = parser.parse_args()
    table = json.loads(triton_launch.CONFIGURATIONS.read_text("utf-8")) if arguments.kernel else {}
    chosen = {key: candidates for key, candidates in CANDIDATES.items() if arguments.kernel in (None, key[0])}
    for key, candidates in chosen.items():
        use(key, candidates[0])
    for key, candidates in chosen.items():
        entry = choose(key, candidates)
        put(table, key, entry)
        print(*key, entry, flush=True)
    arguments.output.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
