"""Int8 in an ONNX graph: which layers, and the QuantizeLinear and DequantizeLinear (Q/DQ) around them.

    q = clip(round(x / s) + z),   x ≈ (q - z) s

Two flavours, for no file serves both. "tensorrt": inputs and weights of convolutions in int8, z = 0, bias and output in float. "cpu": what
ONNX Runtime fuses to QLinearConv: inputs and outputs in uint8 with a z each, weights in int8 with z = 0, bias in int32 of scale s_x s_w.
Weights have a scale for each output channel, in the graph's dtype, subnormal in float16 where they are small: |(q - z) s - w| <= s / 2.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..onnx.graph import LARGEST
from .ranges import Range

# What stays in float: what reads R and p, what writes the two heads,
FLOAT = ("*conv_in", "*_head")
# the last that what the heads read is a sum of, which of all layers of the embedded model costs most (`quantize --sensitivity`),
LAST = re.compile(r"\bunet\.up\.\d+\.\d+\.conv2$")
# and of the decoder's outside its blocks the first, the last, and the one before, whose output the last blocks only add to.
TRUNK = re.compile(r"\bdecoder\.layers\.\d+$")
# Smallest scale of an input or output, by which engines divide: of float16 the smallest power of two whose reciprocal is finite there, by
# which TensorRT-RTX 1.7 multiplies; of float32 one whose products and quotients with scales of weights are.
SMALLEST = {"float16": 2.0**-15, "float32": 2.0**-100}
# of a bias in int32, to which the products of inputs and weights are still to be added: for 30,000 of them there is room
LARGEST_BIAS = 2**30


@dataclass(frozen=True)
class Layer:
    """A convolution, and the tensors that are quantised with it; output: after its bias and ReLU."""

    name: str
    input: str
    weight: str
    output: str

    @property
    def module(self) -> str:
        """Its name but for which use of it this is: "unet.mid.0.conv1" of "unet.mid.0.conv1/2"."""
        return self.name.partition("/")[0]

    def tensors(self, target: str) -> dict[str, str]:
        return {"input": self.input, **({"output": self.output} if target == "cpu" else {})}


def prepare(model: Any, target: str) -> list[Layer]:
    """The layers that can be quantised, in order: all convolutions but `FLOAT`, `LAST` and three of `TRUNK`.

    What reads a concatenation is a layer a part by then (`onnx.graph.name_weights`), each with a range of its own.
    For "cpu", a bias that is added behind its convolution becomes part of it, which changes the model.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    if target == "cpu":
        _fold_biases(graph, constants)
    readers = _readers(graph)
    convolutions = [node for node in graph.node if node.op_type == "Conv" and node.input[1] in constants]
    modules = list(dict.fromkeys(node.name.partition("/")[0] for node in convolutions))
    trunk = [name for name in modules if TRUNK.search(name)]
    float_ = (*FLOAT, *[name for name in modules if LAST.search(name)][-1:], *trunk[:1], *trunk[-2:])
    found = []
    for node in convolutions:
        output = node.output[0]
        if [each.op_type for each in readers[output]] == ["Relu"]:
            output = readers[output][0].output[0]
        layer = Layer(node.name, node.input[0], node.input[1], output)
        if not any(fnmatchcase(layer.module, pattern) for pattern in float_):
            found.append(layer)
    return found


def without(layers: Sequence[Layer], patterns: Iterable[str]) -> list[Layer]:
    """Those that no pattern names, by their own or their module's name. Raises ValueError for a pattern that names none."""
    for pattern in patterns:
        left = [each for each in layers if not (fnmatchcase(each.name, pattern) or fnmatchcase(each.module, pattern))]
        if len(left) == len(layers):
            names = list(dict.fromkeys(each.module for each in layers))
            raise ValueError(
                f"no layer to keep is called {pattern!r}: the graph quantises {', '.join(names[:3])}, ..., {names[-1]}"
            )
        layers = left
    return list(layers)


