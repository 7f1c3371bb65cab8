from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the package onnx")
pytest.importorskip("onnxscript", reason="needs the package onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
from coalescer_fast.export.quantize import qdq  # noqa: E402
from coalescer_fast.export.quantize.layers import Layer, fitting  # noqa: E402

from ...helpers.graphs import RANGE, convolution, prepared  # noqa: E402

onnx = pytest.importorskip("onnx", reason="needs the package onnx")


onnxruntime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")


def counted(model):
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("kind", ["unet", "decoder", "generator"])
def test_what_is_inserted_for_a_cpu(exported, kind, tmp_path):
    model, layers = prepared(exported / kind)
    kept, quantised = layers[0], layers[1:]
    out = qdq.insert(model, quantised, dict.fromkeys((layer.name for layer in layers), RANGE), "cpu")
    tensors = {name for layer in quantised for name in layer.tensors("cpu").values()}
    weights = {layer.weight for layer in quantised}
    biases = [
        node for node in model.graph.node if node.name in {layer.name for layer in quantised} and len(node.input) == 3
    ]
    count = counted(out)
    assert count["QuantizeLinear"] == len(tensors)
    assert count["DequantizeLinear"] == len(tensors) + len(weights) + len(biases)
    stored = {tensor.name: tensor for tensor in out.graph.initializer}
    assert not (weights - {kept.weight}) & set(stored)  # the float weights are gone
    nodes = {node.name: node for node in out.graph.node}
    assert all(nodes[layer.name].input[0] == f"{layer.input}:int8" for layer in quantised)
    if kept.module not in {layer.module for layer in quantised}:
        assert nodes[kept.name].input[1] == kept.weight
    for layer in quantised:
        weight = stored[f"{layer.weight}:quantized"]
        assert weight.data_type == onnx.TensorProto.INT8
        assert list(stored[f"{layer.weight}:scale"].dims) == [weight.dims[0]]
    path = tmp_path / "model.onnx"
    qdq.save(out, path)
    assert qdq.float_layers(path, quantised) == []
    assert qdq.float_layers(path, [kept]) == [kept.name]


def test_what_is_inserted_for_tensorrt(exported_half, tmp_path):
    model, layers = prepared(exported_half, "tensorrt")
    out = qdq.insert(model, layers, dict.fromkeys((layer.name for layer in layers), RANGE), "tensorrt")
    count = counted(out)
    assert count["QuantizeLinear"] == len({layer.input for layer in layers})
    assert count["DequantizeLinear"] == count["QuantizeLinear"] + len({layer.weight for layer in layers})
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in out.graph.initializer}
    assert "INT32" not in {onnx.TensorProto.DataType.Name(t.data_type) for t in out.graph.initializer if ":" in t.name}
    for node in out.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert stored[node.input[1]].dtype == np.float16
            assert stored[node.input[2]].dtype == np.int8
            assert not stored[node.input[2]].any()
    qdq.save(out, tmp_path / "model.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx")


def both(model, ranges, target, x, tmp_path):
    """(z in float, z in int8) by ONNX Runtime, of all layers that are fit."""
    layers = [Layer("conv", "x", "conv.weight", "y")]
    layers, unfit = fitting(model, layers, {"conv": ranges}, target)
    assert not unfit
    path = tmp_path / "int8.onnx"
    qdq.save(qdq.insert(model, layers, {"conv": ranges}, target), path)
    if target == "cpu":
        assert qdq.float_layers(path, layers) == []
    return [onnxruntime.InferenceSession(each).run(None, {"x": x})[0] for each in (model.SerializeToString(), path)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_small_weights_count(dtype, tmp_path):
    generator = np.random.default_rng(0)
    size = np.array([1, 0.0077, 1e-3, 1e-4, 2e-5]).reshape(-1, 1, 1, 1)
    weight = (generator.uniform(-1, 1, (5, 2, 3, 3)) * size).astype(dtype)
    x = generator.uniform(-3, 3, (2, 2, 4, 4)).astype(dtype)
    y, quantised = both(
        convolution(weight, None), {"input": (-3.0, 3.0), "output": (-20.0, 20.0)}, "tensorrt", x, tmp_path
    )
    error = np.abs(quantised.astype(np.float64) - y).max((0, 2, 3)) / np.abs(y.astype(np.float64)).max((0, 2, 3))
    assert (error < 0.03).all(), error


def test_a_bias_is_kept_where_scales_are_small(tmp_path):
    """If the weights of a channel or the inputs are almost 0, only the bias is left: |b| / (s_x s_w) > 2^31."""
    generator = np.random.default_rng(0)
    weight = generator.uniform(-1, 1, (4, 2, 3, 3)).astype(np.float32)
    weight[1], weight[2], weight[3] = 1e-9 * weight[1], 1e-30 * weight[2], 0
    bias = np.array([0.5, 1.0, -1.0, 0.25], np.float32)
    for largest in (3.0, 1e-4, 1e-20):
        x = (largest * generator.uniform(-1, 1, (2, 2, 4, 4))).astype(np.float32)
        model = convolution(weight, bias)
        (exact,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
        output = float(-exact.max()), float(-exact.min())
        y, quantised = both(model, {"input": (-largest, largest), "output": output}, "cpu", x, tmp_path)
        step = (output[1] - output[0]) / 255
        # of the output's rounding half a step, and in channel 0 what its inputs' and weights' rounding makes
        assert (np.abs(quantised - y).max((0, 2, 3))[1:] <= 0.51 * step).all()
        assert np.abs(quantised - y)[:, 0].max() <= 0.51 * step + 18 * largest / 127


def test_a_weight_leaves_room_for_the_biases_of_all_its_uses():
    weight = np.full((2, 2, 3, 3), 1e-3, np.float32)
    model = convolution(weight, np.array([1.0, 1e-3], np.float32))
    second = onnx.NodeProto()
    second.CopyFrom(model.graph.node[0])
    second.name, second.input[0], second.output[0] = "conv/2", "y", "w"
    model.graph.node.append(second)
    layers = [
        Layer("conv", "x", "conv.weight", "y"),
        Layer("conv/2", "y", "conv.weight", "w"),
    ]
    ranges = {
        "conv": {"input": (0.0, 1e-12), "output": (0.0, 1.0)},
        "conv/2": {"input": (0.0, 1.0), "output": (0.0, 1.0)},
    }
    out = qdq.insert(model, layers, ranges, "cpu")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in out.graph.initializer}
    assert stored["conv.weight:scale"][0] == pytest.approx(1 / (2**30 * 1e-12 / 255), rel=5e-3)
    assert stored["conv.weight:scale"][1] == pytest.approx(1e-3 / (2**30 * 1e-12 / 255), rel=5e-3)
    for use in ("conv", "conv/2"):
        kept = stored[f"{use}:bias:quantized"] * stored[f"{use}:bias:scale"].astype(np.float64)
        np.testing.assert_allclose(kept, [1.0, 1e-3], atol=float(stored[f"{use}:bias:scale"].max()) / 2)
