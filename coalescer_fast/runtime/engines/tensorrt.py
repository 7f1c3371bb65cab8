"""Engines of TensorRT and TensorRT-RTX on torch's memory and stream, in CUDA graphs. Not yet run on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cuda.graphs import CudaGraphCapture, Graphs
from ..cuda.runtime import MOST_GRAPHS, graph_bytes
from .artefact import Artefact
from .manifest import BATCH, EngineBuild, Manifest

Tensors = tuple[Tensor, ...]
# what a manifest calls the engine, which is also the name of the package, and its title
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
OLDEST, TOO_NEW = (10, 8), (12,)  # versions
ERRORS = 3  # how many of the last errors are kept for messages


def load(flavour: str) -> Any:
    """Import TensorRT or TensorRT-RTX.

    Args:
        flavour: A key of `TITLES`.

    Raises:
        ValueError: If the package is missing, cannot be loaded, or has a version that this code was not written for.
    """
    title = TITLES[flavour]
    try:
        trt = importlib.import_module(flavour)
    except ImportError as error:  # also if a shared library is missing
        reason = " ".join(str(error).split())
        raise ValueError(f"{title} cannot be loaded ({reason}): run pip install {flavour}") from error
    if flavour == "tensorrt" and not OLDEST <= numbers(trt.__version__) < TOO_NEW:
        reason = f"{title} {trt.__version__} is installed, and 10.8 to 11 can be used"
        raise ValueError(f"{reason}: run pip install 'tensorrt>=10.8,<12'")
    return trt


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers that can be compared: (10, 8) for "10.8"."""
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def logger(trt: Any, listener: Callable[[str], object] = lambda text: None) -> Any:
    """A ``trt.ILogger`` that keeps the last errors, because the library reports the reason of a failure nowhere else.

    Args:
        trt: The package.
        listener: Called with every message.
    """

    class Log(trt.ILogger):  # type: ignore[misc,unused-ignore]  # no types
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=ERRORS)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(text.split()))
            listener(text)

        def reason(self) -> str:
            return "; ".join(dict.fromkeys(self.errors))[:600] or "it does not say why"

    return Log()


