"""`NativeRuntime`: a pipeline's networks as native programs.

This is the only file here that knows our pipeline and its networks.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops, sampling
from ...models.unet import CoalescerUNet, Conditioning
from ...ops import native_library
from ..base import Part, PipelineRuntime, channels_last_copy, counted, entered, quiet_torch
from ..watch import foreign
from .module import floats_of, no_programs
from .pack import Weights
from .program import Program, ProgramCache, Ranges
from .record import MetaCopy, Recorder, record_module
from .value import Unsupported

if TYPE_CHECKING:
    from ...pipeline import CoalescerPipeline
    from ...prompts import Descriptions

# Prompts that the ranges of int8 are found with, and those of an encoder that knows no names.
CALIBRATION = 32
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
# Packages whose modules do nothing but compute with their parameters. Modules of others may have state that no watch
# sees, so they run as they are.
KNOWN = ("coalescer_fast.", "torch.nn.modules.", "diffusers.models.", "peft.tuners.lora.")


class NativeRuntime(PipelineRuntime):
    """Runs a pipeline's networks on a CPU as native programs, made once for every batch and size.

    A network that does what no step does runs in torch, as a copy on native ops. A network that has code of the user's
    in it (hooks, layers of other packages) runs as it is. What the UNet derives from descriptions is computed in
    float32 whatever the dtype. The bits of a picture depend neither on its batch nor on the number of threads.

    Attributes:
        quantised: whether products of the UNet multiply in 8 bits, where that pays; ``dtype`` is that of all other
            values, see `floats_of`.
        networks: "unet", "decoder" and "conditioning", which is what the UNet derives from descriptions.
        ranges: by the size of R (h, w), what `Program` needs for 8 bits.
    """

    device = torch.device("cpu")
    survives_fork = True
    runs_own_code = True

    def __init__(
        self,
        pipe: CoalescerPipeline,
        dtype: torch.dtype,
        prompts: Sequence[str] = (),
        in_torch: str = "",
        winograd_memory: int | None = None,
    ):
        """Take over the networks.

        Args:
            pipe: the pipeline.
            dtype: float32, bfloat16, or int8.
            prompts: those that the ranges of int8 are found with; there is a default.
            in_torch: why UNet and decoder are to run in torch, int8 as bfloat16, or "".
            winograd_memory: see `Weights`.
        """
        super().__init__(pipe)
        self.prompts, self.in_torch, self.winograd_memory = prompts, in_torch, winograd_memory
        self.quantised = dtype == torch.int8 and not in_torch
        self.dtype = floats_of(dtype)
        settings = ["int8 convolutions"] if self.quantised else []
        if winograd_memory is not None:  # receipts hold the name, and it decides bits
            settings.append(f"winograd_memory={winograd_memory}")
        self.name = f"cpu ({', '.join(settings)})" if settings else "cpu"
        if self.quantised and (reason := no_programs(torch.uint8)):
            raise ValueError(f"dtype 'int8' cannot run: {reason}")
        self.backend = "reference" if native_library.unavailable() else "cpu"
        self.refresh()

    @property
    def precision(self) -> str:
        return "int8" if self.quantised else super().precision

    @property
    def refused(self) -> dict[str, str]:
        """The networks that do not run as programs, and why."""
        return {name: network.refused for name, network in self.networks.items() if network.refused}

    def take_over(self) -> None:
        weights = Weights(self.dtype, self.winograd_memory)
        in_float32 = weights if self.dtype == torch.float32 else Weights(torch.float32)
        unet, decoder = self.pipe.unet, self.pipe.vae.decoder
        self.networks = {
            "unet": Network(unet, weights, self.backend),
            "decoder": Network(decoder, Weights(self.dtype, self.winograd_memory), self.backend),
            "conditioning": Network(unet, in_float32, self.backend),
        }
        self.programs = ProgramCache()
        self.ranges: dict[tuple[int, ...], Ranges] = {}
        # While ranges are found: the programs of the UNet that find them.
        self._observers: ProgramCache | None = None
        self._inputs: OrderedDict[int, ConditioningInputs] = OrderedDict()  # of the last two conditionings
        self._empty: Conditioning | None = None
        for name, network in self.networks.items():
            if what := self.code.get(name) or foreign(network.module) or foreign_class(network.module):
                network.refused, network.has_own_code = what, True
            elif name == "conditioning":
                network.refused = native_library.unavailable()
            else:
                network.refused = self.in_torch or no_programs(self.dtype)
        if self.quantised:
            size = self.pipe.unet.config.sample_size
            self._calibrate((size, size))

    def condition(self, texts: Descriptions, device: torch.device) -> Conditioning:
        """As `Runtime.condition`, in float32; that of the empty description is computed once."""
        with self.lock:
            if texts == [""] and self._empty is not None:
                return self._empty
            if self.networks["conditioning"].has_own_code:
                with quiet_torch():
                    return self.pipe.condition(texts, device)
            found = self.conditioning(self.pipe.describe(texts, device))
            if texts == [""]:
                self._empty = found
            return found

    def conditioning(self, described: tuple[Tensor, ...]) -> Conditioning:
        """Compute what the UNet derives from encoded descriptions.

        Args:
            described: vectors (N, D) and, with cross-attention, token rows (N, L, D) and their mask (N, L).
        """
        described = tuple(x.float() if x.is_floating_point() else x for x in described)
        vectors, *rest = described

        def run(unet: Any, recorder: Recorder) -> Iterable[Tensor]:
            found: Conditioning = unet.condition(*map(recorder.input, (vectors, *rest[:1])))
            return found.tensors()

        results = self._run("conditioning", run, vectors, tuple(rest[:1]), described)
        conditioning: Conditioning
        if results is None:
            with quiet_torch():
                conditioning = self.pipe.unet.condition(*described)
        else:
            conditioning = self.pipe.unet.as_conditioning(results, rest[1] if len(rest) > 1 else None)
        return conditioning

    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        sample = entered(sample, self.device)
        network = self.networks["unet"]
        with self.lock:
            if self.quantised and self._observers is None and not network.refused:
                size = tuple(sample.shape[2:])
                if size not in self.ranges:
                    self._calibrate(size)
            inputs = self._inputs_of(conditioning)

            def run(unet: Any, recorder: Recorder) -> Iterable[Tensor]:
                x, given = recorder.input(sample, image=True), inputs.record(recorder)
                results: tuple[Tensor, Tensor] = unet(x, given, return_dict=False)
                return results

            results = self._run("unet", run, sample, inputs.tensors, inputs)
        if results is not None:
            return results[0], results[1]
        with quiet_torch():
            if network.has_own_code:
                direction, distance = self.pipe.evaluate(sample, conditioning)
                return direction.float(), distance.float()
            with self.lock:
                unet = network.in_torch
            x = sample.contiguous(memory_format=torch.channels_last)
            direction, distance = unet(x, conditioning.rounded(self.dtype), return_dict=False)
            return direction, distance

    def decode(self, latents: Tensor) -> Tensor:
        latents = entered(latents, self.device)
        network = self.networks["decoder"]

        def run(decoder: Any, recorder: Recorder) -> Iterable[Tensor]:
            return [decoder(recorder.input(latents, image=True))]

        results = self._run("decoder", run, latents)
        if results is None:
            with quiet_torch():
                if network.has_own_code:
                    return self.pipe.decode(latents)
                with self.lock:
                    decoder = network.in_torch
                x = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
                results = [decoder(x).float()]
        return F.pixel_shuffle(results[0], self.pipe.vae.patch_size)

    def _inputs_of(self, conditioning: Conditioning) -> ConditioningInputs:
        """The conditioning as inputs of a program, the same object for the same conditioning while it is in use."""
        found = self._inputs.get(id(conditioning))
        if found is None or found.conditioning is not conditioning:
            while len(self._inputs) > 1:
                self._inputs.popitem(last=False)
            found = self._inputs[id(conditioning)] = ConditioningInputs(conditioning)
        return found

    def _run(
        self,
        name: str,
        run: Callable[[Any, Recorder], Iterable[Tensor]],
        x: Tensor,
        others: tuple[Tensor, ...] = (),
        bound: object = None,
    ) -> list[Tensor] | None:
        """Run a network's program, which is made if it is not there.

        Args:
            name: of the network.
            run: calls the network to be recorded, see `record_module`.
            x: its first input.
            others: the rest of its inputs.
            bound: stands for ``others``, which are written to the program's inputs if it is another object than in the
                program's last run.

        Returns:
            The outputs, in memory of their own, or None if the network does not run as a program.
        """
        threads = torch.get_num_threads()
        key = name, threads, x.shape, *(t.shape for t in others)
        with self.lock:
            network = self.networks[name]
            if network.refused:
                return None
            observers = self._observers if name == "unet" else None
            programs = self.programs if observers is None else observers
            if (program := programs.get(key)) is None:
                ranges = self.ranges.get(tuple(x.shape[2:])) if name == "unet" and observers is None else None
                try:
                    recording = record_module(network.meta_copy, run)
                    program = Program(recording, network.weights, threads, ranges)
                    network.described = program.described if observers is None else None
                except Unsupported as reason:
                    network.refused = str(reason)
                    return None
                programs.add(key, counted(program))
            program.inputs[0].copy_(x)
            if others and program.bound is not bound:
                torch._foreach_copy_(program.inputs[1:], others)
                program.bound = bound
            if observers is None:
                program.run()
            else:
                program.observe(self.ranges.setdefault(tuple(x.shape[2:]), {}))
            return [y.clone() for y in program.outputs]

    @quiet_torch()
    def _calibrate(self, size: tuple[int, ...]) -> None:
        """Find the ranges for R of a size: of the values in both evaluations of the prompts, and of the empty one."""
        encoder, config = self.pipe.description_encoder, self.pipe.unet.config
        names = list(self.prompts or encoder.known_names or VOCABULARY)
        count = min(CALIBRATION, len(names))
        prompts = [names[i * len(names) // count] for i in range(count)]
        scheduler, generator = copy.copy(self.pipe.scheduler), torch.Generator().manual_seed(0)
        scheduler.set_timesteps(2)
        self._observers = ProgramCache()
        try:
            for first in range(0, len(prompts), 8):
                some = prompts[first : first + 8]
                noise = torch.randn(len(some), config.latent_channels, *size, generator=generator, dtype=torch.float32)
                texts = self.pipe.with_styles(some, noise)
                conditioning, empty = self.condition(texts, self.device), self.condition([""], self.device)
                sampling.sample(self, scheduler, noise, conditioning, empty, scheduler.config.guidance_scale)
        except BaseException:  # ranges of a part of the prompts are none
            self.ranges.pop(size, None)
            raise
        finally:
            self._observers = None

    def explain(self) -> list[Part]:
        rows = []
        for name, network in self.networks.items():
            dtype = network.weights.dtype
            way, because = f"torch, channels innermost, {dtype}", network.refused
            if not network.refused:
                way, because = f"native program, {dtype}", f"it can run on {native_library.isa()}"
                if network.described is not None:
                    way += network.described
                else:
                    way += ", int8 where it pays" if name == "unet" and self.quantised else ""
                    because += "; it is recorded at its first call"
            elif network.has_own_code or name == "conditioning":
                way = "reference"
            rows.append(Part(name, way, because))
        unet = self.networks["unet"]
        for op in ("group_norm_silu", "bias_residual", "dual_head", "coalesce_step"):
            if op == "bias_residual" and not unet.refused:
                rows.append(Part(op, "native program", "a convolution adds bias and residual itself"))
                continue
            backend = "reference" if unet.has_own_code and op != "coalesce_step" else self.backend
            able, reason = ops.backends(op)[backend]
            rows.append(Part.of_op(op, backend, "it can run" if able else reason))
        return rows


class Network:
    """One of the pipeline's networks, and the copies of it that run in its place.

    Attributes:
        module: the pipeline's own, which stays as it is.
        weights: packed, for programs of their dtype.
        refused: why it does not run as a program, or "".
        has_own_code: whether code of the user's is in it, so that nothing runs in its place.
        described: what `Program.described` says of the last one, None before there is one.
    """

    def __init__(self, module: nn.Module, weights: Weights, backend: str):
        """``backend`` is that of its ops where it runs in torch."""
        self.module, self.weights, self._backend = module, weights, backend
        self.refused, self.has_own_code = "", False
        self.described: str | None = None

    @cached_property
    def meta_copy(self) -> MetaCopy:
        """What is recorded. Raises Unsupported if the network cannot be copied."""
        copied = MetaCopy(self.module)
        if isinstance(copied.module, CoalescerUNet):
            copied.module.set_backend("auto")  # calls the ops as torch ops, which a recorder sees
        return copied

    @cached_property
    def in_torch(self) -> Any:
        """A copy that torch runs, channels innermost."""
        copied = channels_last_copy(self.module, self.weights.dtype)
        if isinstance(copied, CoalescerUNet):
            copied.set_backend(self._backend)
        return copied


def foreign_class(network: nn.Module) -> str:
    """A layer of a class that is not of `KNOWN`, in words, or ""."""
    for name, module in network.named_modules():
        kind = type(module)
        if not kind.__module__.startswith(KNOWN):
            return f"{name or 'it'} is a {kind.__module__}.{kind.__qualname__}"
    return ""


class ConditioningInputs:
    """A conditioning as the inputs of a program.

    Attributes:
        conditioning: the conditioning.
        tensors: all of its tensors, in the order of the inputs.
    """

    def __init__(self, conditioning: Conditioning):
        self.conditioning = conditioning
        self.tensors = tuple(conditioning.tensors())

    def record(self, recorder: Recorder) -> Conditioning:
        """A conditioning whose tensors are inputs of the recorder."""
        c = self.conditioning
        film = [(recorder.input(scale), recorder.input(shift)) for scale, shift in c.film]
        keys_values = [(recorder.input(k, rounded=True), recorder.input(v, rounded=True)) for k, v in c.keys_values]
        anchor = None if c.anchor is None else recorder.input(c.anchor, image=True)
        return Conditioning(film, anchor, keys_values, None if c.mask is None else recorder.input(c.mask))
