"""A module becomes an ONNX file: traced, simplified, its layers named as in the module, and checked."""

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

LARGEST = 3 << 29  # bytes of weights in one file; protobuf allows 2 GiB
# operators whose second input is a weight
WEIGHTED = ("Conv", "Gemm", "MatMul", "GroupNormalization", "LayerNormalization")


def opset(target: str, precision: str) -> int:
    """The ONNX opset to write a graph in.

    Opset 21 has GroupNormalization, which TensorRT fuses, and whose statistics are in float32 even in a float16 graph.
    ONNX Runtime on a CPU has no kernel for it and is slower with the operators that it replaces it by, so that float32
    for the CPU is written in opset 18.
    """
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
    """Export a module.

    Args:
        module: The module; its arguments and results are those of ``inputs`` and ``outputs``.
        inputs: Inputs of the graph.
        outputs: Outputs of the graph.
        batch: Smallest, best and largest extent of the first axis.
        opset: ONNX opset.
        path: File to write. Weights that are too large for one file go to ``path``.data.
        stage: Called with the name of each stage when it begins.

    Raises:
        ValueError: If the exporter or the checker refuses the module.
    """
    least, _, most = batch
    args = example(inputs, max(least, min(2, most)))
    axis = {0: torch.export.Dim(BATCH, min=least, max=most)} if least < most else None
    try:
        with quiet_exporter():
            stage("trace")
            # here, because torch.onnx.export would fall back to fixed sizes when the batch size cannot vary
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
    """Bytes of an initializer."""
    return initializer.const_value.nbytes


def _axes(args: tuple[Any, ...], axis: Any) -> Any:
    """Dynamic shapes for torch.export, to which the arguments after the first are one, ``*description``."""
    if axis is None:
        return None
    return (axis,) if len(args) == 1 else (axis, tuple(axis for _ in args[1:]))


def name_weights(graph: Any) -> None:
    """Name what is computed from a weight alone after the weight.

    That is a part of it, or its transpose: "unet.up.0.0.shortcut.weight:2" is the second part of that weight.
    """
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
    """Name every layer as in the module: "unet.up.0.0.conv1", and "unet.up.0.0.conv1/2" where it is used again."""
    uses: Counter[str] = Counter()
    for node in graph:
        if node.op_type in WEIGHTED and node.inputs[1].name in graph.initializers and ".weight" in node.inputs[1].name:
            weight = node.inputs[1].name
            if f"{weight.removesuffix(':1')}:2" not in graph.initializers:
                weight = weight.removesuffix(":1")  # there is only one part
            layer = weight.replace(".weight", "")
            uses[layer] += 1
            node.name = layer if uses[layer] == 1 else f"{layer}/{uses[layer]}"


def simplify(model: Any) -> None:
    """Fold constants, whatever their size, and merge equal ones; drop metadata, which would tell about this machine.

    After folding, the parts of a weight are weights of their own.
    """
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
