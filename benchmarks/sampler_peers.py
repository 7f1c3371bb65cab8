"""What `benchmarks.sampler` compares: the networks of one pipeline, each prepared by every provider at its best.

A peer is a function ``(module, args, dtype, folder) -> bind``: it makes of a module, for the shapes of ``args``, a function that takes
the module's arguments but the first, once, and gives the call that is measured, of the first argument alone.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import time
import warnings
from collections import deque
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
from coalescer_fast.models import CoalescerAutoencoder, CoalescerUNet, DescriptionEncoder
from coalescer_fast.models.unet import Conditioning
from coalescer_fast.pipeline import CoalescerPipeline
from coalescer_fast.scheduler import CoalescerScheduler

from . import timing

Tensors = tuple[torch.Tensor, ...]
Call = Callable[[torch.Tensor], Tensors]
Bind = Callable[[Sequence[torch.Tensor]], Call]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANDOM = "random weights, timing only"


class Missing(Exception):
    """A provider that cannot run here, and why: no failure of its own."""


def load(model: str, device: torch.device) -> CoalescerPipeline:
    """emoji-64 as it is embedded; m and l with random weights, and with other components that only make a pipeline of them."""
    disable_progress_bar()
    pipe = CoalescerPipeline.from_pretrained("emoji-64")
    if model != "emoji-64":
        torch.manual_seed(0)
        unet = CoalescerUNet.named(model).eval()
        for parameter in unet.parameters():
            if parameter.ndim > 1 and not parameter.any():  # a branch that starts as the identity would give a trivial output
                nn.init.normal_(parameter, std=0.5 / parameter[0].numel() ** 0.5)
        encoder = pipe.description_encoder
        if (dim := unet.config.description_dim) != encoder.config.dim:
            table = torch.randint(-127, 128, (encoder.config.vocab_size, dim), dtype=torch.int8)
            encoder = DescriptionEncoder.from_table(table.numpy(), torch.full((dim,), 1 / 64).numpy(), encoder.vocab.numpy()).eval()
        vae = CoalescerAutoencoder(2, unet.config.latent_channels, 8, (1, 1, 1), (1, 1, 1)).eval()
        pipe = CoalescerPipeline(unet, CoalescerScheduler(), encoder, vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


class Evaluation(nn.Module):
    """One evaluation of the UNet, its conditioning as plain tensors: what exporters and compilers take. float32 in and out."""

    def __init__(self, unet: CoalescerUNet, like: Conditioning):
        super().__init__()
        self.unet = unet
        self.film, self.anchored, self.masked = len(like.film), like.anchor is not None, like.mask is not None

    @staticmethod
    def flatten(conditioning: Conditioning, dtype: torch.dtype) -> Tensors:
        """The anchor stays float32: the heads are residual to the way there. Copies of one layout, whatever the pipeline expanded."""
        pairs = [t.to(dtype) for pair in (*conditioning.film, *conditioning.keys_values) for t in pair]
        rest = [t for t in (conditioning.anchor, conditioning.mask) if t is not None]
        return tuple(t.clone(memory_format=torch.contiguous_format) for t in (*pairs, *rest))

    def forward(self, sample: torch.Tensor, *flat: torch.Tensor) -> Tensors:
        given = list(flat)
        mask = given.pop() if self.masked else None
        anchor = given.pop() if self.anchored else None
        pairs = list(zip(given[::2], given[1::2]))
        conditioning = Conditioning(pairs[: self.film], anchor, pairs[self.film :], mask)
        direction, distance = self.unet(sample, conditioning, return_dict=False)
        return direction.float(), distance.float()


class Decoding(nn.Module):
    def __init__(self, vae: CoalescerAutoencoder):
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> Tensors:
        return (self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float(),)


def eager(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path) -> Bind:
    """As users have it: float32, channels outermost."""
    return lambda rest: lambda x: module(x, *rest)


def channels_last(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.inference_mode(False):  # ordinary weights, as a user's: inductor would not freeze others
        return copy.deepcopy(module).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def eager_channels_last(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path) -> Bind:
    return eager(channels_last(module, dtype), args, dtype, folder)


def compile_(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path) -> Bind:
    """torch.compile for the very shapes, the weights frozen and packed; on a GPU max-autotune, with CUDA graphs."""
    import torch._inductor.config as config

    cuda = args[0].is_cuda
    function = torch.compile(channels_last(module, dtype), dynamic=False, fullgraph=True, mode="max-autotune" if cuda else None)
    with config.patch(freezing=True):
        function(*args)
    # a CUDA graph's outputs are overwritten by its next run
    return lambda rest: lambda x: tuple(y.clone() for y in function(x, *rest)) if cuda else function(x, *rest)


def export(module: nn.Module, args: Tensors, folder: Path) -> Path:
    """The module as ONNX, made once a folder."""
    for package in ("onnx", "onnxscript"):
        installed(package)
    path = folder / f"{type(module).__name__}.onnx"
    if not path.exists():
        logging.disable(logging.WARNING)  # of packages that the exporter does without
        try:
            with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plain = tuple(a.clone() for a in args)  # the exporter takes no inference tensors
                torch.onnx.export(module, plain, path, dynamo=True, external_data=True, verbose=False)
        finally:
            logging.disable(logging.NOTSET)
    return path


def installed(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Missing(f"{package} is not installed: run pip install {package}")


def onnxruntime(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path) -> Bind:
    """ONNX Runtime's CPU provider with all optimisations; inputs and outputs are bound to torch's memory."""
    installed("onnxruntime")
    if dtype != torch.float32:
        raise Missing("ONNX Runtime's CPU provider has no bfloat16 convolution")
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = ort.InferenceSession(export(module, args, folder), options, providers=["CPUExecutionProvider"])
    first, *names = (i.name for i in session.get_inputs())

    def bind(rest: Sequence[torch.Tensor]) -> Call:
        binding = session.io_binding()
        kept = [ort.OrtValue.ortvalue_from_numpy(t.numpy()) for t in rest]
        for name, value in zip(names, kept):
            binding.bind_ortvalue_input(name, value)
        results = tuple(torch.empty(o.shape) for o in session.get_outputs())
        for o, result in zip(session.get_outputs(), results):
            binding.bind_output(o.name, "cpu", 0, np.float32, o.shape, result.data_ptr())

        def call(x: torch.Tensor, kept: object = (rest, kept)) -> Tensors:
            x = x.contiguous()
            binding.bind_input(first, "cpu", 0, np.float32, x.shape, x.data_ptr())
            session.run_with_iobinding(binding)
            return results

        return call

    return bind


def openvino(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path) -> Bind:
    """OpenVINO on the CPU from the same ONNX file, for latency; inputs are shared with torch, not copied."""
    installed("openvino")
    import openvino as ov

    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
    }
    compiled = ov.Core().compile_model(export(module, args, folder), "CPU", config)

    def shared(t: torch.Tensor) -> Any:
        return ov.Tensor(t.contiguous().numpy(), shared_memory=True)

    def bind(rest: Sequence[torch.Tensor]) -> Call:
        request = compiled.create_infer_request()
        for n, value in enumerate(rest, 1):
            request.set_input_tensor(n, shared(value))

        def call(x: torch.Tensor, kept: object = rest) -> Tensors:
            request.set_input_tensor(0, shared(x))
            request.infer(share_outputs=True)
            return tuple(torch.from_numpy(request.get_output_tensor(n).data) for n in range(len(compiled.outputs)))

        return call

    return bind


PEERS: dict[str, tuple[Callable[[nn.Module, Tensors, torch.dtype, Path], Bind], tuple[str, ...]]] = {
    "eager": (eager, ("fp32",)),
    "eager_channels_last": (eager_channels_last, ("fp32", "bf16")),
    "compile": (compile_, ("fp32", "bf16")),
    "onnxruntime": (onnxruntime, ("fp32", "bf16")),
    "openvino": (openvino, ("fp32", "bf16")),
}
ON_CPU = ("onnxruntime", "openvino")  # as they are used here


@dataclass
class Engine:
    """What a provider made of a pipeline: one that draws by the provider's ``runtime``; seconds: to prepare each network."""

    pipe: CoalescerPipeline
    dtype: str
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def runtime(self) -> Any:
        return self.pipe.runtime