def fitting(
    model: Any, layers: Iterable[Layer], ranges: Mapping[str, Mapping[str, Range]], target: str
) -> tuple[list[Layer], dict[str, str]]:
    """Those of the prepared model's layers that 8 bits can hold; the others, each with the reason why it has to stay in float.

    Raises ValueError for weights that are not finite.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    biases = _biases(model.graph)
    found, left = [], {}
    for layer in layers:
        for name in (layer.weight, biases.get(layer.name)):
            if name is not None and not np.isfinite(numpy_helper.to_array(constants[name])).all():
                raise ValueError(f"the graph cannot be quantised: its {name} holds numbers that are not finite")
        dtype = numpy_helper.to_array(constants[layer.weight]).dtype
        smallest = SMALLEST[dtype.name]
        small = {
            which: span(ends, target) for which, ends in ranges[layer.name].items() if span(ends, target)[0] < smallest
        }
        if small:
            which, (step, steps) = next(iter(small.items()))
            left[layer.name] = f"its {which} spans {step * steps:.3g}, too little for a scale in {dtype.name}"
        else:
            found.append(layer)
    return found, left


def insert(model: Any, layers: Sequence[Layer], ranges: Mapping[str, Mapping[str, Range]], target: str) -> Any:
    """A copy of the prepared model with these layers in int8; a tensor that several of them read is quantised once."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    dtype = next(numpy_helper.to_array(constants[layer.weight]).dtype for layer in layers)
    tensors = {name: ranges[layer.name][which] for layer in layers for which, name in layer.tensors(target).items()}
    # what a convolution gives is read in int8 by all, else ONNX Runtime does not fuse it; its input by convolutions alone
    given = {layer.output for layer in layers} if target == "cpu" else set[str]()
    scales: dict[str, Any] = {}
    around: dict[str, list[Any]] = {}

    def constant(name: str, value: Any) -> str:
        if name not in constants:
            constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    for name, ends in tensors.items():
        scales[name], zero = scale_of(ends, target, dtype)
        how = [constant(f"{name}:scale", scales[name]), constant(f"{name}:zero", zero)]
        around[name] = [
            helper.make_node("QuantizeLinear", [name, *how], [f"{name}:quantized"], f"{name}/quantize"),
            helper.make_node("DequantizeLinear", [f"{name}:quantized", *how], [f"{name}:int8"], f"{name}/dequantize"),
        ]

    by_name = {layer.name: layer for layer in layers}
    # of weights: the scale of every channel that leaves room for its bias, in all uses
    room: dict[str, Any] = {}
    for name, bias in _biases(graph).items():
        if target == "cpu" and (layer := by_name.get(name)) is not None:
            needed = np.abs(numpy_helper.to_array(constants[bias]).astype(np.float64)) / (
                LARGEST_BIAS * float(scales[layer.input])
            )
            room[layer.weight] = np.maximum(room.get(layer.weight, 0.0), needed)
    nodes = [each for port in graph.input for each in around.get(port.name, ())]
    weights: dict[str, Any] = {}
    for node in graph.node:
        layer = by_name.get(node.name) if node.op_type == "Conv" else None
        for i, name in enumerate(node.input):
            if name in given or (layer is not None and name == layer.input):
                node.input[i] = f"{name}:int8"
        if layer is not None:
            weight = layer.weight
            if weight not in weights:
                array = numpy_helper.to_array(constants[weight])
                quantized, weights[weight] = quantize_weight(array, dtype, room.get(weight, 0.0))
                zero = constant(f"{weight}:zero", np.zeros(len(quantized), np.int8))
                what = [constant(f"{weight}:quantized", quantized), constant(f"{weight}:scale", weights[weight]), zero]
                nodes.append(
                    helper.make_node("DequantizeLinear", what, [f"{weight}:int8"], f"{weight}/dequantize", axis=0)
                )
            node.input[1] = f"{weight}:int8"
            if target == "cpu" and len(node.input) == 3:
                scale = scales[layer.input].astype(np.float64) * weights[weight]
                added = np.rint(numpy_helper.to_array(constants[node.input[2]]) / scale).astype(np.int32)
                name = f"{layer.name}:bias"
                what = [constant(f"{name}:quantized", added), constant(f"{name}:scale", scale.astype(dtype))]
                nodes.append(
                    helper.make_node("DequantizeLinear", what, [f"{name}:int32"], f"{name}/dequantize", axis=0)
                )
                node.input[2] = f"{name}:int32"
        nodes.append(node)
        nodes += [each for name in node.output for each in around.get(name, ())]
    _replace(graph, nodes, constants)
    return out


def span(ends: Range, target: str) -> tuple[float, int]:
    """(step, steps) of a tensor: of ±max |x| for int8; for "cpu", uint8, of an interval that 0 is in, so that padding is exact."""
    least, most = min(ends[0], 0.0), max(ends[1], 0.0)
    return ((most - least) / 255, 255) if target == "cpu" else (max(most, -least) / 127, 127)


