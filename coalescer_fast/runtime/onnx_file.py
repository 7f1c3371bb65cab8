"""Networks by engines for CPUs that read ONNX files, each as a `static.Prepare`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .static import Bind, Call, Tensors


def export(module: nn.Module, args: Tensors, folder: Path) -> Path:
    """The module as ONNX, made once a folder."""
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


def onnxruntime(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path) -> Bind:
    """ONNX Runtime's CPU provider with all optimisations; inputs and outputs are bound to torch's memory."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = ort.InferenceSession(export(module, args, folder), options, providers=["CPUExecutionProvider"])
    first, *names = (i.name for i in session.get_inputs())

    def bind(rest: Sequence[Tensor]) -> Call:
        binding = session.io_binding()
        kept = [ort.OrtValue.ortvalue_from_numpy(t.numpy()) for t in rest]
        for name, value in zip(names, kept):
            binding.bind_ortvalue_input(name, value)
        results = tuple(torch.zeros(o.shape) for o in session.get_outputs())
        for o, result in zip(session.get_outputs(), results):
            binding.bind_output(o.name, "cpu", 0, np.float32, o.shape, result.data_ptr())

        def call(x: Tensor, kept: object = (rest, kept)) -> Tensors:
            x = x.contiguous()
            binding.bind_input(first, "cpu", 0, np.float32, x.shape, x.data_ptr())
            session.run_with_iobinding(binding)
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
            x = x.detach().contiguous()  # alive while it runs
            request.set_input_tensor(0, shared(x))
            request.infer(share_outputs=True)
            return tuple(torch.from_numpy(request.get_output_tensor(n).data).clone() for n in range(len(compiled.outputs)))

        return call

    return bind