def gpu() -> tuple[str, str] | None:
    """Name and compute capability of torch's current CUDA device, or None if there is none."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(), "{}.{}".format(*torch.cuda.get_device_capability())


def unavailable() -> str:
    """Why no engine can run in this process, or ""."""
    if not any(importlib.util.find_spec(package) for package in TITLES):
        return f"none of the packages {' and '.join(TITLES)} is installed: run pip install tensorrt"
    return "" if gpu() else "there is no CUDA device"


def engine_build(manifest: Manifest) -> EngineBuild:
    """The field ``tensorrt`` of the manifest of an engine."""
    assert manifest.tensorrt is not None  # by the rules of `Manifest`
    return manifest.tensorrt


def refusal(manifest: Manifest, version: str, here: tuple[str, str] | None) -> str:
    """Why an engine cannot run.

    Args:
        manifest: The manifest of the engine.
        version: The version of TensorRT or TensorRT-RTX that is installed.
        here: Name and compute capability of the GPU, as `gpu` returns them.

    Returns:
        A reason that follows the name of the artefact's folder, or "".
    """
    made, flags, title = engine_build(manifest), manifest.flags, TITLES[manifest.engine]
    if flags.versionCompatible:
        fits, which = numbers(version)[0] == numbers(made.version)[0], f"{title} {numbers(made.version)[0]}"
    else:
        fits, which = version == made.version, f"{title} {made.version}"
    if not fits:
        return f"is an engine of {which}, and {version} is installed"
    able = "compute capability " + " or ".join(made.compute_capabilities)
    level = flags.hardwareCompatibilityLevel or "none"
    model = made.gpu if level == "none" else None
    if level == "ampere+":
        able = "compute capability 8.0 or later"
    needs = f"is an engine for {able}" if model is None else f"is an engine for {model}, {able},"
    if here is None:
        return f"{needs} and there is no CUDA device"
    name, capability = here
    fits = numbers(capability) >= (8, 0) if level == "ampere+" else capability in made.compute_capabilities
    return "" if fits and model in (None, name) else f"{needs} and this is {name}, {capability}"


def open_artefact(artefact: Artefact) -> Callable[[Tensors], Tensors]:
    """Load an engine.

    Returns:
        A function from the engine's inputs, on the current CUDA device, to its outputs, as `exported.Open` describes.

    Raises:
        ValueError: If the artefact is no engine, or cannot run here.
    """
    m = artefact.manifest
    if m.engine not in TITLES:
        reason = f"{artefact.folder} is for {m.engine}, not for TensorRT"
        raise ValueError(f"{reason}: make an engine of it with coalescer-export engine")
    # before the library is imported, because a machine without a GPU may not have it either
    if gpu() is None:
        reason = refusal(m, engine_build(m).version, None)
        raise ValueError(f"{artefact.folder} {reason}: run it on such a GPU, or {artefact.fix}")
    trt = load(m.engine)
    if reason := refusal(m, trt.__version__, gpu()):
        raise ValueError(f"{artefact.folder} {reason}: {artefact.fix}")
    device = torch.device("cuda", torch.cuda.current_device())
    return LoadedEngine(artefact, trt, device, Graphs(CudaGraphCapture(device), MOST_GRAPHS, graph_bytes(device)))


class LoadedEngine:
    """An engine that runs on the caller's stream, captured in a CUDA graph for each batch size.

    Inputs, outputs and scratch memory come from torch's allocator. A captured graph is tied to its execution context,
    so each batch size has a context of its own; without graphs (``COALESCER_FAST_GRAPH_BYTES=0``) there is one. Several
    threads may call, and take turns.

    Args:
        artefact: The engine.
        trt: The package that it is for.
        device: The GPU.
        graphs: Keeps the captured graphs.

    Raises:
        ValueError: If the package cannot load the engine or its weights, or if its inputs and outputs are not those in
            the manifest.
    """

    def __init__(self, artefact: Artefact, trt: Any, device: torch.device, graphs: Graphs):
        self.trt, self.device, self.graphs, self.manifest = trt, device, graphs, artefact.manifest
        self.lock = threading.Lock()
        self.contexts: dict[int, Any] = {}
        self.log = logger(trt)
        self.runtime = trt.Runtime(self.log)  # must outlive the engine
        if self.manifest.flags.versionCompatible:
            self.runtime.engine_host_code_allowed = True  # such an engine holds the runtime of its version
        self.engine = self.runtime.deserialize_cuda_engine(artefact.graph.read_bytes())
        if self.engine is None:
            title = TITLES[self.manifest.engine]
            raise ValueError(f"{title} cannot load {artefact.graph} ({self.log.reason()}): {artefact.fix}")
        if weights := self.manifest.flags.stripWeights:
            self._refit(artefact, weights)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        if set(names) != {port.name for port in (*self.manifest.inputs, *self.manifest.outputs)}:
            what = f"other inputs and outputs ({', '.join(names)}) than its manifest says"
            raise ValueError(f"{artefact.graph} has {what}: {artefact.fix}")

    def _refit(self, artefact: Artefact, weights: str) -> None:
        """Give an engine that was built without weights those of the ONNX file beside it."""
        path = artefact.folder / weights
        refitter = self.trt.Refitter(self.engine, self.log)
        filled = self.trt.OnnxParserRefitter(refitter, self.log).refit_from_file(str(path))
        if not filled or not refitter.refit_cuda_engine():
            reason = f"do not fit {artefact.graph} ({self.log.reason()})"
            raise ValueError(f"the weights of {path} {reason}: {artefact.fix}")

    def __call__(self, inputs: Tensors) -> Tensors:
        with self.lock:
            if not self.graphs.most_bytes:
                with self.graphs.capture.turn():
                    return self._enqueue(0, inputs)
            batch = len(inputs[0])
            outputs = self.graphs.run(batch, inputs, lambda *given: self._enqueue(batch, given))
            held = {key for key, _ in self.graphs.sizes()}
            self.contexts = {key: context for key, context in self.contexts.items() if key in held}
            return outputs

    def _enqueue(self, key: int, inputs: Tensors) -> Tensors:
        context = self.contexts.get(key)
        if context is None:
            context = self.contexts[key] = self._context()
        bound = []  # kept alive until everything is enqueued
        for port, x in zip(self.manifest.inputs, inputs, strict=True):
            bound.append(x.to(getattr(torch, port.dtype)).contiguous())
            self._require(context.set_input_shape(port.name, tuple(x.shape)))
            self._require(context.set_tensor_address(port.name, bound[-1].data_ptr()))
        # scratch memory from torch's allocator, which takes it from the graph's own pool during a capture
        needed = context.update_device_memory_size_for_shapes()
        scratch = torch.empty(max(needed, 1), dtype=torch.uint8, device=self.device)
        context.set_device_memory(scratch.data_ptr(), needed)
        outputs = []
        for port in self.manifest.outputs:
            shape = [len(inputs[0]) if size == BATCH else int(size) for size in port.shape]
            outputs.append(torch.empty(shape, dtype=getattr(torch, port.dtype), device=self.device))
            self._require(context.set_tensor_address(port.name, outputs[-1].data_ptr()))
        self._require(context.execute_async_v3(stream(self.device)))
        return tuple(outputs)

    def _context(self) -> Any:
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.manifest.engine == "tensorrt_rtx":
            # compile the kernels of a shape at its first call: a captured graph would not take those that come later
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.dynamic_shapes_kernel_specialization_strategy = (
                self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        self._require(context is not None)
        return context

    def _require(self, done: bool) -> None:
        if not done:
            raise RuntimeError(f"{TITLES[self.manifest.engine]}: {self.log.reason()}")


def stream(device: torch.device) -> int:
    """Handle of torch's current stream, 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
