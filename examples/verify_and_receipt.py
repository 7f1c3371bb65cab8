"""Check an accelerated pipeline, and keep a receipt of what it drew.

python examples/verify_and_receipt.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import coalescer_fast as cf

pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
pipe.set_progress_bar_config(disable=True)
cf.accelerate(pipe)

# Ops against float64; evaluations and pictures against the pipeline's own float32 reference.
result = cf.verify(pipe, 4)  # 4 known names; the default is 16
print(result)
assert result.passed

# A stricter budget than the default.
strict = cf.verify(pipe, ["octopus", "owl"], budget={"psnr_median": 40})
print("passed 40 dB:", strict.passed)

# A receipt holds hashes of all that decides the bits of a picture. Two machines with the same receipt drew the same.
prompts = ["octopus", "owl"]
noise = pipe.initial_noise(len(prompts), torch.Generator().manual_seed(0))
pictures = pipe(prompts, latents=noise).images
receipt = cf.receipt(pipe, prompts, noise, pictures)
Path("receipt.json").write_text(json.dumps(receipt, indent=2) + "\n")
print({name: receipt[name] for name in ("runtime", "dtype", "instruction_set", "pixels")})
