"""Networks by OpenVINO on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .onnx import export
from .onnxruntime import raising_one_sentence
from .per_shape import Bind, Call, Tensors


def prepare(module: nn.Module, args: Tensors, dtype: torch.dtype, folder: Path) -> Bind:
    """A `per_shape.Prepare`: OpenVINO on the CPU."""
    return opened(export(module, args, folder), dtype)


def opened(path: Path, dtype: torch.dtype) -> Bind:
    """The network in a file, tuned for latency. Inputs are shared with torch, not copied."""
    import openvino as ov

    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
    }
    compiled = ov.Core().compile_model(path, "CPU", config)

    def shared(t: Tensor) -> Any:
        return ov.Tensor(t.numpy(), shared_memory=True)

    def bind(rest: Sequence[Tensor]) -> Call:
        request = compiled.create_infer_request()
        for n, value in enumerate(rest, 1):
            request.set_input_tensor(n, shared(value))

        def call(x: Tensor, kept: object = rest) -> Tensors:
            with raising_one_sentence("OpenVINO"):
                request.set_input_tensor(0, shared(x))
                request.infer(share_outputs=True)
                outputs = [request.get_output_tensor(n).data for n in range(len(compiled.outputs))]
                return tuple(torch.from_numpy(y).clone() for y in outputs)

        return call

    return bind
