"""Export a network to ONNX, check it, and run the pipeline with it.

pip install '.[export]'
python examples/export_onnx.py
"""

from __future__ import annotations

import torch

import coalescer_fast as cf
from coalescer_fast.export.cli import main as export

# The same as: coalescer-export onnx --what generator -o exported-generator
if export(["onnx", "--what", "generator", "--max-batch", "4", "-o", "exported-generator", "--quiet"]):
    raise SystemExit("the export failed")

# Compare with the float32 reference; coalescer-export verify does the same, and coalescer-export inspect tells more.
if export(["verify", "exported-generator", "--prompts", "4", "--quiet"]):
    raise SystemExit("the exported graph is not within its budget")

# The whole call, noise and description to picture, is one graph in ONNX Runtime.
pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
pipe.set_progress_bar_config(disable=True)
cf.accelerate(pipe, artefact="exported-generator")
print(cf.explain(pipe))
pipe("octopus", generator=torch.Generator().manual_seed(0)).images[0].save("exported.png")