def scale_of(ends: Range, target: str, dtype: Any) -> tuple[Any, Any]:
    """Scale and zero point of a tensor, see `span`; no scale is below `SMALLEST`."""
    step, steps = span(ends, target)
    scale = scale_for(max(step, SMALLEST[dtype.name]) * steps, steps, dtype)[()]
    if target != "cpu":
        return scale, np.int8(0)
    return scale, np.uint8(np.rint(-min(ends[0], 0.0) / scale).clip(0, 255))


def scale_for(largest: Any, steps: int, dtype: Any) -> Any:
    """A scale s > 0 in this dtype, or an array of them, with largest / s <= steps + 1/2: what is rounded to it is off by s / 2 at most."""
    largest = np.asarray(largest, np.float64)
    # ONNX Runtime and TensorRT-RTX 1.7 read scales of weights into float32, where the smallest of float16 is like any other number
    smallest = max(float(np.finfo(dtype).smallest_subnormal), float(np.finfo(np.float32).tiny))
    scale = np.maximum(largest / steps, smallest).astype(dtype)
    short = largest > (steps + 0.5) * scale.astype(np.float64)  # rounded down, which in a subnormal number is much
    return np.where(short, np.nextafter(scale, dtype.type(np.inf)), scale)


def quantize_weight(weight: Any, dtype: Any, room: Any = 0.0) -> tuple[Any, Any]:
    """(int8 (C, ...), scales (C,)): of every output channel, max |w| / 127, or ``room`` (C,) where that is larger."""
    wide = weight.astype(np.float64)
    needed = np.maximum(np.abs(wide).reshape(len(wide), -1).max(1), 127 * room)
    scales = scale_for(needed, 127, dtype)
    scales[needed == 0] = 1
    quantized = np.rint(wide / scales.astype(np.float64).reshape(-1, *[1] * (wide.ndim - 1)))
    return quantized.clip(-127, 127).astype(np.int8), scales


def save(model: Any, path: Path) -> None:
    """Checked, weights beside it where they are too large for one file."""
    large = sum(tensor.ByteSize() for tensor in model.graph.initializer) > LARGEST
    location = f"{path.name}.data" if large else None
    onnx.save(model, path, save_as_external_data=large, location=location)
    onnx.checker.check_model(str(path), full_check=not large)


def float_layers(path: Path, layers: Collection[Layer]) -> list[str]:
    """Names of those that ONNX Runtime's optimised graph computes in float."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the optimised graph is for this machine
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
    integer = {node.name for node in optimised.graph.node if node.op_type == "QLinearConv"}
    return [layer.name for layer in layers if layer.name not in integer]


def _biases(graph: Any) -> dict[str, str]:
    """Convolution -> its bias."""
    return {node.name: node.input[2] for node in graph.node if node.op_type == "Conv" and len(node.input) == 3}


def _readers(graph: Any) -> dict[str, list[Any]]:
    """Tensor -> nodes that read it, where the graph's outputs are read, too."""
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    for port in graph.output:
        readers[port.name].append(helper.make_node("", [port.name], []))
    return readers


def _fold_biases(graph: Any, constants: dict[str, Any]) -> None:
    readers = _readers(graph)
    dropped = set()
    for node in graph.node:
        if (
            node.op_type != "Conv"
            or len(node.input) != 2
            or node.input[1] not in constants
            or len(readers[node.output[0]]) != 1
        ):
            continue
        (add,) = readers[node.output[0]]
        channels = constants[node.input[1]].dims[0]
        added = [
            name for name in add.input if name in constants and list(constants[name].dims)[-3:] == [channels, 1, 1]
        ]
        if add.op_type != "Add" or not added or np.prod(constants[added[0]].dims) != channels:
            continue
        bias = f"{added[0]}:bias"
        if bias not in constants:
            constants[bias] = numpy_helper.from_array(
                numpy_helper.to_array(constants[added[0]]).reshape(channels), bias
            )
        node.input.append(bias)
        node.output[0] = add.output[0]
        dropped.add(add.output[0])
    kept = [node for node in graph.node if not (node.op_type == "Add" and node.output[0] in dropped)]
    _replace(graph, kept, constants)


def _replace(graph: Any, nodes: Iterable[Any], constants: Mapping[str, Any]) -> None:
    """New nodes, and of the constants those that they read."""
    nodes = [_copy(node) for node in nodes]
    read = {name for node in nodes for name in node.input} | {port.name for port in graph.output}
    used = [tensor for name, tensor in constants.items() if name in read]
    copies = [_copy(tensor) for tensor in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(copies)


def _copy(message: Any) -> Any:
    """Of what belongs to a list that is about to be cleared."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
