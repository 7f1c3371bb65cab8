"""Int8 in an ONNX graph: where the QuantizeLinear and DequantizeLinear nodes (Q/DQ) are placed.

There are two flavours, because no graph serves both engines:

- "tensorrt": inputs and weights of convolutions in int8 with zero point 0, biases and outputs in float.
- "cpu": what ONNX Runtime fuses to QLinearConv. Inputs and outputs in uint8, weights in int8, and biases in int32 with
  the scale of the input times that of the weight.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..onnx.graph import LARGEST
from .layers import Layer, bias_names, replace_nodes
from .scales import Range, quantize_weight, scale_and_zero

# Largest bias in int32. The products of inputs and weights are added to it: there is room for 30,000 of them.
LARGEST_BIAS = 2**30


def insert(model: Any, layers: Sequence[Layer], ranges: Mapping[str, Mapping[str, Range]], target: str) -> Any:
    """Quantize layers of a model.

    Args:
        model: An ``onnx.ModelProto``, after `layers.find_layers`.
        layers: The layers to quantize. A tensor that several of them read is quantized once.
        ranges: Range of each tensor of each layer, by layer and "input" or "output".
        target: "cpu" or "tensorrt".

    Returns:
        A copy of the model with these layers in int8.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    insertion = _Insertion(out.graph, layers, ranges, target)
    replace_nodes(out.graph, insertion.nodes(), insertion.constants)
    return out


class _Insertion:
    """Places Q/DQ nodes in one graph."""

    def __init__(self, graph: Any, layers: Sequence[Layer], ranges: Mapping[str, Mapping[str, Range]], target: str):
        self.graph, self.target = graph, target
        self.layers = {layer.name: layer for layer in layers}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.dtype = next(self._array(layer.weight).dtype for layer in layers)
        # Outputs are read in int8 by everything, or else ONNX Runtime does not fuse them; inputs only by convolutions.
        self.outputs = {layer.output for layer in layers} if target == "cpu" else set[str]()
        self.scales: dict[str, Any] = {}  # of tensors
        self.weight_scales: dict[str, Any] = {}  # of weights that are quantized already
        self.pairs: dict[str, list[Any]] = {}  # Q and DQ nodes that follow a tensor
        tensors = {name: ranges[layer.name][which] for layer in layers for which, name in layer.tensors(target).items()}
        for name, ends in tensors.items():
            self._add_pair(name, ends)
        self.least_scales = self._least_scales()

    def nodes(self) -> list[Any]:
        """The nodes of the quantized graph. New constants are in ``constants``."""
        nodes = [each for port in self.graph.input for each in self.pairs.get(port.name, ())]
        for node in self.graph.node:
            layer = self.layers.get(node.name) if node.op_type == "Conv" else None
            for i, name in enumerate(node.input):
                if name in self.outputs or (layer is not None and name == layer.input):
                    node.input[i] = f"{name}:int8"
            if layer is not None:
                nodes += self._quantize_constants(node, layer)
            nodes.append(node)
            nodes += [each for name in node.output for each in self.pairs.get(name, ())]
        return nodes

    def _array(self, name: str) -> Any:
        return numpy_helper.to_array(self.constants[name])

    def _constant(self, name: str, value: Any) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _add_pair(self, name: str, ends: Range) -> None:
        """Q and DQ nodes behind a tensor."""
        self.scales[name], zero = scale_and_zero(ends, self.target, self.dtype)
        how = [self._constant(f"{name}:scale", self.scales[name]), self._constant(f"{name}:zero", zero)]
        quantized = f"{name}:quantized"
        self.pairs[name] = [
            helper.make_node("QuantizeLinear", [name, *how], [quantized], f"{name}/quantize"),
            helper.make_node("DequantizeLinear", [quantized, *how], [f"{name}:int8"], f"{name}/dequantize"),
        ]

    def _least_scales(self) -> dict[str, Any]:
        """For each weight, the scales (C,) with which the biases of all its uses stay below `LARGEST_BIAS`."""
        least: dict[str, Any] = {}
        for name, bias in bias_names(self.graph).items():
            if self.target == "cpu" and (layer := self.layers.get(name)) is not None:
                room = LARGEST_BIAS * float(self.scales[layer.input])
                needed = np.abs(self._array(bias).astype(np.float64)) / room
                least[layer.weight] = np.maximum(least.get(layer.weight, 0.0), needed)
        return least

    def _quantize_constants(self, node: Any, layer: Layer) -> list[Any]:
        """Have a convolution read its weight in int8, and for "cpu" its bias in int32; returns the DQ nodes."""
        nodes, weight = [], layer.weight
        if weight not in self.weight_scales:
            integers, scales = quantize_weight(self._array(weight), self.dtype, self.least_scales.get(weight, 0.0))
            self.weight_scales[weight] = scales
            zero = self._constant(f"{weight}:zero", np.zeros(len(integers), np.int8))
            how = [self._constant(f"{weight}:quantized", integers), self._constant(f"{weight}:scale", scales), zero]
            nodes.append(helper.make_node("DequantizeLinear", how, [f"{weight}:int8"], f"{weight}/dequantize", axis=0))
        node.input[1] = f"{weight}:int8"
        if self.target == "cpu" and len(node.input) == 3:
            scale = self.scales[layer.input].astype(np.float64) * self.weight_scales[weight]
            integers = np.rint(self._array(node.input[2]) / scale).astype(np.int32)
            bias = f"{layer.name}:bias"
            how = [
                self._constant(f"{bias}:quantized", integers),
                self._constant(f"{bias}:scale", scale.astype(self.dtype)),
            ]
            nodes.append(helper.make_node("DequantizeLinear", how, [f"{bias}:int32"], f"{bias}/dequantize", axis=0))
            node.input[2] = f"{bias}:int32"
        return nodes


def save(model: Any, path: Path) -> None:
    """Write and check a model, with its weights beside it if they are too large for one file."""
    large = sum(tensor.ByteSize() for tensor in model.graph.initializer) > LARGEST
    location = f"{path.name}.data" if large else None
    onnx.save(model, path, save_as_external_data=large, location=location)
    onnx.checker.check_model(str(path), full_check=not large)


def float_layers(path: Path, layers: Collection[Layer]) -> list[str]:
    """Names of the layers that ONNX Runtime computes in float after its optimisations, instead of in integers."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the optimised graph is for this machine only
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
    integer = {node.name for node in optimised.graph.node if node.op_type == "QLinearConv"}
    return [layer.name for layer in layers if layer.name not in integer]
