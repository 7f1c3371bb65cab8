"""Networks by engines for CPUs that read ONNX files, each as a `per_shape.Prepare`."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base import quiet_torch
from .artefact import Artefact
from .per_shape import Bind, Call, Tensors

_exporting = threading.RLock()  # the exporter, and what it is told here, belong to the process


@contextmanager
def exporting() -> Iterator[None]:
    """Inside, torch's exporter runs, in one thread at a time, and says nothing."""
    with _exporting, quiet_torch(), warnings.catch_warnings():
        disabled = logging.root.manager.disable
        logging.disable(max(disabled, logging.WARNING))  # of packages that the exporter does without
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)


@contextmanager
def saying(engine: str) -> Iterator[None]:
    """Inside, whatever the engine raises, of classes of its own and in many lines, is a RuntimeError of one sentence."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RuntimeError(f"{engine} failed: {reason:.300}") from error


def export(module: nn.Module, args: Tensors, folder: Path) -> Path:
    """The module as ONNX, made once a folder."""
    path = folder / f"{type(module).__name__}.onnx"
    if not path.exists():
        with exporting():
            torch.onnx.export(module, args, path, dynamo=True, external_data=True, verbose=False)
    return path


def session(path: Path) -> Any:
    """ONNX Runtime's CPU provider with all optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors: it warns of constants that it leaves in float16
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # its threads wait busily for the next run: torch's, or another session's, would have to do without those cores
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def open_artefact(artefact: Artefact) -> Callable[[Tensors], Tensors]:
    """An exported graph by ONNX Runtime, see `exported.Open`."""
    if artefact.manifest.engine != "onnx":
        raise ValueError(
            f"{artefact.folder} is for {artefact.manifest.engine}, not for ONNX Runtime: give the artefact it was built from"
        )
    try:
        opened = session(artefact.graph)
    except Exception as error:  # ONNX Runtime has its own classes
        reason = " ".join(str(error).split())
        raise ValueError(f"ONNX Runtime cannot load {artefact.graph} ({reason:.200}): {artefact.mend}") from error
    ports = (
        [(port.name, _dtype(port.type), len(port.shape)) for port in each]
        for each in (opened.get_inputs(), opened.get_outputs())
    )
    artefact.check_ports(*ports)
    names = [port.name for port in artefact.manifest.inputs]

    def run(inputs: Tensors) -> Tensors:
        with saying("ONNX Runtime"):
            outputs = opened.run(None, {name: x.numpy(force=True) for name, x in zip(names, inputs)})
        return tuple(torch.from_numpy(y) for y in outputs)

    return run


def _dtype(kind: str) -> str:
    """torch's word for ONNX Runtime's: "float32" for "tensor(float)"."""
    return re.sub(r"^tensor\((.*)\)$", r"\1", kind).replace("float", "float32").replace("float3216", "float16")


def onnxruntime(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path) -> Bind:
    """`session`; inputs and outputs are bound to torch's memory."""
    import onnxruntime as ort

    opened = session(export(module, args, folder))
    first, *names = (i.name for i in opened.get_inputs())

    def shared(t: Tensor) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(t.numpy())  # checked, where an address would be believed

    def bind(rest: Sequence[Tensor]) -> Call:
        binding = opened.io_binding()
        results = tuple(torch.zeros(o.shape, dtype=torch.float32, device="cpu") for o in opened.get_outputs())
        for name, t in zip(names, rest, strict=True):
            binding.bind_ortvalue_input(name, shared(t))
        for o, result in zip(opened.get_outputs(), results):
            binding.bind_ortvalue_output(o.name, shared(result))

        def call(x: Tensor, kept: object = rest) -> Tensors:
            with saying("ONNX Runtime"):
                binding.bind_ortvalue_input(first, shared(x))
                opened.run_with_iobinding(binding)
            return tuple(y.clone() for y in results)

        return call

    return bind


def openvino(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path) -> Bind:
    """OpenVINO on the CPU, for latency; inputs are shared with torch, not copied."""
    import openvino as ov

    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
    }
    compiled = ov.Core().compile_model(export(module, args, folder), "CPU", config)

    def shared(t: Tensor) -> Any:
        return ov.Tensor(t.numpy(), shared_memory=True)

    def bind(rest: Sequence[Tensor]) -> Call:
        request = compiled.create_infer_request()
        for n, value in enumerate(rest, 1):
            request.set_input_tensor(n, shared(value))

        def call(x: Tensor, kept: object = rest) -> Tensors:
            with saying("OpenVINO"):
                request.set_input_tensor(0, shared(x))
                request.infer(share_outputs=True)
                return tuple(
                    torch.from_numpy(request.get_output_tensor(n).data).clone() for n in range(len(compiled.outputs))
                )

        return call

    return bind
