"""A pipeline's networks from exported artefacts, by the engine that they were exported for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...models.unet import Conditioning
from ...ops import native_library
from ...scheduler import CoalescerScheduler
from ..base import Part, PipelineRuntime, counted, entered, quiet_torch
from .artefact import Artefact
from .manifest import KINDS, Schedule

if TYPE_CHECKING:
    from ...pipeline import CoalescerPipeline
    from ...prompts import Descriptions
    from ...sampling import Call, OnStep

Tensors = tuple[Tensor, ...]
# Opens an artefact: returns a function from the graph's inputs to its outputs, both in the manifest's order, that
# several threads may call at once.
Open = Callable[[Artefact], Callable[[Tensors], Tensors]]
# dtype that a precision counts as; what an int8 graph does not quantize counts as half precision
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.float16}


@dataclass
class Described(Conditioning):
    """Descriptions as exported networks take them: what `CoalescerPipeline.describe` returns.

    The graphs compute the rest of the conditioning themselves, so that its other fields are empty.

    Attributes:
        description: Vectors (N, D), and for cross-attention also token rows and their mask.
    """

    description: Tensors = ()

    @classmethod
    def of(cls, description: Tensors) -> Described:
        return cls([], None, [], description=description)

    def expand(self, n: int) -> Described:
        return Described.of(tuple(x.expand(n, *x.shape[1:]) for x in self.description))

    def take(self, rows: Tensor, n: int) -> Described:
        return self if len(rows) == n else Described.of(tuple(x[rows] for x in self.description))


class ExportedRuntime(PipelineRuntime):
    """Runs exported artefacts.

    A call without a callback or trace is one run of the generator, if there is one for its schedule. Otherwise every
    evaluation is a run of the UNet, and decoding a run of the decoder. A network that is not among the artefacts is the
    pipeline's own; but a generator alone refuses a call with another schedule.

    Args:
        pipe: The pipeline.
        name: Name of the runtime.
        artefacts: Artefacts by kind, as `artefact.find` returns them.
        open_artefact: Opens an artefact.

    Raises:
        ValueError: If an artefact cannot be opened, or was made from other networks.
    """

    def __init__(self, pipe: CoalescerPipeline, name: str, artefacts: Mapping[str, Artefact], open_artefact: Open):
        super().__init__(pipe)
        self.name, self.device = name, pipe.device
        self.backend = "auto" if self.device.type != "cpu" else "reference" if native_library.unavailable() else "cpu"
        self.artefacts = artefacts
        self.max_batch = min(each.manifest.batch[2] for each in artefacts.values())
        self.refresh()
        self.runs = {kind: counted(open_artefact(each)) for kind, each in self.artefacts.items()}
        self.coarsest = max((each.manifest.precision for each in artefacts.values()), key=list(PRECISIONS).index)
        self.dtype = PRECISIONS[self.coarsest]

    @property
    def precision(self) -> str:
        return "int8" if self.coarsest == "int8" else super().precision

    def take_over(self) -> None:
        """Check that the pipeline's networks are still those that were exported.

        Raises:
            ValueError: If weights, layers or settings of layers differ.
        """
        for each in self.artefacts.values():
            each.check_weights(self.pipe)

    @quiet_torch()
    def condition(self, texts: Descriptions, device: torch.device) -> Described:
        return Described.of(self.pipe.describe(texts, device))

    @quiet_torch()
    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        assert isinstance(conditioning, Described)
        if "unet" not in self.runs:
            x = entered(sample, self.device)
            direction, distance = self.pipe.unet(x, *conditioning.description, return_dict=False)
            return direction.float(), distance.float()
        direction, distance = self._run("unet", sample, *conditioning.description)
        return direction, distance

    @quiet_torch()
    def decode(self, latents: Tensor) -> Tensor:
        if "decoder" not in self.runs:
            return self.pipe.decode(entered(latents, self.device))
        return self._run("decoder", latents)[0]

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
        """As `Runtime.generate`; one run of the generator if the call asks for what it computes."""
        if "generator" in self.runs and on_step is None:
            assert isinstance(conditioning, Described)
            assert empty is None or isinstance(empty, Described)
            found = self.artefacts["generator"]
            wanted, made = Schedule.of(scheduler, guidance_scale), found.manifest.schedule
            fits = wanted == made and not scheduler.is_auto
            # the empty description is a constant of the graph
            negative = empty is not None and bool(empty.description[0].any())
            if decode and fits and not negative:
                with quiet_torch():
                    pictures = 2 * self._run("generator", sample, *conditioning.description)[0] - 1
                if call is not None:
                    call.evaluations = len(wanted.etas) + len(wanted.guided)
                    call.progress(len(scheduler.etas))
                return pictures
            if "unet" not in self.runs:
                steps = "as many steps as each needs" if scheduler.is_auto else wanted
                asked = f"{steps}{' with a negative prompt' * negative}" if decode else "latents"
                reason = f"{found.folder} is a generator of pictures in {made} and the call asks for {asked}"
                fix = "export that with --steps and --guidance, or --what all, which serves every call"
                raise ValueError(f"{reason}: {fix}")
        return super().generate(scheduler, sample, conditioning, empty, guidance_scale, decode, on_step, call)

    def _run(self, kind: str, *inputs: Tensor) -> Tensors:
        found = self.artefacts[kind]
        found.check_inputs(inputs)
        ports = found.manifest.inputs
        dtypes = [getattr(torch, port.dtype) for port in ports]
        return self.runs[kind](tuple(entered(x, self.device, dtype).contiguous() for x, dtype in zip(inputs, dtypes)))

    def explain(self) -> list[Part]:
        """What runs each part, from which artefact."""
        rows = []
        for part in KINDS:
            if (found := self.artefacts.get(part)) is not None:
                m = found.manifest
                because = f"{found.folder}, {m.schedule or 'any schedule'}, {m.batch[0]} to {m.batch[2]} pictures"
                rows.append(Part(part, f"{self.name}, {m.precision}", because))
            elif part != "generator":
                alone = "in calls with a callback or a trace alone; " if "generator" in self.runs else ""
                rows.append(Part(part, "reference", f"{alone}it is not among the artefacts"))
        return [*rows, Part.of_op("coalesce_step", self.backend, native_library.unavailable() or "it can run")]
