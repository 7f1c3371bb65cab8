"""`CudaModuleRuntime`: any torch module as fused ops in CUDA graphs, in the place of its forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base import Part
from ..native.module import ModuleRuntime
from ..native.program import Ranges
from ..native.record import Recording
from ..native.value import Unsupported
from .graphs import CudaGraphCapture, GraphCapture, Graphs
from .program import CudaProgram, TorchWeights
from .runtime import MOST_GRAPHS, graph_bytes


class Key(NamedTuple):
    """What a graph is captured for.

    Attributes:
        program: it lives as long as the graph, which reads its weights.
        given: dtypes of the tensors among the arguments.
        dtype: of the results.
    """

    program: CudaProgram
    given: tuple[torch.dtype, ...]
    dtype: torch.dtype


class CudaModuleRuntime(ModuleRuntime):
    """Runs a module on a CUDA device, in one CUDA graph for every structure, shapes and dtypes of its arguments.

    What the module does is recorded as on a CPU, and runs as a `CudaProgram`.

    Attributes:
        backend: of the fused ops, see `coalescer_fast.ops`.
        graphs: those that are held.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        backend: str = "auto",
        most_bytes: int | None = None,
        device: torch.device | None = None,
        capture: GraphCapture | None = None,
    ):
        """Stand in for the module's forward from now on.

        Args:
            module: on one device.
            dtype: float32, bfloat16 or float16.
            backend: of the fused ops; "auto" takes the fastest that can run each call.
            most_bytes: memory for graphs, 0 for none; see `graph_bytes` if None.
            device: where the module is; found if None.
            capture: makes the graphs; a `CudaGraphCapture` if None.
        """
        device = device_of(module) if device is None else device
        self.backend, self.most_bytes = backend, most_bytes
        allowed = graph_bytes(device) if most_bytes is None else most_bytes
        self.graphs = Graphs(CudaGraphCapture(device) if capture is None else capture, MOST_GRAPHS, allowed)
        super().__init__(module, dtype)
        self.device = device

    @property
    def _settings(self) -> tuple[Any, ...]:
        # a copy is made before its parameters are
        return type(self), self.dtype, self.backend, self.most_bytes, self.device

    def _no_weights(self, winograd_memory: int | None) -> TorchWeights:
        return TorchWeights(self.dtype)

    def _unavailable(self) -> str:
        return ""

    def _is_here(self, x: Tensor) -> bool:
        # modules of diffusers take a timestep from the CPU
        return x.device == self.device or (x.device.type == "cpu" and x.numel() == 1)

    def _is_for_torch(self, args: Any, kwargs: Any) -> str:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "the last call was captured in a CUDA graph"
        return super()._is_for_torch(args, kwargs)

    def _number(self, value: int) -> Tensor:
        return torch.full((), value, dtype=torch.int64, device=self.device)  # which waits for nothing

    def _made(self, recording: Recording, threads: int, ranges: Ranges | None) -> CudaProgram:
        assert isinstance(self._weights, TorchWeights)
        return CudaProgram(recording, self._weights, self.device, self.backend)

    def _outputs(self, program: Any, given: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        if not given:
            raise Unsupported("it is given no tensor")
        here = [x.to(self.device) for x in given]
        key = Key(program, tuple(x.dtype for x in here), dtype)
        results: tuple[Tensor, ...] = self.graphs.run(key, here, partial(program, dtype=dtype))
        return results

    def _take_over(self) -> None:
        self.graphs.clear()
        super()._take_over()

    def part(self, name: str = "") -> Part:
        """The row of `explain`."""
        name = name or self.name
        if self.refused:
            return Part(name, "torch", self.refused)
        program = self.programs.last
        graphs = f"{len(self.graphs.held)} CUDA graphs" if self.graphs.most_bytes else "no CUDA graphs"
        way = f"torch and fused ops, {self.dtype}, {graphs}" + ("" if program is None else program.described)
        held = f"{self.graphs.bytes() / 1e6:.1f} MB of {self.graphs.most_bytes / 1e6:.0f} MB for graphs"
        return Part(name, way, held if program else "it can run; it is recorded at its first call")


def device_of(module: nn.Module) -> torch.device:
    """Where the module is. Raises ValueError if it is on several devices."""
    devices = {x.device for x in (*module.parameters(), *module.buffers())}
    if len(devices) > 1:
        places = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"{type(module).__name__} is on {places}: move all of it to one device first")
    return next(iter(devices), torch.device("cpu"))
