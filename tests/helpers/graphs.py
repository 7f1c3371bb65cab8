"""ONNX graphs to quantize."""

from __future__ import annotations

import onnx

from coalescer_fast.export.quantize.layers import find_layers

# ONNX Runtime fuses a ReLU into a convolution if the range begins at 0
RANGE = {"input": (0.0, 3.0), "output": (0.0, 3.0)}


def prepared(folder, target="cpu"):
    """An exported graph and its layers that can be quantized."""
    model = onnx.load(folder / "model.onnx")
    return model, find_layers(model, target)


def convolution(weight, bias, opset=21):
    """-conv(x) of two channels, 4x4."""
    dtype = onnx.helper.np_dtype_to_tensor_dtype(weight.dtype)
    stored = {"conv.weight": weight, **({} if bias is None else {"conv.bias": bias})}
    node = onnx.helper.make_node("Conv", ["x", *stored], ["y"], "conv", pads=[1, 1, 1, 1])
    ports = [
        onnx.helper.make_tensor_value_info(name, dtype, ["n", n, 4, 4]) for name, n in (("x", 2), ("z", len(weight)))
    ]
    nodes = [node, onnx.helper.make_node("Neg", ["y"], ["z"])]
    graph = onnx.helper.make_graph(
        nodes, "g", ports[:1], ports[1:], [onnx.numpy_helper.from_array(a, n) for n, a in stored.items()]
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
