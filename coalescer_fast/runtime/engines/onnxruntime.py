"""Networks by ONNX Runtime on a CPU: prepared for a shape, or from an exported artefact."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .artefact import Artefact
from .onnx import export
from .per_shape import Bind, Call, Tensors


@contextmanager
def raising_one_sentence(engine: str) -> Iterator[None]:
    """Turn every exception of an engine into a RuntimeError of one sentence.

    Engines raise classes of their own, with messages of many lines.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RuntimeError(f"{engine} failed: {reason:.300}") from error


def session(path: Path) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU with all optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns of constants that it leaves in float16
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # without this its threads spin between runs and take cores from torch, or from another session
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def open_artefact(artefact: Artefact) -> Callable[[Tensors], Tensors]:
    """Open an exported graph.

    Returns:
        A function from the graph's inputs to its outputs, as `exported.Open` describes.

    Raises:
        ValueError: If the artefact is for another engine, cannot be loaded, or has other inputs and outputs than its
            manifest says.
    """
    if artefact.manifest.engine != "onnx":
        reason = f"{artefact.folder} is for {artefact.manifest.engine}, not for ONNX Runtime"
        raise ValueError(f"{reason}: give the artefact it was built from")
    try:
        opened = session(artefact.graph)
    except Exception as error:  # ONNX Runtime has its own classes
        reason = " ".join(str(error).split())
        raise ValueError(f"ONNX Runtime cannot load {artefact.graph} ({reason:.200}): {artefact.fix}") from error
    inputs, outputs = (
        [(port.name, _torch_dtype(port.type), len(port.shape)) for port in ports]
        for ports in (opened.get_inputs(), opened.get_outputs())
    )
    artefact.check_ports(inputs, outputs)
    names = [port.name for port in artefact.manifest.inputs]

    def run(inputs: Tensors) -> Tensors:
        with raising_one_sentence("ONNX Runtime"):
            outputs = opened.run(None, {name: x.numpy(force=True) for name, x in zip(names, inputs)})
        return tuple(torch.from_numpy(y) for y in outputs)

    return run


def _torch_dtype(kind: str) -> str:
    """ONNX Runtime's name of a type as torch's name of a dtype: "float32" for "tensor(float)"."""
    return re.sub(r"^tensor\((.*)\)$", r"\1", kind).replace("float", "float32").replace("float3216", "float16")


def prepare(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path) -> Bind:
    """A `per_shape.Prepare`: a `session` whose inputs and outputs are bound to torch's memory."""
    import onnxruntime as ort

    opened = session(export(module, args, folder))
    first, *names = (i.name for i in opened.get_inputs())

    def shared(t: Tensor) -> Any:
        # from numpy, whose dtype and shape are checked; of an address nothing would be
        return ort.OrtValue.ortvalue_from_numpy(t.numpy())

    def bind(rest: Sequence[Tensor]) -> Call:
        binding = opened.io_binding()
        results = tuple(torch.zeros(o.shape, dtype=torch.float32, device="cpu") for o in opened.get_outputs())
        for name, t in zip(names, rest, strict=True):
            binding.bind_ortvalue_input(name, shared(t))
        for o, result in zip(opened.get_outputs(), results):
            binding.bind_ortvalue_output(o.name, shared(result))

        def call(x: Tensor, kept: object = rest) -> Tensors:
            with raising_one_sentence("ONNX Runtime"):
                binding.bind_ortvalue_input(first, shared(x))
                opened.run_with_iobinding(binding)
            return tuple(y.clone() for y in results)

        return call

    return bind
