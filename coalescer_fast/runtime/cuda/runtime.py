"""A pipeline on a CUDA device: fused ops, and all of a call but its conditioning in one CUDA graph."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops, sampling
from ...finite import nan_where_not_finite
from ...grading import Heads
from ...models.unet import Conditioning
from ...nvtx_ranges import span
from ...ops.dispatch import preferred
from ...ops.op import OPS
from ...scheduler import CoalescerScheduler
from ..base import Part, PipelineRuntime, channels_last_copy, entered, quiet_torch
from .graphs import CudaGraphCapture, GraphCapture, Graphs

if TYPE_CHECKING:
    from ...pipeline import CoalescerPipeline
    from ...prompts import Descriptions
    from ...sampling import Call, OnStep

MOST_GRAPHS = 16
SHARE = 4  # one part in so many of the device's memory is for graphs
VARIABLE = "COALESCER_FAST_GRAPH_BYTES"


class Key(NamedTuple):
    """What a graph is captured for: shapes, and all numbers of the schedule.

    Attributes:
        batch: samples.
        size: (h, w) of the latents.
        etas: of each step.
        modes: of each step.
        eps: smallest length of a direction to divide by.
        guided: indices of the guided steps.
        pictures: whether it decodes.
        tokens: of the description and of the negative one, 0 without cross-attention.
        empties: descriptions that guidance leads away from, one or one a sample; 0 without guidance.
    """

    batch: int
    size: tuple[int, int]
    etas: tuple[float, ...]
    modes: tuple[str, ...]
    eps: float
    guided: tuple[int, ...]
    pictures: bool
    tokens: tuple[int, int]
    empties: int

    def __str__(self) -> str:
        steps = len(self.etas)
        words = [f"batch {self.batch}", "latents {}x{}".format(*self.size), f"{steps} step{'s' * (steps != 1)}"]
        words += [f"{len(self.guided)} guided"] if self.guided else []
        words += ["decoder"] if self.pictures else []
        return ", ".join(words + ([f"{self.tokens[0]} tokens"] if any(self.tokens) else []))


class CudaRuntime(PipelineRuntime):
    """Runs copies of the networks, channels innermost, and all steps with the decoder as one graph for each `Key`.

    The copies are made anew when a weight has changed.

    Args:
        pipe: a pipeline on a CUDA device.
        backend: of the ops; "auto" takes the fastest that can run each call.
        dtype: of weights and activations.
        most_bytes: memory for graphs; ``COALESCER_FAST_GRAPH_BYTES``, or a quarter of the device's, if None; 0 is no
            graphs.
        most_graphs: graphs to hold; the least recently used goes.
        capture: makes the graphs; a `CudaGraphCapture` if None.
    """

    name = "cuda"

    def __init__(
        self,
        pipe: CoalescerPipeline,
        backend: str,
        dtype: torch.dtype,
        most_bytes: int | None = None,
        most_graphs: int = MOST_GRAPHS,
        capture: GraphCapture | None = None,
    ):
        super().__init__(pipe)
        if most_bytes is None:
            most_bytes = graph_bytes(pipe.device)
        self.graphs = Graphs(CudaGraphCapture(pipe.device) if capture is None else capture, most_graphs, most_bytes)
        self.backend, self.dtype, self.device = backend, dtype, pipe.device
        self.refresh()

    def take_over(self) -> None:
        """Copy the networks, and drop the graphs, which hold the addresses of the last copies."""
        self.unet = channels_last_copy(self.pipe.unet, self.dtype)
        self.unet.set_backend(self.backend)
        self.decoder = channels_last_copy(self.pipe.vae.decoder, self.dtype)
        self.empty: Conditioning | None = None
        self.release()

    @quiet_torch()
    def condition(self, texts: Descriptions, device: torch.device) -> Conditioning:
        """Compute the reference's in float32, which is little work, and round it once.

        Nobody may write to it: that of the empty description, which depends on the weights alone, is kept.
        """
        if texts == [""] and self.empty is not None:
            return self.empty
        found = self.pipe.condition(texts, device).rounded(self.dtype)
        if found.anchor is not None:
            found.anchor = found.anchor.contiguous(memory_format=torch.channels_last)
        if texts == [""]:
            self.empty = found
        return found

    @quiet_torch()
    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        x = entered(sample, self.device).contiguous(memory_format=torch.channels_last)
        direction, distance = self.unet(x, conditioning, return_dict=False)
        return direction, distance

    @quiet_torch()
    def decode(self, latents: Tensor) -> Tensor:
        x = entered(latents, self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        return F.pixel_shuffle(self.decoder(x).float(), self.pipe.vae.patch_size)

    def release(self) -> None:
        """Give the graphs' memory back; the next call captures again."""
        self.graphs.clear()

    def generate(
        self,
        scheduler: CoalescerScheduler,
        sample: Tensor,
        conditioning: Conditioning,
        empty: Conditioning | None,
        guidance_scale: float,
        decode: bool,
        on_step: OnStep | None = None,
        call: Call | None = None,
    ) -> Tensor:
        """Run the call as one graph, on the caller's stream; with "auto", or watched by ``on_step``, step by step."""
        if on_step is not None or scheduler.is_auto:
            return super().generate(scheduler, sample, conditioning, empty, guidance_scale, decode, on_step, call)
        guided = () if empty is None else tuple(filter(scheduler.is_guided, range(len(scheduler.etas))))
        tokens = tuple(0 if c is None or c.mask is None else c.mask.shape[1] for c in (conditioning, empty))
        batch, _, *size = sample.shape
        empties = 0 if empty is None else len(empty.film[0][0])
        schedule = scheduler.etas, scheduler.modes, scheduler.config.eps
        key = Key(batch, tuple(size), *schedule, guided, decode, tokens, empties)  # type: ignore[arg-type]

        def draw(
            sample: Tensor, conditioning: Conditioning, empty: Conditioning | None, scale: Tensor
        ) -> tuple[Tensor, ...]:
            heads: list[Heads] = []
            latents = sampling.sample(self, scheduler, sample, conditioning, empty, scale, heads=heads)
            images = nan_where_not_finite(self.decode(latents), latents) if decode else latents
            return images, *itertools.chain(*heads)

        with span("graph"), quiet_torch():
            found, *heads = self.graphs.run(key, (sample, conditioning, empty, float(guidance_scale)), draw)
        if call is not None:
            call.heads = list(zip(heads[::2], heads[1::2]))
            call.evaluations = len(scheduler.etas) + len(guided)
            call.progress(len(scheduler.etas))
        return found

    def explain(self) -> list[Part]:
        """Say what runs each part and why not something faster, then the graphs that are held."""
        rows = [Part("convolutions, linear layers", f"torch, {self.dtype}", "channels innermost in memory")]
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        for op in ("group_norm_silu", "bias_residual", "dual_head", "coalesce_step"):
            if self.backend == "auto":
                chosen, *reasons = preferred(OPS[op], probe)
            else:
                chosen, reasons = self.backend, [ops.backends(op, probe)[self.backend][1]]
            rows.append(Part.of_op(op, chosen, "; ".join(filter(None, reasons)) or "it can run"))
        for key, size in self.graphs.sizes():
            rows.append(Part("graph", str(key), f"{size / 1e6:.1f} MB"))
        total = f"{self.graphs.bytes() / 1e6:.1f} MB of {self.graphs.most_bytes / 1e6:.0f} MB"
        return [*rows, Part("graphs", f"{len(self.graphs.held)} of {self.graphs.most}", total)]


def graph_bytes(device: torch.device) -> int:
    """Memory for graphs, in bytes. Raises ValueError if the environment variable is no number."""
    given = os.environ.get(VARIABLE)
    if given is None:
        return torch.cuda.get_device_properties(device).total_memory // SHARE
    if not given.isdecimal():
        raise ValueError(f"{VARIABLE} is {given!r}; expected a number of bytes, 0 for no CUDA graphs")
    return int(given)
