from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the package onnx")
pytest.importorskip("onnxscript", reason="needs the package onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
from coalescer_fast.export.quantize import qdq  # noqa: E402

RANGE = {"input": (0.0, 3.0), "output": (0.0, 3.0)}  # ONNX Runtime takes a ReLU into a convolution where 0 is the least


def prepared(folder, target="cpu"):
    model = onnx.load(folder / "model.onnx")
    return model, qdq.prepare(model, target)


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
    assert len(qdq.without(layers, ["unet.mid.0.conv1"])) == len(layers) - 3
    assert len(qdq.without(layers, ["unet.mid.0.conv1/2"])) == len(layers) - 1
    assert not [each for each in qdq.without(layers, ["unet.*", "*decoder*.conv.0"]) if each.name.startswith("unet.")]


def test_parts_of_a_concatenation_have_a_range_each(exported):
    layers = [layer for layer in prepared(exported / "unet")[1] if layer.name.startswith("unet.up.0.0.shortcut")]
    assert [layer.name for layer in layers] == ["unet.up.0.0.shortcut:1", "unet.up.0.0.shortcut:2"]
    assert len({layer.input for layer in layers}) == 2


def test_an_unknown_layer(exported):
    layers = prepared(exported / "unet")[1]
    with pytest.raises(
        ValueError, match=r"no layer to keep is called 'unet.conv_on': the graph quantises unet.down.0.0.conv1, "
    ):
        qdq.without(layers, ["unet.conv_on"])


@pytest.mark.parametrize("kind", ["unet", "decoder", "generator"])
def test_preparing_changes_no_result(exported, kind):
    before = onnx.load(exported / kind / "model.onnx")
    model, layers = prepared(exported / kind)
    assert layers
    shapes = [
        [3 if d.dim_param else d.dim_value for d in port.type.tensor_type.shape.dim] for port in model.graph.input
    ]
    generator = np.random.default_rng(0)
    feed = {
        port.name: generator.standard_normal(shape).astype(np.float32) for port, shape in zip(model.graph.input, shapes)
    }
    results = [onnxruntime.InferenceSession(each.SerializeToString()).run(None, feed) for each in (before, model)]
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, atol=1e-5)
    if kind != "decoder":
        assert counted(model)["Add"] < counted(before)["Add"]


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


def test_scales():
    single = np.dtype(np.float32)
    scale, zero = qdq.scale_of((-0.5, 2.05), "cpu", single)
    assert (scale, zero) == (pytest.approx(0.01), 50)
    scale, zero = qdq.scale_of((1.0, 2.55), "cpu", single)  # 0 is in it: a convolution pads with it
    assert (scale, zero) == (pytest.approx(0.01), 0)
    scale, zero = qdq.scale_of((-1.27, 0.3), "tensorrt", single)
    assert (scale, zero, zero.dtype) == (pytest.approx(0.01), 0, np.int8)
    for target in ("cpu", "tensorrt"):
        for dtype in (np.float16, np.float32):
            assert qdq.scale_of((0.0, 0.0), target, np.dtype(dtype))[0] > 0


def test_weights_have_a_scale_a_channel():
    weight = np.zeros((3, 2, 1, 1), np.float32)
    weight[0], weight[1] = 127, [[[-1.0]], [[0.25]]]
    quantised, scales = qdq.quantize_weight(weight, np.dtype(np.float32))
    np.testing.assert_allclose(scales, [1, 1 / 127, 1])
    assert quantised[:, :, 0, 0].tolist() == [[127, 127], [-127, 32], [0, 0]]


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


def both(model, ranges, target, x, tmp_path):
    """(z in float, z in int8) by ONNX Runtime, of all layers that are fit."""
    layers = [qdq.Layer("conv", "x", "conv.weight", "y")]
    layers, unfit = qdq.fitting(model, layers, {"conv": ranges}, target)
    assert not unfit
    path = tmp_path / "int8.onnx"
    qdq.save(qdq.insert(model, layers, {"conv": ranges}, target), path)
    if target == "cpu":
        assert qdq.float_layers(path, layers) == []
    return [onnxruntime.InferenceSession(each).run(None, {"x": x})[0] for each in (model.SerializeToString(), path)]


# from the largest weights that float16 holds to its smallest number; with 0.00775 the scale is its smallest normal number
SIZES = [6e4, 1.0, 0.00775, 0.0077, 1e-3, 1e-4, 1e-5, 6e-6, 1e-6, 1.2e-7, 6e-8, 0.0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_no_weight_is_off_by_more_than_half_a_step(dtype):
    generator = np.random.default_rng(0)
    weight = generator.uniform(-1, 1, (len(SIZES) * 64, 8, 3, 3)) * np.repeat(SIZES, 64).reshape(-1, 1, 1, 1)
    weight = weight.astype(dtype)
    quantised, scales = qdq.quantize_weight(weight, np.dtype(dtype))
    assert scales.dtype == dtype
    assert (scales > 0).all()
    assert np.isfinite(scales).all()
    wide = scales.astype(np.float64).reshape(-1, 1, 1, 1)
    assert (np.abs(quantised * wide - weight) <= wide / 2).all()
    largest = np.abs(weight.astype(np.float64)).reshape(len(weight), -1).max(1)
    # the step is that of 8 bits, or of float16 itself
    assert (scales <= np.maximum(largest / 127 + 2.0**-24, largest / 127 * 1.001))[largest > 0].all()
    assert quantised[largest > 127 * 2.0**-24].any((1, 2, 3)).all()  # no channel is lost


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
    """Of a channel whose weights are nearly nothing, and of an input that is, the bias is all that is left: |b| / (s_x s_w) > 2^31."""
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
        qdq.Layer("conv", "x", "conv.weight", "y"),
        qdq.Layer("conv/2", "y", "conv.weight", "w"),
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


@pytest.mark.parametrize(
    ("target", "dtype", "least"), [("cpu", np.float32, 255 * 2.0**-100), ("tensorrt", np.float16, 127 * 2.0**-15)]
)
def test_what_no_scale_can_hold_stays_in_float_and_says_why(target, dtype, least):
    model = convolution(np.ones((2, 2, 3, 3), dtype), np.ones(2, dtype))
    layers = [qdq.Layer("conv", "x", "conv.weight", "y")]
    for largest in (0.0, 0.99 * least):
        ranges = {"conv": {"input": (0.0, largest), **({"output": (0.0, 1.0)} if target == "cpu" else {})}}
        found, unfit = qdq.fitting(model, layers, ranges, target)
        assert found == []
        assert unfit == {"conv": f"its input spans {largest:.3g}, too little for a scale in {np.dtype(dtype).name}"}
    ranges["conv"]["input"] = (0.0, 1.01 * least)
    assert qdq.fitting(model, layers, ranges, target) == (layers, {})
    assert np.isfinite(dtype(1) / qdq.scale_of((0.0, 1.01 * least), target, np.dtype(dtype))[0])


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_weights_that_are_not_finite_are_named(which):
    stored = {"weight": np.ones((2, 2, 3, 3), np.float32), "bias": np.ones(2, np.float32)}
    stored[which].flat[1] = np.nan
    layers = [qdq.Layer("conv", "x", "conv.weight", "y")]
    with pytest.raises(
        ValueError, match=rf"^the graph cannot be quantised: its conv\.{which} holds numbers that are not finite$"
    ):
        qdq.fitting(convolution(**stored), layers, {"conv": RANGE}, "cpu")
