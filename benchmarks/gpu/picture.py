"""The whole pipeline once: pictures by the accelerated emoji-64 beside those of its float32 reference on this device.

    python -m benchmarks.gpu.picture [--device cuda] [--out picture.png]

The pictures must be as near as `coalescer_fast.verify` asks; the second call with the same seed must give the same
bits and, on a GPU, capture no other CUDA graph, also on a stream that is not the default one. The upper row of the PNG
is the reference's. Exit status: 0, or 1 with what is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import coalescer_fast
from coalescer_fast.parity import Budget
from coalescer_fast.pipeline import CoalescerPipeline

from ..harness.arguments import Parser, command

PROMPTS = ["octopus", "red apple", "tiger", "rocket", "umbrella", "guitar"]


def main(argv: Sequence[str] | None = None) -> int:
    top = Parser(prog="python -m benchmarks.gpu.picture", description=__doc__.partition("\n")[0])
    top.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="default: %(default)s")
    top.add_argument("--dtype", default="auto", help="of the accelerated networks (default: %(default)s)")
    top.add_argument("--out", type=Path, metavar="F.png", help="write the pictures there")
    args = top.parse_args(argv)
    return command(top.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    pipe = CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    pipe.to(args.device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        reference = draw(pipe)
    coalescer_fast.accelerate(pipe, dtype=args.dtype)
    start = time.perf_counter()
    images = draw(pipe)
    first = time.perf_counter() - start
    captures = count(pipe)
    start = time.perf_counter()
    again = draw(pipe)
    second = time.perf_counter() - start
    if args.out is not None:
        write(args.out, torch.stack([reference, images]))
    wrong = []
    if not torch.equal(images, again):
        wrong.append(f"the second call differs by up to {float((images - again).abs().max()):.3g}")
    if args.device == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            elsewhere = draw(pipe)
        stream.synchronize()
        if not torch.equal(images, elsewhere):
            wrong.append("another stream gives other pictures")
        if captures != 1 or count(pipe) != captures:
            wrong.append(f"{captures} graphs were captured in the first call and {count(pipe)} in all; expected 1")
    psnr = -10 * (images - reference).square().mean((1, 2, 3)).log10()
    budget = Budget.of(pipe.runtime.dtype)
    for what, value, limit in (
        ("median", float(psnr.median()), budget.psnr_median),
        ("smallest", float(psnr.min()), budget.psnr_minimum),
    ):
        if not value >= limit:  # NaN is wrong, too
            wrong.append(f"the {what} PSNR is {value:.1f} dB; expected at least {limit:g}")
    print(coalescer_fast.explain(pipe))
    print("\n".join(f"FAIL {words}" for words in wrong), end="\n" * bool(wrong))
    nearness = f"PSNR {float(psnr.median()):.1f} dB (least {float(psnr.min()):.1f})"
    times = f"first call {first:.2f} s, then {1e3 * second:.1f} ms"
    graphs = f", CUDA graphs captured: {captures}" if args.device == "cuda" else ""
    print(f"{len(images)} pictures, {len(wrong)} faults, {nearness}; {times}{graphs}", flush=True)
    return 1 if wrong else 0


def draw(pipe: Any) -> torch.Tensor:
    """(N, 3, H, W) on the CPU, the same noise in every call."""
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPTS, generator=generator, output_type="pt").images.float().cpu()


def count(pipe: Any) -> int:
    """How many CUDA graphs were captured."""
    graphs = getattr(pipe.runtime, "graphs", None)
    return 0 if graphs is None else graphs.captures


def write(path: Path, rows: torch.Tensor) -> None:
    """Write rows of pictures (R, N, 3, H, W) as one PNG."""
    whole = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (R H, N W, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((whole.clamp(0, 1) * 255).round().to(torch.uint8).numpy()).save(path)


if __name__ == "__main__":
    sys.exit(main())
