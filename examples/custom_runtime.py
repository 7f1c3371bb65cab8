"""Write a runtime of your own: one that measures how long each part of a call takes.

python examples/custom_runtime.py
"""

from __future__ import annotations

import time
from collections import Counter

import torch
from torch import Tensor

import coalescer_fast as cf
from coalescer_fast.models.unet import Conditioning
from coalescer_fast.prompts import Descriptions
from coalescer_fast.runtime.base import Part, Runtime


class TimedRuntime(Runtime):
    """Does what the pipeline's runtime does, and adds up the seconds."""

    name = "timed"

    def __init__(self, pipe: cf.CoalescerPipeline):
        super().__init__(pipe)
        self.inner = inner = pipe.runtime
        self.device, self.dtype, self.backend, self.max_batch = (
            inner.device,
            inner.dtype,
            inner.backend,
            inner.max_batch,
        )
        self.seconds: Counter[str] = Counter()

    def refresh(self) -> None:
        self.inner.refresh()  # comes before every call: take over what has changed of the networks

    def forget(self) -> None:
        self.inner.forget()

    # The three parts of a call. `generate`, the loop over the steps, has a default that calls them.

    def condition(self, texts: Descriptions, device: torch.device) -> Conditioning:
        start = time.perf_counter()
        found = self.inner.condition(texts, device)
        self.seconds["condition"] += time.perf_counter() - start
        return found

    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        direction, distance = self.inner.evaluate(sample, conditioning)  # [N, C, h, w] and [N]
        self.seconds["evaluate"] += time.perf_counter() - start
        return direction, distance

    def decode(self, latents: Tensor) -> Tensor:
        start = time.perf_counter()
        pictures = self.inner.decode(latents)  # [N, 3, H, W], about in [-1, 1]
        self.seconds["decode"] += time.perf_counter() - start
        return pictures

    def explain(self) -> list[Part]:
        return [Part("all", f"timed {self.inner.name}", "examples/custom_runtime.py"), *self.inner.explain()]


pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
pipe.set_progress_bar_config(disable=True)
cf.accelerate(pipe)
cf.warmup(pipe)
pipe.runtime = runtime = TimedRuntime(pipe)
print(cf.explain(pipe))

pipe("octopus", generator=torch.Generator().manual_seed(0))
for part, seconds in runtime.seconds.items():
    print(f"{part}: {1e3 * seconds:.2f} ms")
assert set(runtime.seconds) == {"condition", "evaluate", "decode"}

cf.restore(pipe)
