from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the package onnx")
pytest.importorskip("onnxscript", reason="needs the package onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
from coalescer_fast.export import quantization  # noqa: E402

RANGE = {"input": (0.0, 3.0), "output": (0.0, 3.0)}  # ONNX Runtime takes a ReLU into a convolution where 0 is the least


def prepared(folder, target="cpu"):
    model = onnx.load(folder / "model.onnx")
    return model, quantization.prepare(model, target)


def counted(model):
    return Counter(node.op_type for node in model.graph.node)


def test_which_layers(exported):
    for kind, prefix, count in (("unet", "unet.", 1), ("decoder", "decoder.", 1)):
        model, layers = prepared(exported / kind)
        names = [layer.name for layer in layers]
        assert len(names) == len(set(names)) > count
        assert all(name.startswith(prefix) for name in names)
        assert not [name for name in names if any(word in name for word in ("conv_in", "head"))]
        if kind == "unet":
            assert {"unet.down.0.0.conv1", "unet.down.0.0.conv2", "unet.down.1.0", "unet.mid.0.conv1"} <= set(names)
            blocks = [node.name for node in model.graph.node if node.name.endswith(".conv2")]
            assert set(blocks) - set(names) == {blocks[-1]}
        else:
            trunk = [node.name for node in model.graph.node if node.op_type == "Conv" and ".conv." not in node.name]
            assert len(trunk) >= 3
            assert set(trunk) - set(names) == {trunk[0], *trunk[-2:]}


def test_every_use_of_a_layer_is_one_of_its_own(exported):
    layers = prepared(exported / "generator")[1]
    uses = [layer for layer in layers if layer.module == "unet.mid.0.conv1"]
    assert [layer.name for layer in uses] == [f"unet.mid.0.conv1{end}" for end in ("", "/2", "/3")]
    assert len({layer.input for layer in uses}) == 3
    assert len({layer.weight for layer in uses}) == 1
    assert len(quantization.without(layers, ["unet.mid.0.conv1"])) == len(layers) - 3
    assert len(quantization.without(layers, ["unet.mid.0.conv1/2"])) == len(layers) - 1
    assert not [each for each in quantization.without(layers, ["unet.*", "*decoder*.conv.0"]) if each.name.startswith("unet.")]


def test_parts_of_a_concatenation_have_a_range_each(exported):
    layers = [layer for layer in prepared(exported / "unet")[1] if layer.name.startswith("unet.up.0.0.shortcut")]
    assert [layer.name for layer in layers] == ["unet.up.0.0.shortcut:1", "unet.up.0.0.shortcut:2"]
    assert len({layer.input for layer in layers}) == 2


def test_an_unknown_layer(exported):
    layers = prepared(exported / "unet")[1]
    with pytest.raises(ValueError, match=r"no layer to keep is called 'unet.conv_on': the graph quantises unet.down.0.0.conv1, "):
        quantization.without(layers, ["unet.conv_on"])


@pytest.mark.parametrize("kind", ["unet", "decoder", "generator"])
def test_preparing_changes_no_result(exported, kind):
    before = onnx.load(exported / kind / "model.onnx")
    model, layers = prepared(exported / kind)
    assert layers
    shapes = [[3 if d.dim_param else d.dim_value for d in port.type.tensor_type.shape.dim] for port in model.graph.input]
    generator = np.random.default_rng(0)
    feed = {port.name: generator.standard_normal(shape).astype(np.float32) for port, shape in zip(model.graph.input, shapes)}
    results = [onnxruntime.InferenceSession(each.SerializeToString()).run(None, feed) for each in (before, model)]
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, atol=1e-5)
    if kind != "decoder":
        assert counted(model)["Add"] < counted(before)["Add"]


@pytest.mark.parametrize("kind", ["unet", "decoder", "generator"])
def test_what_is_inserted_for_a_cpu(exported, kind, tmp_path):
    model, layers = prepared(exported / kind)
    kept, quantised = layers[0], layers[1:]
    out = quantization.insert(model, quantised, dict.fromkeys((layer.name for layer in layers), RANGE), "cpu")
    tensors = {name for layer in quantised for name in layer.tensors("cpu").values()}
    weights = {layer.weight for layer in quantised}
    biases = [node for node in model.graph.node if node.name in {layer.name for layer in quantised} and len(node.input) == 3]
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
    quantization.save(out, path)
    assert quantization.float_layers(path, quantised) == []
    assert quantization.float_layers(path, [kept]) == [kept.name]


def test_what_is_inserted_for_tensorrt(exported_half, tmp_path):
    model, layers = prepared(exported_half, "tensorrt")
    out = quantization.insert(model, layers, dict.fromkeys((layer.name for layer in layers), RANGE), "tensorrt")
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
    quantization.save(out, tmp_path / "model.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx")


def test_scales():
    single = np.dtype(np.float32)
    scale, zero = quantization.scale_of((-0.5, 2.05), "cpu", single)
    assert (scale, zero) == (pytest.approx(0.01), 50)
    scale, zero = quantization.scale_of((1.0, 2.55), "cpu", single)  # 0 is in it: a convolution pads with it
    assert (scale, zero) == (pytest.approx(0.01), 0)
    scale, zero = quantization.scale_of((-1.27, 0.3), "tensorrt", single)
    assert (scale, zero, zero.dtype) == (pytest.approx(0.01), 0, np.int8)
    for target in ("cpu", "tensorrt"):
        for dtype in (np.float16, np.float32):
            assert quantization.scale_of((0.0, 0.0), target, np.dtype(dtype))[0] > 0


def test_weights_have_a_scale_a_channel():
    weight = np.zeros((3, 2, 1, 1), np.float32)
    weight[0], weight[1] = 127, [[[-1.0]], [[0.25]]]
    quantised, scales = quantization.quantize_weight(weight, np.dtype(np.float32))
    np.testing.assert_allclose(scales, [1, 1 / 127, 1])
    assert quantised[:, :, 0, 0].tolist() == [[127, 127], [-127, 32], [0, 0]]
