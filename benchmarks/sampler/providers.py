"""What `benchmarks.sampler` compares: a pipeline run by `coalescer_fast.accelerate`, and by every peer at its best."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import disable_progress_bar
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import coalescer_fast
from coalescer_fast import sampling
from coalescer_fast.acceleration import RUNTIMES, accelerate
from coalescer_fast.bench import timing
from coalescer_fast.bench.peers import Missing, Peers
from coalescer_fast.models import CoalescerAutoencoder, CoalescerUNet, DescriptionEncoder
from coalescer_fast.pipeline import CoalescerPipeline
from coalescer_fast.runtime.eager import EagerRuntime
from coalescer_fast.runtime.engines import compiled, openvino
from coalescer_fast.runtime.engines.onnx import export
from coalescer_fast.runtime.engines.per_shape import Bind, Evaluation, PerShapeRuntime, Tensors
from coalescer_fast.scheduler import CoalescerScheduler

from ..harness.int8 import quantized

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANDOM = "random weights, timing only"
CALLS = 4  # whose R are used to find the ranges of 8 bits

Prepare = Callable[[nn.Module, Tensors, torch.dtype, Path], Bind]


def load(model: str, device: torch.device) -> CoalescerPipeline:
    """emoji-64 as it is embedded; m and l with random weights, and other components that only complete the pipeline."""
    disable_progress_bar()
    pipe = CoalescerPipeline.from_pretrained("emoji-64")
    if model != "emoji-64":
        torch.manual_seed(0)
        unet = CoalescerUNet.named(model).eval()
        for parameter in unet.parameters():
            # a residual branch that starts at zero would make the output trivial
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.5 / parameter[0].numel() ** 0.5)
        encoder = pipe.description_encoder
        if (dim := unet.config.description_dim) != encoder.config.dim:
            table = torch.randint(-127, 128, (encoder.config.vocab_size, dim), dtype=torch.int8)
            encoder = DescriptionEncoder.from_table(
                table.numpy(), torch.full((dim,), 1 / 64).numpy(), encoder.vocab.numpy()
            ).eval()
        vae = CoalescerAutoencoder(2, unet.config.latent_channels, 8, (1, 1, 1), (1, 1, 1)).eval()
        pipe = CoalescerPipeline(unet, CoalescerScheduler(), encoder, vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def eager(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path) -> Bind:
    """As users have it: float32, contiguous."""
    return lambda rest: lambda x: module(x, *rest)


def eager_channels_last(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path) -> Bind:
    return eager(compiled.channels_last(module, dtype), args, dtype, folder)


class EagerCopies(PerShapeRuntime):
    """Copies of the networks that torch runs as they are, also under the hooks of a FLOP counter."""

    runs_own_code = True


def run_eagerly(name: str, prepare: Prepare, pipe: CoalescerPipeline, dtype: torch.dtype) -> None:
    """Give the pipeline a runtime whose networks are prepared so."""
    pipe.runtime = EagerCopies(pipe, name, prepare, dtype)
    pipe.runtime.backend = "reference"


def run_accelerated(name: str, pipe: CoalescerPipeline, dtype: torch.dtype) -> None:
    """Accelerate the pipeline with a backend that compiles its networks. Raises Missing."""
    try:
        accelerate(pipe, name, dtype)
    except ValueError as reason:
        raise Missing(str(reason)) from reason


def run_quantized(pipe: CoalescerPipeline, samples: Sequence[torch.Tensor]) -> None:
    """Give the pipeline a runtime that has the UNet in int8, of ranges found at these R, and the rest in bfloat16.

    Raises:
        Missing: a package is not installed.
    """
    packages = (*RUNTIMES["openvino"].packages, "nncf")
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Missing(f"it needs the package {package}: pip install {' '.join(packages)}")

    def prepare(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path) -> Bind:
        if not isinstance(module, Evaluation):
            return openvino.prepare(module, args, dtype, folder)
        import openvino as ov

        calls = [[t.numpy() for t in (x, *args[1:])] for x in samples]
        ov.save_model(quantized(ov.Core().read_model(export(module, args, folder)), calls), folder / "int8.xml")
        return openvino.opened(folder / "int8.xml", dtype)

    pipe.runtime = PerShapeRuntime(pipe, "openvino_int8", prepare, torch.bfloat16, torch.float32)


class Samples(EagerRuntime):
    """The reference, which keeps every R that it evaluates."""

    def __init__(self, pipe: CoalescerPipeline):
        super().__init__(pipe)
        self.kept: list[torch.Tensor] = []

    def evaluate(self, sample: torch.Tensor, conditioning: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.kept.append(sample.clone())
        return super().evaluate(sample, conditioning)


def samples_of(pipe: CoalescerPipeline, sample: torch.Tensor, texts: list[str]) -> list[torch.Tensor]:
    """R in the evaluations of `CALLS` calls with these texts, without guidance, from noise that is not measured."""
    runtime, generator = Samples(pipe), torch.Generator().manual_seed(1)
    pipe.scheduler.set_timesteps(2)
    for _ in range(CALLS):
        noise = torch.randn(sample.shape, generator=generator, dtype=torch.float32)
        sampling.sample(runtime, pipe.scheduler, noise, pipe.condition(texts, sample.device), None, 1.0)
    return runtime.kept


def run_compiled_graphs(pipe: CoalescerPipeline, dtype: torch.dtype) -> None:
    """Compile the networks as the backend "compile" does, but without its search for the fastest kernels.

    Raises:
        Missing: there is no CUDA device.
    """
    if pipe.device.type != "cuda":
        raise Missing("CUDA graphs need a CUDA device")
    prepare = partial(compiled.prepare, mode="reduce-overhead")
    pipe.runtime = PerShapeRuntime(pipe, "compile_graphs", prepare, dtype)


PEERS = Peers()
PEERS.register("eager", "fp32")(partial(run_eagerly, "eager", eager))
PEERS.register("eager_channels_last", *DTYPES)(partial(run_eagerly, "eager_channels_last", eager_channels_last))
COMPILERS = ("compile", "onnxruntime", "openvino")
for _name in COMPILERS:
    PEERS.register(_name, *DTYPES)(partial(run_accelerated, _name))
PEERS.register("compile_graphs", *DTYPES)(run_compiled_graphs)
PEERS.register("openvino_int8", "int8")(run_quantized)


@dataclass
class Engine:
    """A pipeline as a provider runs it.

    Attributes:
        pipe: draws with the provider's runtime.
        dtype: a key of `DTYPES`, or int8.
        seconds: to prepare each network, "unet" and "decoder".
    """

    pipe: CoalescerPipeline
    dtype: str
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def runtime(self) -> Any:
        return self.pipe.runtime


def peer(
    name: str, dtype: str, pipe: CoalescerPipeline, sample: torch.Tensor, texts: list[str], decodes: bool, folder: Path
) -> Engine:
    """The engine of a peer, prepared for samples of this shape.

    Args:
        name: of the peer.
        dtype: of its networks.
        pipe: whose networks it runs.
        sample: what one evaluation takes.
        texts: descriptions, one for each sample.
        decodes: whether the decoder is prepared as well.
        folder: for exported networks, one for all peers.

    Raises:
        Missing: if the peer cannot run here.
    """
    mine: Any = twin(pipe)
    PEERS[name].prepare(mine, samples_of(pipe, sample, texts) if dtype == "int8" else DTYPES[dtype])
    compiles = name in (*COMPILERS, "compile_graphs", "openvino_int8")
    known = RUNTIMES.get(name.removesuffix("_int8"))
    exports = compiles and known is not None and "onnx" in known.packages
    prepare, seconds = mine.runtime.prepare, {}

    def timed(module: nn.Module, args: Tensors, dtype: torch.dtype, _: Path) -> Bind:
        if exports:
            export(module, args, folder)  # once for all peers that read it, and before the clock starts
        start = time.perf_counter()
        bind = prepare(module, args, dtype, folder)
        if compiles:
            seconds["unet" if isinstance(module, Evaluation) else "decoder"] = time.perf_counter() - start
        return bind

    mine.runtime.prepare = timed
    mine.runtime.evaluate(sample, mine.runtime.condition(texts, sample.device))
    if decodes:
        mine.runtime.decode(sample)
    return Engine(mine, dtype, seconds)


def ours(dtype: str, pipe: CoalescerPipeline) -> Engine:
    """The engine of `coalescer_fast.accelerate`, for dtype "auto", "int8" or one of `DTYPES`.

    Raises:
        Missing: for int8 where it cannot run.
    """
    with torch.inference_mode(False):  # weights whose changes are noticed, as those of a user
        start = time.perf_counter()
        try:
            mine: Any = coalescer_fast.accelerate(twin(pipe), backend="auto", dtype=DTYPES.get(dtype, dtype))
        except ValueError as reason:
            raise Missing(str(reason)) from reason
        seconds = time.perf_counter() - start
    names = {kind: name for name, kind in DTYPES.items()}
    return Engine(mine, dtype if dtype == "int8" else names.get(mine.runtime.dtype, dtype), {"unet": seconds})


def twin(pipe: CoalescerPipeline) -> CoalescerPipeline:
    """Another pipeline of the same networks."""
    mine = CoalescerPipeline(pipe.unet, pipe.scheduler, pipe.description_encoder, pipe.vae)
    mine.set_progress_bar_config(disable=True)
    return mine


class Convolutions(TorchDispatchMode):
    """Keeps the arguments of every convolution, of images only what they are: all of them would fill a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.found.append((args[0].to("meta"), *args[1:]))
        return func(*args, **(kwargs or {}))


