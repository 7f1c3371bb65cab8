"""Plans of TensorRT and TensorRT-RTX on torch's memory and stream, in CUDA graphs. Not yet run on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .artefact import BATCH, Artefact, Manifest
from .cuda.graphs import CudaGraphCapture, Graphs
from .cuda.runtime import MOST_GRAPHS, graph_bytes

Tensors = tuple[Tensor, ...]
# engine of a manifest, which is the package's name, too -> what it is called
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
OLDEST, TOO_NEW = (10, 8), (12,)
ERRORS = 3  # of the log, kept to be said


def load(flavour: str) -> Any:
    """The package. Raises ValueError, in one sentence, if it is not there or not of a version that this is written for."""
    title = TITLES[flavour]
    try:
        trt = importlib.import_module(flavour)
    except ImportError as error:  # also a library that it lacks
        raise ValueError(
            f"{title} cannot be loaded ({' '.join(str(error).split())}): run pip install {flavour}"
        ) from error
    if flavour == "tensorrt" and not OLDEST <= numbers(trt.__version__) < TOO_NEW:
        raise ValueError(
            f"{title} {trt.__version__} is installed, and 10.8 to 11 can be used: run pip install 'tensorrt>=10.8,<12'"
        )
    return trt


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def logger(trt: Any, hear: Callable[[str], object] = lambda text: None) -> Any:
    """An ILogger that has the last ``errors``; the library tells of a failure nowhere else. hear: told every message."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=ERRORS)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(text.split()))
            hear(text)

        def said(self) -> str:
            return "; ".join(dict.fromkeys(self.errors))[:600] or "it does not say why"

    return Log()


def gpu() -> tuple[str, str] | None:
    """Name and compute capability of torch's current device, if there is one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(), "{}.{}".format(*torch.cuda.get_device_capability())


def unavailable() -> str:
    if not any(importlib.util.find_spec(package) for package in TITLES):
        return f"none of the packages {' and '.join(TITLES)} is installed: run pip install tensorrt"
    return "" if gpu() else "there is no CUDA device"


def refusal(manifest: Manifest, version: str, here: tuple[str, str] | None) -> str:
    """Why a plan cannot run with this version on this GPU (see `gpu`), after the name of its folder, or ""."""
    made, flags, title = manifest.tensorrt or {}, manifest.flags, TITLES[manifest.engine]
    if flags.get("versionCompatible"):
        fits, which = numbers(version)[0] == numbers(made["version"])[0], f"{title} {numbers(made['version'])[0]}"
    else:
        fits, which = version == made["version"], f"{title} {made['version']}"
    if not fits:
        return f"is a plan of {which}, and {version} is installed"
    able = "compute capability " + " or ".join(made["compute_capabilities"])
    level = flags.get("hardwareCompatibilityLevel", "none")
    one = made["gpu"] if level == "none" else None  # made for one model of GPU
    if level == "ampere+":
        able = "compute capability 8.0 or later"
    needs = f"is a plan for {able}" if one is None else f"is a plan for {one}, {able},"
    if here is None:
        return f"{needs} and there is no CUDA device"
    name, capability = here
    fits = numbers(capability) >= (8, 0) if level == "ampere+" else capability in made["compute_capabilities"]
    return "" if fits and one in (None, name) else f"{needs} and this is {name}, {capability}"


def open_artefact(artefact: Artefact) -> Callable[[Tensors], Tensors]:
    """A plan, see `exported.Open`; inputs are on the current CUDA device. Raises ValueError for a plan that cannot run here."""
    m = artefact.manifest
    if m.engine not in TITLES:
        raise ValueError(
            f"{artefact.folder} is for {m.engine}, not for TensorRT: make a plan of it with coalescer-export engine"
        )
    # before the library is loaded, which a machine without a GPU may lack as well
    if gpu() is None:
        raise ValueError(
            f"{artefact.folder} {refusal(m, (m.tensorrt or {})['version'], None)}: run it on such a GPU, or {artefact.mend}"
        )
    trt = load(m.engine)
    if reason := refusal(m, trt.__version__, gpu()):
        raise ValueError(f"{artefact.folder} {reason}: {artefact.mend}")
    device = torch.device("cuda", torch.cuda.current_device())
    return Plan(artefact, trt, device, Graphs(CudaGraphCapture(device), MOST_GRAPHS, graph_bytes(device)))


class Plan:
    """A plan that runs on the caller's stream, with inputs, outputs and scratch in torch's memory, captured once for each batch size.

    A captured graph is tied to its execution context, so each batch size has its own; without graphs (``COALESCER_FAST_GRAPH_BYTES=0``)
    there is one. Several threads may call, and take turns.
    """

    def __init__(self, artefact: Artefact, trt: Any, device: torch.device, graphs: Graphs):
        self.trt, self.device, self.graphs, self.manifest = trt, device, graphs, artefact.manifest
        self.lock = threading.Lock()
        self.contexts: dict[int, Any] = {}
        self.log = logger(trt)
        self.runtime = trt.Runtime(self.log)  # outlives the engine
        if self.manifest.flags.get("versionCompatible"):
            self.runtime.engine_host_code_allowed = True  # it holds the runtime of its version
        self.engine = self.runtime.deserialize_cuda_engine(artefact.graph.read_bytes())
        if self.engine is None:
            raise ValueError(
                f"{TITLES[self.manifest.engine]} cannot load {artefact.graph} ({self.log.said()}): {artefact.mend}"
            )
        if weights := self.manifest.flags.get("stripWeights"):
            self._refit(artefact, weights)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        if set(names) != {port.name for port in (*self.manifest.inputs, *self.manifest.outputs)}:
            raise ValueError(
                f"{artefact.graph} has other inputs and outputs ({', '.join(names)}) than its manifest says: {artefact.mend}"
            )

    def _refit(self, artefact: Artefact, weights: str) -> None:
        refitter = self.trt.Refitter(self.engine, self.log)
        filled = self.trt.OnnxParserRefitter(refitter, self.log).refit_from_file(str(artefact.folder / weights))
        if not filled or not refitter.refit_cuda_engine():
            raise ValueError(
                f"the weights of {artefact.folder / weights} do not fit {artefact.graph} ({self.log.said()}): {artefact.mend}"
            )

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
        bound = []  # kept until all is enqueued
        for port, x in zip(self.manifest.inputs, inputs, strict=True):
            bound.append(x.to(getattr(torch, port.dtype)).contiguous())
            self._require(context.set_input_shape(port.name, tuple(x.shape)))
            self._require(context.set_tensor_address(port.name, bound[-1].data_ptr()))
        # all that the plan needs comes from torch's allocator: of a graph's own memory where it is captured
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
            # kernels for the shapes are compiled when they first come, and not beside the calls: a graph holds one and the same
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
            raise RuntimeError(f"{TITLES[self.manifest.engine]}: {self.log.said()}")


def stream(device: torch.device) -> int:
    """Handle of torch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
