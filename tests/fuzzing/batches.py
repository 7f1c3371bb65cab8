"""Random batches of the embedded model: every picture has the bits that it has alone, in a process of its own.

python -m tests.fuzzing.batches --count 300 --seed 1 --csv FILE
"""

from __future__ import annotations

import argparse
import hashlib
import random
from pathlib import Path
from typing import Any

import torch

import coalescer_fast as cf
from coalescer_fast import files
from coalescer_fast.runtime.native.module import no_programs

from ..helpers import processes

DTYPES = ("float32", "bfloat16", "int8")
PROMPTS = ("octopus", "owl, 3d style", "red heart", "", "fire truck", "xyzzy", "two people", "slug, garden, noto style")
CALLS: tuple[dict[str, Any], ...] = (
    {},
    {"guidance_scale": 1.0},
    {"num_inference_steps": 3},
    {"num_inference_steps": 1},
)
SIZES = (1, 2, 3, 5, 8, 13, 16, 17)


def able(dtype: str) -> bool:
    return not no_programs(torch.uint8 if dtype == "int8" else getattr(torch, dtype))


def load(dtype: str) -> cf.CoalescerPipeline:
    torch.set_num_threads(1)  # where others have the CPUs, int8's calibration takes seconds in two threads
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    return cf.accelerate(pipe, dtype=dtype)


def draw(pipe: cf.CoalescerPipeline, pictures: list[int], call: int) -> list[str]:
    """SHA-256 of each of these pictures, drawn in one batch; a picture's number decides its prompt and its noise."""
    noise = torch.cat(
        [torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float32) for n in pictures]
    )
    prompts = [PROMPTS[n % len(PROMPTS)] for n in pictures]
    images = pipe(prompts, latents=noise, output_type="pt", **CALLS[call]).images
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]


def draw_alone(dtype: str, picture: int, call: int, threads: int) -> str:
    pipe = load(dtype)
    torch.set_num_threads(threads)
    return draw(pipe, [picture], call)[0]


def run(count: int, seed: int, pictures: int, dtypes: tuple[str, ...] = DTYPES) -> list[dict[str, Any]]:
    """Draw random batches.

    Args:
        count: number of batches of each dtype.
        seed: of the choice of batches.
        pictures: number of different pictures in them, each of which is first drawn alone.
        dtypes: those that cannot run here are left out.

    Returns:
        A row for each batch.

    Raises:
        AssertionError: if a picture has other bits in a batch than alone; it names the batch.
    """
    rows = []
    for dtype in filter(able, dtypes):
        rng = random.Random(f"{seed} {dtype}")
        expected = {
            (n, n % len(CALLS)): processes.call(draw_alone, dtype, n, n % len(CALLS), (1, 3, 2)[n % 3])
            for n in range(pictures)
        }
        pipe = load(dtype)
        for i in range(count):
            threads, call = 1 + i % 3, rng.choice(list(expected))[1]
            batch = [rng.choice([n for n, c in expected if c == call]) for _ in range(rng.choice(SIZES))]
            torch.set_num_threads(threads)
            found = draw(pipe, batch, call)
            assert found == [expected[n, call] for n in batch], (
                f"seed {seed}, {dtype}, batch {i}: {batch} with {threads} threads"
            )
            rows.append(
                {
                    "dtype": dtype,
                    "batch": i,
                    "pictures": len(batch),
                    "threads": threads,
                    "call": str(CALLS[call]),
                    "equal": True,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="batches of each dtype (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=16, help="different pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each batch")
    args = parser.parse_args()
    rows = run(args.count, args.seed, args.pictures)
    if args.csv:
        files.write_csv(args.csv, rows, list(rows[0]))
    count = sum(row["pictures"] for row in rows)
    print(f"{len(rows)} batches, {count} pictures: each has the bits that it has alone in a new process")


if __name__ == "__main__":
    main()