class Networks:
    """A peer in the place of a pipeline's runtime. What an evaluation takes of a conditioning is prepared once for each."""

    backend = "reference"

    def __init__(self, pipe: CoalescerPipeline, bind: Callable[[Conditioning], Call], decode: Call | None):
        self.device, self.condition, self.bind = pipe.device, pipe.condition, bind
        self.decode = pipe.decode if decode is None else lambda latents: decode(latents)[0]
        self.bound: deque[tuple[Conditioning, Call]] = deque(maxlen=2)  # of the description, and of the empty one

    def refresh(self) -> None:
        """The weights do not change."""

    def evaluate(self, sample: torch.Tensor, conditioning: Conditioning) -> Tensors:
        for known, call in self.bound:
            if known is conditioning:
                return call(sample)
        self.bound.append((conditioning, self.bind(conditioning)))
        return self.bound[-1][1](sample)


def peer(name: str, dtype: str, pipe: CoalescerPipeline, sample: torch.Tensor, texts: list[str], decodes: bool, folder: Path) -> Engine:
    """The engine of a peer for samples of this shape. Raises Missing."""
    prepare, kind = PEERS[name][0], DTYPES[dtype]
    if name in ON_CPU:
        installed(name)
        if not sample.is_cpu:
            raise Missing(f"{name} is measured on the CPU alone")
    given = pipe.condition(texts, sample.device)
    wide = torch.float32 if name in ON_CPU else kind  # their files hold float32, whatever they compute in
    evaluation, seconds = Evaluation(pipe.unet, given), {}

    def timed(part: str, module: nn.Module, *args: torch.Tensor) -> Bind:
        if name in ON_CPU:
            export(module, args, folder)
        start = time.perf_counter()
        bind = prepare(module, args, kind, folder)
        if not name.startswith("eager"):
            seconds[part] = time.perf_counter() - start
        return bind

    bound = timed("unet", evaluation, sample, *evaluation.flatten(given, wide))
    decode = timed("decoder", Decoding(pipe.vae), sample)(()) if decodes else None
    mine: Any = twin(pipe)
    mine.runtime = Networks(pipe, lambda conditioning: bound(evaluation.flatten(conditioning, wide)), decode)
    return Engine(mine, dtype, seconds)


