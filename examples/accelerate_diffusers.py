"""Accelerate a pipeline of diffusers, without a download: a small UNet with random weights, which draws noise.

python examples/accelerate_diffusers.py
"""

from __future__ import annotations

from collections import Counter

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import coalescer_fast as cf
from coalescer_fast.networks import runtimes

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=32,
    block_out_channels=(64, 128),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
pipe = DDIMPipeline(unet, DDIMScheduler())
pipe.set_progress_bar_config(disable=True)


def draw() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(num_inference_steps=4, generator=generator, output_type="np").images)


plain = draw()
cf.accelerate(pipe, dtype="float32")
print(f"largest difference of a color: {(draw() - plain).abs().max():.1e}")
print(cf.explain(pipe))  # what runs natively, and how its convolutions are computed

program = runtimes(pipe)["unet"].programs.last
if program is not None:  # None where the UNet runs in torch
    taken = Counter[str]()
    for step, seconds in program.profile():  # each step alone
        taken[f"{step.kind}, {step.form}" if step.form else step.kind] += seconds
    for kind, seconds in taken.most_common(5):
        print(f"{1e3 * seconds:6.2f} ms  {kind}")

cf.restore(pipe)
assert torch.equal(draw(), plain)  # as it was, to the bit
