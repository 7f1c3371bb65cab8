"""What draws the samples that are measured, and what its heads say first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...pipeline import CoalescerPipeline, TraceStep

# Latents (N, C, h, w) of N descriptions, from noise of that shape.
Sampler = Callable[[list[str], torch.Tensor], torch.Tensor]
# The first step from there.
FirstStep = Callable[[list[str], torch.Tensor], TraceStep]
# Pictures (N, 3, H, W), about in [-1, 1], of latents.
Decode = Callable[[torch.Tensor], torch.Tensor]

CHUNK = 250  # pictures that are drawn, decoded or classified at a time


def coalescer_sampler(pipe: CoalescerPipeline, steps: int, guidance_scale: float | None = None) -> Sampler:
    """The pipeline as a `Sampler`."""

    def sample(prompts: list[str], noise: torch.Tensor) -> torch.Tensor:
        call: Any = pipe(
            prompts, num_inference_steps=steps, guidance_scale=guidance_scale, latents=noise, output_type="latent"
        )
        return call.images

    return sample


def first_step_of(pipe: CoalescerPipeline) -> FirstStep:
    """What the pipeline's two heads say at R = noise."""

    def first_step(prompts: list[str], noise: torch.Tensor) -> TraceStep:
        call: Any = pipe(
            prompts, num_inference_steps=1, guidance_scale=1.0, latents=noise, output_type="latent", return_trace=True
        )
        return call.trace[0]

    return first_step


@contextmanager
def quiet(pipe: CoalescerPipeline) -> Iterator[None]:
    """No progress bars of the pipeline's own."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


@torch.no_grad()
def in_parts(decode: Decode, latents: torch.Tensor, most: int = CHUNK) -> torch.Tensor:
    """Pictures (N, 3, H, W) in [-1, 1], float32 on the CPU, of latents, at most so many at a time."""
    return torch.cat([decode(part).float().clamp(-1, 1).cpu() for part in latents.split(most)])
