"""A pipeline's networks on a CPU: native programs, or, for a network that does what they have no step for, torch with native ops."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, sampling
from ..models.unet import Conditioning
from ..ops import library
from .base import Part, PipelineRuntime, channels_last_copy, counted, entered, quiet_torch
from .packed import Range, Weights
from .program import Program
from .recorder import Hollow, Recorder, Unsupported, record
from .watch import foreign

if TYPE_CHECKING:
    from ..pipeline import CoalescerPipeline
    from ..prompts import Descriptions

CALIBRATION = 32  # prompts that 8-bit ranges are found with
VOCABULARY = (
    "a red apple",
    "a dog",
    "a house by the sea",
    "a smiling face",
    "a blue car",
    "a tree",
    "two people",
    "a musical instrument",
)
MOST_PROGRAMS = 32
MOST_BYTES = 2 << 30  # of memory that programs keep; the last one used is kept whatever it has
# whose classes do nothing but compute with their parameters; what others do, a program cannot know
KNOWN = ("coalescer_fast.", "torch.nn.modules.", "diffusers.models.", "peft.tuners.lora.")


def native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; without, it is emulated, and slower than float32."""
    return torch.bfloat16 in library.products()


def no_programs(dtype: torch.dtype) -> str:
    """Why no network can run as a program of this dtype here, or ""."""
    if reason := library.unavailable():
        return reason
    if dtype not in library.products():
        return f"the processor does not multiply {str(dtype).removeprefix('torch.')} itself"
    # vectors of four floats are no match for torch's own convolutions
    return "the processor has neither AVX2 nor AVX-512" if library.isa() == "portable" else ""


