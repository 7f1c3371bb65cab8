"""Draw many prompts in batches, as fast as the machine can.

python examples/batch.py
"""

from __future__ import annotations

import torch

import coalescer_fast as cf

BATCH = 8
PROMPTS = [
    f"{name}, {style} style"
    for name in ("octopus", "pizza", "rocket", "owl", "guitar", "teapot")
    for style in ("noto", "twemoji")
]

pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
pipe.set_progress_bar_config(disable=True)
cf.accelerate(pipe)

# Every batch size is prepared once. Prepare the two that will come, instead of in the first call of each.
sizes = {BATCH, len(PROMPTS) % BATCH or BATCH}
cf.warmup(pipe, batch_sizes=sorted(sizes))

pictures = []
for start in range(0, len(PROMPTS), BATCH):
    prompts = PROMPTS[start : start + BATCH]
    # One generator for each picture: a picture then depends on its own seed alone, not on its place in a batch.
    generators = [torch.Generator().manual_seed(start + i) for i in range(len(prompts))]
    # "pt" gives one tensor (N, 3, H, W) in [0, 1], without a copy to PIL pictures.
    pictures.append(pipe(prompts, generator=generators, output_type="pt").images)
images = torch.cat(pictures)
print(f"{len(images)} pictures of shape {tuple(images.shape[1:])}")

# With backend "cpu", even the bits are those of a picture that is drawn alone.
alone = pipe(PROMPTS[9], generator=torch.Generator().manual_seed(9), output_type="pt").images[0]
print("same bits alone and in a batch:", torch.equal(alone, images[9]))