def convolutions(function: Callable[[], object], dtype: torch.dtype) -> Callable[[], None]:
    """All convolutions that the function makes and nothing else: channels_last, weights packed once where oneDNN can.

    On a GPU they are one CUDA graph, so that launches are not in the floor.
    """
    with torch.inference_mode(False), torch.no_grad(), Convolutions() as made:
        function()
    inputs: dict[torch.Size, torch.Tensor] = {}
    packed: dict[tuple[Any, ...], torch.Tensor] = {}
    calls: list[Callable[[], object]] = []
    for x, weight, bias, stride, padding, dilation, _, _, groups in made.found:
        if x.shape not in inputs:
            drawn = torch.randn(x.shape, device=weight.device)
            inputs[x.shape] = drawn.to(dtype, memory_format=torch.channels_last)
        bias, key = None if bias is None else bias.to(dtype), (weight.data_ptr(), weight.shape, x.shape)
        if key not in packed:
            weight = weight.to(dtype, memory_format=torch.channels_last)
            if weight.is_cpu and torch.backends.mkldnn.is_available():
                weight = torch.ops.mkldnn._reorder_convolution_weight(
                    weight, padding, stride, dilation, groups, list(x.shape)
                )
            packed[key] = weight
        if weight.is_cpu and torch.backends.mkldnn.is_available():
            run = torch.ops.mkldnn._convolution_pointwise
            calls.append(
                partial(run, inputs[x.shape], packed[key], bias, padding, stride, dilation, groups, "none", [], "")
            )
        else:
            calls.append(partial(torch.conv2d, inputs[x.shape], packed[key], bias, stride, padding, dilation, groups))

    def run_all() -> None:
        for call in calls:
            call()

    if not made.found or made.found[0][1].is_cpu:
        return run_all
    graph = timing.CudaTimer().capture(run_all, 1)

    def replay(kept: object = calls) -> None:
        graph.replay()

    return replay
