"""A pipeline's networks from exported artefacts, by the engine that they were exported for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.unet import Conditioning
from ..ops import library
from ..scheduler import CoalescerScheduler
from . import artefact
from .artefact import Artefact, Schedule
from .base import Part, PipelineRuntime, counted, entered, quiet_torch

if TYPE_CHECKING:
    from ..pipeline import CoalescerPipeline
    from ..prompts import Descriptions
    from ..sampling import Call, OnStep

Tensors = tuple[Tensor, ...]
# of an artefact: a function of its inputs, in order, that gives its outputs; several threads may call it at once
Open = Callable[[Artefact], Callable[[Tensors], Tensors]]
# what an int8 graph does not quantise counts as half precision
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.float16}


@dataclass
class Described(Conditioning):
    """Descriptions as exported networks take them, which derive the rest: `CoalescerPipeline.describe`."""

    description: Tensors = ()

    def expand(self, n: int) -> Described:
        return Described([], None, [], description=tuple(x.expand(n, *x.shape[1:]) for x in self.description))


class ExportedRuntime(PipelineRuntime):
    """name: the runtime's; artefacts: by kind, as of `artefact.find`; open_artefact: makes one callable.

    A call without callback and trace is one run of the generator, where there is one for its schedule; else each evaluation is a run of
    the UNet and the decoding one of the decoder. What is not among the artefacts is the pipeline's own, see `explain`; but a generator
    alone refuses a call with another schedule.

    Raises: ValueError for artefacts that cannot be opened or were made of other networks.
    """

    def __init__(self, pipe: CoalescerPipeline, name: str, artefacts: Mapping[str, Artefact], open_artefact: Open):
        super().__init__(pipe)
        self.name, self.device = name, pipe.device
        self.backend = "auto" if self.device.type != "cpu" else "reference" if library.unavailable() else "cpu"
        self.artefacts = artefacts
        self.max_batch = min(each.manifest.batch[2] for each in artefacts.values())
        self.refresh()
        self.runs = {kind: counted(open_artefact(each)) for kind, each in self.artefacts.items()}
        # of several, the coarsest
        precision = max((each.manifest.precision for each in self.artefacts.values()), key=list(DTYPES).index)
        self.dtype, self.quantised = DTYPES[precision], precision == "int8"

    @property
    def precision(self) -> str:
        return "int8" if self.quantised else super().precision

    def take_over(self) -> None:
        """Raise ValueError if the pipeline's networks are not those that were exported: other weights, layers or settings of layers, or
        hooks and patches, which no graph has."""
        for each in self.artefacts.values():
            each.check_weights(self.pipe)

    @quiet_torch()
    def condition(self, texts: Descriptions, device: torch.device) -> Described:
        return Described([], None, [], description=self.pipe.describe(texts, device))

    @quiet_torch()
    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        assert isinstance(conditioning, Described)
        if "unet" not in self.runs:
            direction, distance = self.pipe.unet(
                entered(sample, self.device), *conditioning.description, return_dict=False
            )
            return direction.float(), distance.float()
        direction, distance = self._run("unet", sample, *conditioning.description)
        return direction, distance

    @quiet_torch()
    def decode(self, latents: Tensor) -> Tensor:
        return (
            self._run("decoder", latents)[0]
            if "decoder" in self.runs
            else self.pipe.decode(entered(latents, self.device))
        )

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
        """The latents of `sampling.sample`, or with ``decode`` their pictures, about in [-1, 1]."""
        if "generator" in self.runs and on_step is None:
            assert isinstance(conditioning, Described)
            assert empty is None or isinstance(empty, Described)
            found = self.artefacts["generator"]
            wanted, made = Schedule.of(scheduler, guidance_scale), found.manifest.schedule
            negative = empty is not None and bool(
                empty.description[0].any()
            )  # a generator has the empty description inside
            if decode and wanted == made and not negative:
                with quiet_torch():
                    pictures = 2 * self._run("generator", sample, *conditioning.description)[0] - 1
                if call is not None:
                    call.progress(len(scheduler.etas))
                return pictures
            if "unet" not in self.runs:
                asked = f"{wanted}{' with a negative prompt' * negative}" if decode else "latents"
                reason = f"{found.folder} is a generator of pictures in {made} and the call asks for {asked}"
                raise ValueError(
                    f"{reason}: export that with --steps and --guidance, or --what all, which serves every call"
                )
        return super().generate(scheduler, sample, conditioning, empty, guidance_scale, decode, on_step, call)

    def _run(self, kind: str, *inputs: Tensor) -> Tensors:
        found = self.artefacts[kind]
        found.check_inputs(inputs)
        ports = found.manifest.inputs
        return self.runs[kind](
            tuple(entered(x, self.device, getattr(torch, p.dtype)).contiguous() for p, x in zip(ports, inputs))
        )

    def explain(self) -> list[Part]:
        """What runs each part, from which artefact."""
        rows = []
        for part in artefact.KINDS:
            if (found := self.artefacts.get(part)) is not None:
                m = found.manifest
                because = f"{found.folder}, {m.schedule or 'any schedule'}, {m.batch[0]} to {m.batch[2]} pictures"
                rows.append(Part(part, f"{self.name}, {m.precision}", because))
            elif part != "generator":
                alone = "in calls with a callback or a trace alone; " if "generator" in self.runs else ""
                rows.append(Part(part, "reference", f"{alone}it is not among the artefacts"))
        return [*rows, Part.of_op("coalesce_step", self.backend, library.unavailable() or "it can run")]