def ours(dtype: str, pipe: CoalescerPipeline) -> Engine:
    """`coalescer_fast.accelerate`, dtype "auto" or one of `DTYPES`."""
    with torch.inference_mode(False):  # it looks after changes of its weights, as a user's
        start = time.perf_counter()
        mine: Any = coalescer_fast.accelerate(twin(pipe), backend="auto", dtype=DTYPES.get(dtype, dtype))
        seconds = time.perf_counter() - start
    names = {kind: name for name, kind in DTYPES.items()}
    return Engine(mine, names.get(mine.runtime.dtype, dtype), {"unet": seconds})


def twin(pipe: CoalescerPipeline) -> CoalescerPipeline:
    """Another pipeline of the same networks."""
    mine = CoalescerPipeline(pipe.unet, pipe.scheduler, pipe.description_encoder, pipe.vae)
    mine.set_progress_bar_config(disable=True)
    return mine


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.found.append(args)
        return func(*args, **(kwargs or {}))


def convolutions(function: Callable[[], object], dtype: torch.dtype) -> Callable[[], None]:
    """All convolutions that the function makes and nothing else, channels innermost, weights packed once where oneDNN can; on a GPU as one
    CUDA graph, so that launches are not in the floor."""
    with torch.inference_mode(False), torch.no_grad(), Recorder() as recorder:
        function()
    inputs: dict[torch.Size, torch.Tensor] = {}
    packed: dict[tuple[Any, ...], torch.Tensor] = {}
    calls: list[Callable[[], object]] = []
    for x, weight, bias, stride, padding, dilation, _, _, groups in recorder.found:
        if x.shape not in inputs:
            inputs[x.shape] = torch.randn_like(x).to(dtype, memory_format=torch.channels_last)
        bias, key = None if bias is None else bias.to(dtype), (weight.data_ptr(), weight.shape, x.shape)
        if key not in packed:
            weight = weight.to(dtype, memory_format=torch.channels_last)
            if x.is_cpu and torch.backends.mkldnn.is_available():
                weight = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(x.shape))
            packed[key] = weight
        if x.is_cpu and torch.backends.mkldnn.is_available():
            run = torch.ops.mkldnn._convolution_pointwise
            calls.append(partial(run, inputs[x.shape], packed[key], bias, padding, stride, dilation, groups, "none", [], ""))
        else:
            calls.append(partial(torch.conv2d, inputs[x.shape], packed[key], bias, stride, padding, dilation, groups))

    def run_all() -> None:
        for call in calls:
            call()

    if not recorder.found or recorder.found[0][0].is_cpu:
        return run_all
    graph = timing.CudaTimer().capture(run_all, 1)

    def replay(kept: object = calls) -> None:
        graph.replay()

    return replay
