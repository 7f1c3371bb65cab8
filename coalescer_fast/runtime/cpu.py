"""A pipeline's networks on a CPU: native programs, or, for a network that does what they have no step for, torch with native ops."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, sampling
from ..models.unet import Conditioning
from ..ops import library
from .base import channels_last_copy, counted, entered, quiet_torch
from .packed import Range, Weights
from .program import Program
from .recorder import Hollow, Recorder, Unsupported, record

if TYPE_CHECKING:
    from ..pipeline import CoalescerPipeline

CALIBRATION = 32  # prompts that 8-bit ranges are found with
VOCABULARY = ("a red apple", "a dog", "a house by the sea", "a smiling face", "a blue car", "a tree", "two people", "a musical instrument")
MOST_PROGRAMS = 32
MOST_BYTES = 2 << 30  # of memory that programs keep; the last one used is kept whatever it has


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


class CpuRuntime:
    """name: the runtime's; backend: of the ops; dtype: of weights and activations. R, directions, distances and pictures are float32.

    The pipeline's own networks stay as they are. What runs is prepared once for every batch and size, and anew when a weight has changed.
    """

    device = torch.device("cpu")

    def __init__(self, pipe: CoalescerPipeline, dtype: torch.dtype, prompts: Sequence[str] = ()):
        self.pipe, self.prompts = pipe, prompts
        self.quantised = dtype == torch.int8
        self.dtype = torch.bfloat16 if self.quantised else dtype
        self.name = "cpu (int8 convolutions)" if self.quantised else "cpu"
        if self.quantised and (reason := no_programs(torch.uint8)):
            raise ValueError(f"dtype 'int8' cannot run: {reason}")
        self.backend = "reference" if library.unavailable() else "cpu"
        self.lock = threading.RLock()
        self.observing = False
        self.refresh()

    def refresh(self) -> None:
        """Take over the pipeline's weights if they are not those that the programs were made of."""
        with self.lock:
            if (state := fingerprint(self.pipe.unet, self.pipe.vae.decoder)) == getattr(self, "state", None):
                return
            self.weights = Weights(self.dtype)
            self.programs: OrderedDict[Any, Program] = OrderedDict()
            self.refused = {name: reason for name in ("unet", "decoder") if (reason := no_programs(self.dtype))}
            self.hollow: dict[str, Hollow] = {}
            self.plain: dict[str, Any] = {}
            self.ranges: dict[int, Range] = {}
            self.given: OrderedDict[int, Given] = OrderedDict()  # of the last two conditionings
            self.empty: Conditioning | None = None
            self.state = state
            if self.quantised:
                self._calibrate()

    @quiet_torch()
    def condition(self, texts: list[str], device: torch.device) -> Conditioning:
        """The reference's, in float32; the empty description's is computed once."""
        if texts != [""]:
            return self.pipe.condition(texts, device)
        with self.lock:
            if self.empty is None:
                self.empty = self.pipe.condition(texts, device)
            return self.empty

    @quiet_torch()
    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        sample = entered(sample, self.device)
        with self.lock:
            given = self.given.get(id(conditioning))
            if given is None or given.conditioning is not conditioning:
                while len(self.given) > 1:
                    self.given.popitem(last=False)
                given = self.given[id(conditioning)] = Given(conditioning)

            def run(unet: Any, recorder: Recorder) -> Iterable[Tensor]:
                unet.set_backend("auto")
                return unet(recorder.given(sample, images=True), given.record(recorder), return_dict=False)

            results = self._run("unet", self.pipe.unet, sample, given, run)
        if results is not None:
            return results[0], results[1]
        unet = self._plain("unet", self.pipe.unet)
        return unet(sample.contiguous(memory_format=torch.channels_last), conditioning.rounded(self.dtype), return_dict=False)

    @quiet_torch()
    def decode(self, latents: Tensor) -> Tensor:
        latents = entered(latents, self.device)

        def run(decoder: Any, recorder: Recorder) -> Iterable[Tensor]:
            return [decoder.layers(recorder.given(latents, images=True))]

        decoder = self.pipe.vae.decoder
        results = self._run("decoder", decoder, torch.tanh(latents / 3) * 3, None, run)
        if results is None:
            x = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
            pictures = self._plain("decoder", decoder)(x).float()
        else:
            pictures = results[0].mul_(2).sub_(1)
        return F.pixel_shuffle(pictures, self.pipe.vae.patch_size)

    def _run(
        self, name: str, network: nn.Module, x: Tensor, given: Given | None, run: Callable[[Any, Recorder], Iterable[Tensor]]
    ) -> list[Tensor] | None:
        """What the network's program gives, copied; None if there can be no program."""
        threads = torch.get_num_threads()
        key = name, threads, x.shape, given and given.shapes
        with self.lock:
            if name in self.refused:
                return None
            if (found := self.programs.get(key)) is None:
                try:
                    if name not in self.hollow:
                        self.hollow[name] = Hollow(network)
                    recorder, outputs = record(self.hollow[name], run)
                    ranges = self.ranges if name == "unet" and not self.observing else None
                    found = counted(Program(recorder, outputs, self.weights, threads, ranges, self.observing))
                except Unsupported as reason:
                    self.refused[name] = str(reason)
                    return None
                self.programs[key] = found
                while len(self.programs) > 1 and (
                    len(self.programs) > MOST_PROGRAMS or sum(p.memory.numel() for p in self.programs.values()) > MOST_BYTES
                ):
                    self.programs.popitem(last=False)
            self.programs.move_to_end(key)
            found.inputs[0].copy_(x)
            if given is not None and found.bound is not given:
                torch._foreach_copy_(found.inputs[1:], given.tensors)
                found.bound = given
            found.run()
            if self.observing and name == "unet":
                found.observe(self.ranges)
            return [y.clone() for y in found.outputs]

    @quiet_torch()
    def _calibrate(self) -> None:
        """Find the ranges of what is to have 8 bits on the way of the two steps, from both evaluations and the empty description's."""
        encoder, config = self.pipe.description_encoder, self.pipe.unet.config
        names = list(self.prompts or encoder.known_names or VOCABULARY)
        prompts = [names[i * len(names) // CALIBRATION] for i in range(CALIBRATION)] if len(names) > CALIBRATION else names
        scheduler, generator = copy.copy(self.pipe.scheduler), torch.Generator().manual_seed(0)
        scheduler.set_timesteps(2)
        self.observing = True
        try:
            for first in range(0, len(prompts), 8):
                some = prompts[first : first + 8]
                noise = torch.randn(len(some), config.latent_channels, config.sample_size, config.sample_size, generator=generator)
                conditioning, empty = (self.condition(texts, self.device) for texts in (self.pipe.with_styles(some, noise), [""]))
                sampling.sample(self, scheduler, noise, conditioning, empty, scheduler.config.guidance_scale)
        finally:
            self.observing = False
            self.programs.clear()

    def _plain(self, name: str, network: nn.Module) -> Any:
        """A copy of the network that torch runs, channels innermost, on native ops."""
        with self.lock:
            if name not in self.plain:
                self.plain[name] = channels_last_copy(network, self.dtype)
                if name == "unet":
                    self.plain[name].set_backend(self.backend)
            return self.plain[name]

    def explain(self) -> list[dict[str, str]]:
        """What runs each part, and why not something faster."""
        rows = []
        for name in ("unet", "decoder"):
            native = name not in self.refused
            way = f"native program, {self.dtype}" if native else f"torch, channels innermost, {self.dtype}"
            if native and name == "unet" and self.quantised:
                way += f", {len(self.ranges)} convolutions in int8"
            rows.append({"part": name, "runs on": way, "because": f"it can run on {library.isa()}" if native else self.refused[name]})
        for op in ("group_norm_silu", "bias_residual", "dual_head", "coalesce_step"):
            if op == "bias_residual" and "unet" not in self.refused:
                rows.append({"part": op, "runs on": "native program", "because": "a convolution adds bias and residual itself"})
                continue
            able, reason = ops.backends(op)[self.backend]
            rows.append({"part": op, "runs on": self.backend, "because": "it can run" if able else reason})
        return rows


class Given:
    """A conditioning as the inputs of a program: tensors, in order, and their shapes."""

    def __init__(self, conditioning: Conditioning):
        self.conditioning = conditioning
        self.tensors = conditioning.tensors()
        self.shapes = tuple(t.shape for t in self.tensors)

    def record(self, recorder: Recorder) -> Conditioning:
        """The conditioning with the recorder's inputs in the place of its tensors."""
        c = self.conditioning
        film = [(recorder.given(scale), recorder.given(shift)) for scale, shift in c.film]
        keys_values = [(recorder.given(k, own=True), recorder.given(v, own=True)) for k, v in c.keys_values]
        anchor = None if c.anchor is None else recorder.given(c.anchor, images=True)
        return Conditioning(film, anchor, keys_values, None if c.mask is None else recorder.given(c.mask))


def fingerprint(*networks: nn.Module) -> list[tuple[int, int]]:
    """Where the weights lie and how often they have been written to: another one after any change of them."""
    found: list[tuple[int, int]] = []

    def visit(module: nn.Module) -> None:
        # not module.parameters(), which takes three times as long, at every call
        for parameter in module._parameters.values():
            if parameter is not None:
                found.append((parameter.data_ptr(), parameter._version))
        for child in module._modules.values():
            if child is not None:
                visit(child)

    for network in networks:
        visit(network)
    return found
