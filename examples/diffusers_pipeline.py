"""Accelerate a diffusers pipeline of your own: python examples/diffusers_pipeline.py [FOLDER OR HUB ID]"""

import sys

import torch
from diffusers import DiffusionPipeline

import coalescer_fast as cf

pipe = DiffusionPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "stabilityai/sd-turbo")
cf.accelerate(pipe)  # its UNet and autoencoder run as native programs on the CPU
out = pipe("a cat", num_inference_steps=1, guidance_scale=0.0, generator=torch.Generator().manual_seed(0))
out.images[0].save("cat.png")
print(cf.explain(pipe))  # what ran where