class CpuRuntime(PipelineRuntime):
    """name: the runtime's; backend: of the ops; dtype: of weights and activations. R, directions, distances and
    pictures are float32.

    The pipeline's own networks stay as they are. What runs is prepared once for every batch and size, and anew when
    they have changed. What descriptions alone decide is computed in float32, also by a program: the bits of a picture
    depend neither on its batch nor on threads.
    """

    device = torch.device("cpu")
    survives_fork = True
    runs_own_code = True

    def __init__(self, pipe: CoalescerPipeline, dtype: torch.dtype, prompts: Sequence[str] = ()):
        super().__init__(pipe)
        self.prompts = prompts
        self.quantised = dtype == torch.int8
        self.dtype = torch.bfloat16 if self.quantised else dtype
        self.name = "cpu (int8 convolutions)" if self.quantised else "cpu"
        if self.quantised and (reason := no_programs(torch.uint8)):
            raise ValueError(f"dtype 'int8' cannot run: {reason}")
        self.backend = "reference" if library.unavailable() else "cpu"
        self.observing = False
        self.refresh()

    @property
    def precision(self) -> str:
        return "int8" if self.quantised else super().precision

    def take_over(self) -> None:
        """Forget what was prepared; with 8 bits, find the ranges anew."""
        self.weights = {dtype: Weights(dtype) for dtype in (torch.float32, self.dtype)}
        self.programs: OrderedDict[Any, Program] = OrderedDict()
        # why a network cannot run as a program; those whose own code has to run
        self.refused: dict[str, str] = {}
        self.own: set[str] = set()
        self.hollow: dict[str, Hollow] = {}
        self.plain: dict[str, Any] = {}
        self.ranges: dict[tuple[int, int], dict[int, Range]] = {}  # by the size of R
        self.given: OrderedDict[int, Given] = OrderedDict()  # of the last two conditionings
        self.empty: Conditioning | None = None
        for name, network in self._networks().items():
            if what := self.code.get(name) or foreign(network) or others(network):
                self.refused[name] = what
                self.own.add(name)
            elif reason := library.unavailable() if name == "conditioning" else no_programs(self.dtype):
                self.refused[name] = reason
        if self.quantised:
            size = self.pipe.unet.config.sample_size
            self._calibrate((size, size))

    def _networks(self) -> dict[str, nn.Module]:
        return {"unet": self.pipe.unet, "decoder": self.pipe.vae.decoder, "conditioning": self.pipe.unet}

    def condition(self, texts: Descriptions, device: torch.device) -> Conditioning:
        """What the UNet derives from descriptions alone, in float32; of the empty description, it is computed once."""
        with self.lock:
            if texts == [""] and self.empty is not None:
                return self.empty
            if "conditioning" in self.own:
                with quiet_torch():
                    return self.pipe.condition(texts, device)
            found = self.conditioning(self.pipe.describe(texts, device))
            if texts == [""]:
                self.empty = found
            return found

    def conditioning(self, described: tuple[Tensor, ...]) -> Conditioning:
        """The same of description vectors (N, D) and, with cross-attention, token rows (N, L, D) and their mask (N, L)."""
        described = tuple(x.float() if x.is_floating_point() else x for x in described)
        vectors, *rest = described

        def run(unet: Any, recorder: Recorder) -> Iterable[Tensor]:
            return unet.condition(*map(recorder.given, (vectors, *rest[:1]))).tensors()

        results = self._run("conditioning", vectors, tuple(rest[:1]), described, run, torch.float32)
        if results is None:
            with quiet_torch():
                return self.pipe.unet.condition(*described)
        return self.pipe.unet.as_conditioning(results, rest[1] if len(rest) > 1 else None)

    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        sample = entered(sample, self.device)
        with self.lock:
            if (
                self.quantised
                and "unet" not in self.refused
                and not self.observing
                and tuple(sample.shape[2:]) not in self.ranges
            ):
                self._calibrate((sample.shape[2], sample.shape[3]))
            given = self.given.get(id(conditioning))
            if given is None or given.conditioning is not conditioning:
                while len(self.given) > 1:
                    self.given.popitem(last=False)
                given = self.given[id(conditioning)] = Given(conditioning)
            record_given = given.record

            def run(unet: Any, recorder: Recorder) -> Iterable[Tensor]:
                return unet(recorder.given(sample, images=True), record_given(recorder), return_dict=False)

            results = self._run("unet", sample, given.tensors, given, run, self.dtype)
        if results is not None:
            return results[0], results[1]
        with quiet_torch():
            if "unet" in self.own:
                direction, distance = self.pipe.evaluate(sample, conditioning)
                return direction.float(), distance.float()
            x, unet = sample.contiguous(memory_format=torch.channels_last), self._plain("unet", self.pipe.unet)
            return unet(x, conditioning.rounded(self.dtype), return_dict=False)

    def decode(self, latents: Tensor) -> Tensor:
        latents = entered(latents, self.device)

        def run(decoder: Any, recorder: Recorder) -> Iterable[Tensor]:
            return [decoder(recorder.given(latents, images=True))]

        results = self._run("decoder", latents, (), None, run, self.dtype)
        if results is None:
            with quiet_torch():
                if "decoder" in self.own:
                    return self.pipe.decode(latents)
                x = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
                results = [self._plain("decoder", self.pipe.vae.decoder)(x).float()]
        return F.pixel_shuffle(results[0], self.pipe.vae.patch_size)

    def _run(
        self,
        name: str,
        x: Tensor,
        others: tuple[Tensor, ...],
        bound: object,
        run: Callable[[Any, Recorder], Iterable[Tensor]],
        dtype: torch.dtype,
    ) -> list[Tensor] | None:
        """What the network's program gives for x and others, copied; None if there can be no program. ``bound``: says
        what others hold, which are copied into the program's memory when it is another object than last time."""
        threads = torch.get_num_threads()
        key = name, threads, x.shape, *(t.shape for t in others)
        with self.lock:
            if name in self.refused:
                return None
            if (found := self.programs.get(key)) is None:
                try:
                    if name not in self.hollow:
                        self.hollow[name] = Hollow(self._networks()[name])
                    recorder, outputs = record(self.hollow[name], run)
                    ranges = self.ranges.get(tuple(x.shape[2:])) if name == "unet" and not self.observing else None  # type: ignore[arg-type]
                    found = counted(Program(recorder, outputs, self.weights[dtype], threads, ranges, self.observing))
                except Unsupported as reason:
                    self.refused[name] = str(reason)
                    return None
                self.programs[key] = found
                while len(self.programs) > 1 and (
                    len(self.programs) > MOST_PROGRAMS
                    or sum(p.memory.numel() for p in self.programs.values()) > MOST_BYTES
                ):
                    self.programs.popitem(last=False)
            self.programs.move_to_end(key)
            found.inputs[0].copy_(x)
            if others and found.bound is not bound:
                torch._foreach_copy_(found.inputs[1:], others)
                found.bound = bound
            found.run()
            if self.observing and name == "unet":
                found.observe(self.ranges.setdefault(tuple(x.shape[2:]), {}))  # type: ignore[arg-type]
            return [y.clone() for y in found.outputs]

    @quiet_torch()
    def _calibrate(self, size: tuple[int, int]) -> None:
        """Find the ranges of what is to have 8 bits on the way of the two steps, from both evaluations and the empty description's."""
        encoder, config = self.pipe.description_encoder, self.pipe.unet.config
        names = list(self.prompts or encoder.known_names or VOCABULARY)
        prompts = (
            [names[i * len(names) // CALIBRATION] for i in range(CALIBRATION)] if len(names) > CALIBRATION else names
        )
        scheduler, generator = copy.copy(self.pipe.scheduler), torch.Generator().manual_seed(0)
        scheduler.set_timesteps(2)
        self.observing = True
        try:
            for first in range(0, len(prompts), 8):
                some = prompts[first : first + 8]
                noise = torch.randn(len(some), config.latent_channels, *size, generator=generator, dtype=torch.float32)
                conditioning, empty = (
                    self.condition(texts, self.device) for texts in (self.pipe.with_styles(some, noise), [""])
                )
                sampling.sample(self, scheduler, noise, conditioning, empty, scheduler.config.guidance_scale)
        except BaseException:  # ranges of a part of the prompts are none
            self.ranges.pop(size, None)
            raise
        finally:
            self.observing = False
            for key in [key for key in self.programs if key[0] == "unet" and tuple(key[2][2:]) == size]:
                del self.programs[key]

    def _plain(self, name: str, network: nn.Module) -> Any:
        """A copy of the network that torch runs, channels innermost, on native ops."""
        with self.lock:
            if name not in self.plain:
                self.plain[name] = channels_last_copy(network, self.dtype)
                if name == "unet":
                    self.plain[name].set_backend(self.backend)
            return self.plain[name]

    def explain(self) -> list[Part]:
        """What runs each part, and why not something faster."""
        rows = []
        for name in self._networks():
            native, dtype = name not in self.refused, torch.float32 if name == "conditioning" else self.dtype
            way = f"native program, {dtype}" if native else f"torch, channels innermost, {dtype}"
            if name in self.own or (name == "conditioning" and not native):
                way = "reference"
            if native and name == "unet" and self.quantised:
                way += f", {max(map(len, self.ranges.values()))} convolutions in int8"
            rows.append(Part(name, way, f"it can run on {library.isa()}" if native else self.refused[name]))
        for op in ("group_norm_silu", "bias_residual", "dual_head", "coalesce_step"):
            if op == "bias_residual" and "unet" not in self.refused:
                rows.append(Part(op, "native program", "a convolution adds bias and residual itself"))
                continue
            backend = "reference" if "unet" in self.own and op != "coalesce_step" else self.backend
            able, reason = ops.backends(op)[backend]
            rows.append(Part.of_op(op, backend, "it can run" if able else reason))
        return rows


def others(network: nn.Module) -> str:
    """A layer of a class that is not of `KNOWN`, in words, or ""."""
    for name, module in network.named_modules():
        kind = type(module)
        if not kind.__module__.startswith(KNOWN):
            return f"{name or 'it'} is a {kind.__module__}.{kind.__qualname__}"
    return ""


class Given:
    """A conditioning as the inputs of a program: tensors, in order."""

    def __init__(self, conditioning: Conditioning):
        self.conditioning = conditioning
        self.tensors = tuple(conditioning.tensors())

    def record(self, recorder: Recorder) -> Conditioning:
        """The conditioning with the recorder's inputs in the place of its tensors."""
        c = self.conditioning
        film = [(recorder.given(scale), recorder.given(shift)) for scale, shift in c.film]
        keys_values = [(recorder.given(k, own=True), recorder.given(v, own=True)) for k, v in c.keys_values]
        anchor = None if c.anchor is None else recorder.given(c.anchor, images=True)
        return Conditioning(film, anchor, keys_values, None if c.mask is None else recorder.given(c.mask))
