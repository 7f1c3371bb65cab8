"""Draw pictures of two descriptions, and look at what the sampler did.

python examples/draw.py
"""

import torch

import coalescer_fast as cf

pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
prompts = ["octopus", "owl, 3d style"]
out = pipe(prompts, num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), return_trace=True)

# Pictures come prompt by prompt: two octopuses, then two owls.
for i, picture in enumerate(out.images):
    picture.save(f"draw-{i}.png")

# R moves by `distance` in every step. A short direction means that the network is uncertain.
for number, step in enumerate(out.trace, start=1):
    print(f"step {number}: distance {step.distance.tolist()}, |direction| {step.direction_length.tolist()}")

# Words that the model does not know are reported, not ignored.
print(pipe("octopus in a zorb").warnings)
