"""From a module to an ONNX file that is small, checked, and names its layers after the module's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import nn

from coalescer_fast.runtime.engines.manifest import BATCH, Port
from coalescer_fast.runtime.engines.onnx import quiet_exporter

from .modules import example

# the largest file of protobuf's is 2 GiB
LARGEST = 3 << 29
WEIGHTED = ("Conv", "Gemm", "MatMul", "GroupNormalization", "LayerNormalization")


def opset(target: str, precision: str) -> int:
    """18 for float32 in ONNX Runtime on a CPU, which has no kernel for GroupNormalization and is slower with what it makes of it; 21, which
    has that operator, for TensorRT, which fuses it, and for float16, where its statistics are float32."""
    return 18 if (target, precision) == ("cpu", "fp32") else 21


def export_graph(
    module: nn.Module,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    batch: tuple[int, int, int],
    opset: int,
    path: Path,
    stage: Callable[[str], object] = lambda text: None,
) -> None:
    """Write the module to ``path``, weights that are too large for one file to ``path``.data; the first axis is ``batch``'s range.

    ``stage``: told what begins. Raises ValueError for a module that the exporter or the checker refuses.
    """
    least, _, most = batch
    args = example(inputs, max(least, min(2, most)))
    axis = {0: torch.export.Dim(BATCH, min=least, max=most)} if least < most else None
    try:
        with quiet_exporter():
            stage("trace")
            # and not by torch.onnx.export, which falls back to fixed sizes
            traced = torch.export.export(module, args, dynamic_shapes=_axes(args, axis))
            stage("translate")
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=opset,
                input_names=[p.name for p in inputs],
                output_names=[p.name for p in outputs],
                optimize=False,
                verbose=False,
            )
            stage("simplify")
            model = program.model  # type: ignore[union-attr]
            name_weights(model.graph)
            simplify(model)
            name_layers(model.graph)
            stage("check")
            large = sum(map(stored, model.graph.initializers.values())) > LARGEST
            ir.save(model, path, external_data=f"{path.name}.data" if large else None)
            onnx.checker.check_model(str(path), full_check=True)
    except (RuntimeError, onnx.checker.ValidationError) as error:
        reason = " ".join(str(error).partition("\n\n")[0].split()) or type(error).__name__
        raise ValueError(f"the network cannot be exported: {reason:.500}") from error


def stored(initializer: Any) -> int:
    """Its bytes."""
    return initializer.const_value.nbytes


def _axes(args: tuple[Any, ...], axis: Any) -> Any:
    """As torch.export wants them: the arguments after the first are one, *description."""
    if axis is None:
        return None
    return (axis,) if len(args) == 1 else (axis, tuple(axis for _ in args[1:]))


def name_weights(graph: Any) -> None:
    """Call what is computed of a weight alone, a part or its transpose, after the weight: "unet.up.0.0.shortcut.weight:2" is the second."""
    parts: Counter[str] = Counter()
    for node in graph:
        if node.op_type not in WEIGHTED or (value := node.inputs[1]).producer() is None:
            continue
        root = value
        while (producer := root.producer()) is not None and producer.inputs and producer.inputs[0] is not None:
            root = producer.inputs[0]
        if root.name in graph.initializers and root.name.endswith(".weight"):
            parts[root.name] += 1
            value.name = f"{root.name}:{parts[root.name]}"


def name_layers(graph: Any) -> None:
    """Call every layer what the module calls it, "unet.up.0.0.conv1", and from its second use on "unet.up.0.0.conv1/2"."""
    uses: Counter[str] = Counter()
    for node in graph:
        if node.op_type in WEIGHTED and node.inputs[1].name in graph.initializers and ".weight" in node.inputs[1].name:
            weight = node.inputs[1].name
            if f"{weight.removesuffix(':1')}:2" not in graph.initializers:
                weight = weight.removesuffix(":1")  # the only part
            layer = weight.replace(".weight", "")
            uses[layer] += 1
            node.name = layer if uses[layer] == 1 else f"{layer}/{uses[layer]}"


def simplify(model: Any) -> None:
    """Fold constants whatever their size (parts of a weight are then weights), keep equal ones once, drop what tells of this machine."""
    anything = 1 << 40
    optimizer.optimize_ir(model, input_size_limit=anything, output_size_limit=anything)
    for each in (
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(anything),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        each(model)
