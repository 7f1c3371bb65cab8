"""Which layers of a float graph are quantized."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from .scales import SMALLEST, Range, span

# What stays in float: the layers that read R and p, and the two heads;
FLOAT = ("*conv_in", "*_head")
# the last layer before the heads, which costs most of all layers of the embedded model (`quantize --sensitivity`);
LAST = re.compile(r"\bunet\.up\.\d+\.\d+\.conv2$")
# and among those of the decoder, outside its blocks, the first, the last and the one before: the last blocks only add
# to the output of that one.
TRUNK = re.compile(r"\bdecoder\.layers\.\d+$")


@dataclass(frozen=True)
class Layer:
    """A convolution, and the names of the tensors that are quantized with it.

    Attributes:
        name: Name of its node.
        input: Its input.
        weight: Its weight.
        output: Its output, after its bias and a ReLU that follows.
    """

    name: str
    input: str
    weight: str
    output: str

    @property
    def module(self) -> str:
        """Name of the module, which may be used several times: "unet.mid.0.conv1" of "unet.mid.0.conv1/2"."""
        return self.name.partition("/")[0]

    def tensors(self, target: str) -> dict[str, str]:
        """Names of the tensors whose ranges are needed, by "input" and "output"."""
        return {"input": self.input, **({"output": self.output} if target == "cpu" else {})}


def find_layers(model: Any, target: str) -> list[Layer]:
    """The layers that can be quantized, in order: convolutions, but not those that have to stay in float.

    A layer that reads a concatenation has been split into a layer for each part (`graph.name_weights`), so that each
    part has a range of its own.

    Args:
        model: An ``onnx.ModelProto``. For "cpu" it is changed: an Add of a bias after a convolution becomes the bias of
            the convolution.
        target: "cpu" or "tensorrt".
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    if target == "cpu":
        _fold_biases(graph, constants)
    readers = _readers(graph)
    convolutions = [node for node in graph.node if node.op_type == "Conv" and node.input[1] in constants]
    modules = list(dict.fromkeys(node.name.partition("/")[0] for node in convolutions))
    trunk = [name for name in modules if TRUNK.search(name)]
    in_float = (*FLOAT, *[name for name in modules if LAST.search(name)][-1:], *trunk[:1], *trunk[-2:])
    found = []
    for node in convolutions:
        output = node.output[0]
        if [each.op_type for each in readers[output]] == ["Relu"]:
            output = readers[output][0].output[0]
        layer = Layer(node.name, node.input[0], node.input[1], output)
        if not any(fnmatchcase(layer.module, pattern) for pattern in in_float):
            found.append(layer)
    return found


def without(layers: Sequence[Layer], patterns: Iterable[str]) -> list[Layer]:
    """The layers whose names, and whose modules' names, match none of the patterns.

    Raises:
        ValueError: If a pattern matches no layer.
    """
    for pattern in patterns:
        left = [each for each in layers if not (fnmatchcase(each.name, pattern) or fnmatchcase(each.module, pattern))]
        if len(left) == len(layers):
            names = list(dict.fromkeys(each.module for each in layers))
            known = f"{', '.join(names[:3])}, ..., {names[-1]}"
            raise ValueError(f"no layer to keep is called {pattern!r}: the graph quantises {known}")
        layers = left
    return list(layers)


def fitting(
    model: Any, layers: Iterable[Layer], ranges: Mapping[str, Mapping[str, Range]], target: str
) -> tuple[list[Layer], dict[str, str]]:
    """Separate the layers that 8 bits can hold from those that have to stay in float.

    Args:
        model: The model, after `find_layers`.
        layers: Some of its layers.
        ranges: Range of each tensor of each layer, by layer and "input" or "output".
        target: "cpu" or "tensorrt".

    Returns:
        Layers that can be quantized, and the names of the others, each with the reason.

    Raises:
        ValueError: If a weight or bias holds numbers that are not finite.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    biases = bias_names(model.graph)
    found, left = [], {}
    for layer in layers:
        for name in (layer.weight, biases.get(layer.name)):
            if name is not None and not np.isfinite(numpy_helper.to_array(constants[name])).all():
                raise ValueError(f"the graph cannot be quantised: its {name} holds numbers that are not finite")
        dtype = numpy_helper.to_array(constants[layer.weight]).dtype
        spans = {which: span(ends, target) for which, ends in ranges[layer.name].items()}
        small = {which: each for which, each in spans.items() if each[0] < SMALLEST[dtype.name]}
        if small:
            which, (step, steps) = next(iter(small.items()))
            left[layer.name] = f"its {which} spans {step * steps:.3g}, too little for a scale in {dtype.name}"
        else:
            found.append(layer)
    return found, left


def bias_names(graph: Any) -> dict[str, str]:
    """Names of the biases of convolutions, by name of the convolution."""
    return {node.name: node.input[2] for node in graph.node if node.op_type == "Conv" and len(node.input) == 3}


def replace_nodes(graph: Any, nodes: Iterable[Any], constants: Mapping[str, Any]) -> None:
    """Replace the nodes of a graph, and keep only the constants that the new nodes read."""
    nodes = [_copy(node) for node in nodes]
    read = {name for node in nodes for name in node.input} | {port.name for port in graph.output}
    used = [_copy(tensor) for name, tensor in constants.items() if name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(used)


def _copy(message: Any) -> Any:
    """A copy of a protobuf message, which lives on when the list that it is in is cleared."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _readers(graph: Any) -> dict[str, list[Any]]:
    """Nodes that read each tensor. For an output of the graph, a node without a type is among them."""
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    for port in graph.output:
        readers[port.name].append(helper.make_node("", [port.name], []))
    return readers


def _fold_biases(graph: Any, constants: dict[str, Any]) -> None:
    """Make an Add of a bias after a convolution the convolution's own bias."""
    readers = _readers(graph)
    folded = set()
    for node in graph.node:
        if node.op_type != "Conv" or len(node.input) != 2 or node.input[1] not in constants:
            continue
        if len(readers[node.output[0]]) != 1:
            continue
        (add,) = readers[node.output[0]]
        channels = constants[node.input[1]].dims[0]
        added = [name for name in add.input if name in constants and _is_bias(constants[name], channels)]
        if add.op_type != "Add" or not added:
            continue
        bias = f"{added[0]}:bias"
        if bias not in constants:
            values = numpy_helper.to_array(constants[added[0]]).reshape(channels)
            constants[bias] = numpy_helper.from_array(values, bias)
        node.input.append(bias)
        node.output[0] = add.output[0]
        folded.add(add.output[0])
    kept = [node for node in graph.node if not (node.op_type == "Add" and node.output[0] in folded)]
    replace_nodes(graph, kept, constants)


def _is_bias(tensor: Any, channels: int) -> bool:
    return list(tensor.dims)[-3:] == [channels, 1, 1] and bool(np.prod(tensor.dims) == channels)
