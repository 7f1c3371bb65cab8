"""Calls of the float32 reference, with everything that goes into its networks and comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch import Tensor

from coalescer_fast.models.unet import Conditioning
from coalescer_fast.parity import descriptions
from coalescer_fast.pipeline import CoalescerPipeline, CoalescerPipelineOutput
from coalescer_fast.prompts import Descriptions
from coalescer_fast.runtime.base import Part, Runtime
from coalescer_fast.runtime.engines.exported import Described
from coalescer_fast.runtime.engines.manifest import Manifest

Tensors = tuple[Tensor, ...]
Run = Callable[[Tensors], Tensors]  # runs a graph
BATCHES = (1, 2, 5)  # batch sizes to compare


def _empty() -> Tensor:
    return torch.empty(0, dtype=torch.float32)


@dataclass
class Trajectory:
    """One call of the pipeline.

    Attributes:
        noise: Where it starts, (N, C, h, w).
        description: Inputs of the UNet that describe the prompts, see `Described`.
        evaluations: Inputs (R, *description) and outputs (direction, distance) of each evaluation of the UNet, in
            order, those of the empty description included.
        latents: Input of the decoder, (N, C, h, w).
        decoded: Output of the decoder, (N, 3, H, W), about in [-1, 1].
        pictures: The pictures, (N, 3, H, W), in [0, 1].
    """

    noise: Tensor
    description: Tensors = ()
    evaluations: list[tuple[Tensors, Tensors]] = field(default_factory=list)
    latents: Tensor = field(default_factory=_empty)
    decoded: Tensor = field(default_factory=_empty)
    pictures: Tensor = field(default_factory=_empty)

    def calls(self, kind: str) -> list[tuple[Tensors, Tensors]]:
        """Inputs and outputs that a graph of this kind would have had, once for each run."""
        if kind == "unet":
            return self.evaluations
        if kind == "decoder":
            return [((self.latents,), (self.decoded,))]
        return [((self.noise, *self.description), (self.pictures,))]


class RecordedReference(Runtime):
    """The float32 reference, or another UNet, that notes its inputs and outputs in a `Trajectory`.

    Args:
        pipe: The pipeline.
        run: Runs the UNet; the pipeline's own if None.
    """

    name, backend, dtype = "reference", "reference", torch.float32

    def __init__(self, pipe: CoalescerPipeline, run: Run | None):
        super().__init__(pipe)
        self.trajectory: Trajectory  # of the current call
        self.device, self.run = pipe.device, run
        self.unet = copy.deepcopy(pipe.unet)
        self.unet.set_backend("reference")

    def condition(self, texts: Descriptions, device: torch.device) -> Described:
        return Described.of(self.pipe.describe(texts, device))

    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        assert isinstance(conditioning, Described)
        if not self.trajectory.evaluations:
            self.trajectory.description = conditioning.description
        inputs = (sample, *conditioning.description)
        direction, distance = self.unet(*inputs, return_dict=False) if self.run is None else self.run(inputs)
        self.trajectory.evaluations.append((inputs, (direction, distance)))
        return direction, distance

    def decode(self, latents: Tensor) -> Tensor:
        self.trajectory.latents, self.trajectory.decoded = latents, self.pipe.decode(latents)
        return self.trajectory.decoded

    def explain(self) -> list[Part]:
        return [Part("all", self.name, "its inputs and outputs are recorded")]


def trajectories(
    pipe: CoalescerPipeline,
    prompts: int | Sequence[str],
    batches: Sequence[int] = (1,),
    seed: int = 0,
    steps: int = 2,
    guidance: float | None = None,
    run: Run | None = None,
) -> Iterator[Trajectory]:
    """Call the reference and record each call.

    The prompts that are drawn, their order, and the noise depend on the seed alone.

    Args:
        pipe: The pipeline; its runtime is as before after each call.
        prompts: Prompts, or how many to draw from the names that the model was trained on.
        batches: Batch sizes of the calls, used in turn until there are no prompts left.
        seed: Of the prompts and the noise.
        steps: Number of steps.
        guidance: Guidance scale, the model's own if None.
        run: Runs a UNet instead of the pipeline's own.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = list(descriptions(pipe, prompts, generator))
    runtime = pipe.runtime
    recorded = RecordedReference(pipe, run)
    sizes = cycle(batches)
    bars = getattr(pipe, "_progress_bar_config", {})
    while texts:
        size = next(sizes)
        part, texts = texts[:size], texts[size:]
        part += [part[-1]] * (min(batches) - len(part))  # a graph may not take smaller batches
        noise = pipe.initial_noise(len(part), generator)
        recorded.trajectory = Trajectory(noise)
        try:
            pipe.runtime = recorded
            pipe.set_progress_bar_config(**{**bars, "disable": True})
            output = pipe(part, num_inference_steps=steps, guidance_scale=guidance, latents=noise, output_type="pt")
        finally:
            pipe.runtime = runtime
            pipe.set_progress_bar_config(**bars)
        assert isinstance(output, CoalescerPipelineOutput)
        assert isinstance(output.images, Tensor)
        recorded.trajectory.pictures = output.images
        yield recorded.trajectory


def batches(manifest: Manifest) -> tuple[int, ...]:
    """`BATCHES`, each moved into the range that the graph takes."""
    least, _, most = manifest.batch
    return tuple(dict.fromkeys(min(max(size, least), most) for size in BATCHES))


def steps_and_guidance(manifest: Manifest) -> tuple[int, float | None]:
    """Steps and guidance scale of the calls that a graph is measured in: those of a generator, else the default."""
    made = manifest.schedule
    return (2, None) if made is None else (len(made.etas), made.guidance_scale)


def graph_inputs(pipe: CoalescerPipeline, manifest: Manifest, prompts: Sequence[str], seed: int) -> list[Tensors]:
    """Inputs of a graph in calls with these prompts, in batches of the size that it is best for."""
    steps, guidance = steps_and_guidance(manifest)
    recorded = trajectories(pipe, prompts, (manifest.batch[1],), seed, steps, guidance)
    return [inputs for trajectory in recorded for inputs, _ in trajectory.calls(manifest.kind)]
