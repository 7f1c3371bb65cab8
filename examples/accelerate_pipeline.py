"""Accelerate a pipeline, and compare speed and pictures with the reference.

python examples/accelerate_pipeline.py
"""

from __future__ import annotations

import statistics
import time

import torch

import coalescer_fast as cf


def draw(pipe: cf.CoalescerPipeline) -> torch.Tensor:
    return pipe("octopus", generator=torch.Generator().manual_seed(0), output_type="pt").images


def milliseconds(pipe: cf.CoalescerPipeline, calls: int = 10) -> float:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        draw(pipe)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
pipe.set_progress_bar_config(disable=True)
reference, before = draw(pipe), milliseconds(pipe)

cf.accelerate(pipe)
cf.warmup(pipe)  # so that the first call is as fast as the others
print(cf.explain(pipe))
accelerated, after = draw(pipe), milliseconds(pipe)

psnr = -10 * torch.log10((accelerated - reference).square().mean()).item()
print(f"reference {before:.1f} ms, accelerated {after:.1f} ms a picture; they differ by {psnr:.1f} dB PSNR")

cf.restore(pipe)  # the next call is the reference's again
assert torch.equal(draw(pipe), reference)
