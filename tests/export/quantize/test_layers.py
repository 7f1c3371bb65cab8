from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the package onnx")
pytest.importorskip("onnxscript", reason="needs the package onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
from coalescer_fast.export.quantize.layers import Layer, fitting, without  # noqa: E402
from coalescer_fast.export.quantize.scales import scale_and_zero  # noqa: E402

from ...helpers.graphs import RANGE, convolution, prepared  # noqa: E402


def additions(model) -> int:
    return sum(node.op_type == "Add" for node in model.graph.node)


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
    assert len(without(layers, ["unet.mid.0.conv1"])) == len(layers) - 3
    assert len(without(layers, ["unet.mid.0.conv1/2"])) == len(layers) - 1
    assert not [each for each in without(layers, ["unet.*", "*decoder*.conv.0"]) if each.name.startswith("unet.")]


def test_parts_of_a_concatenation_have_a_range_each(exported):
    layers = [layer for layer in prepared(exported / "unet")[1] if layer.name.startswith("unet.up.0.0.shortcut")]
    assert [layer.name for layer in layers] == ["unet.up.0.0.shortcut:1", "unet.up.0.0.shortcut:2"]
    assert len({layer.input for layer in layers}) == 2


def test_an_unknown_layer(exported):
    layers = prepared(exported / "unet")[1]
    with pytest.raises(
        ValueError, match=r"no layer to keep is called 'unet.conv_on': the graph quantises unet.down.0.0.conv1, "
    ):
        without(layers, ["unet.conv_on"])


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
        assert additions(model) < additions(before)


@pytest.mark.parametrize(
    ("target", "dtype", "least"), [("cpu", np.float32, 255 * 2.0**-100), ("tensorrt", np.float16, 127 * 2.0**-15)]
)
def test_what_no_scale_can_hold_stays_in_float_and_says_why(target, dtype, least):
    model = convolution(np.ones((2, 2, 3, 3), dtype), np.ones(2, dtype))
    layers = [Layer("conv", "x", "conv.weight", "y")]
    for largest in (0.0, 0.99 * least):
        ranges = {"conv": {"input": (0.0, largest), **({"output": (0.0, 1.0)} if target == "cpu" else {})}}
        found, unfit = fitting(model, layers, ranges, target)
        assert found == []
        assert unfit == {"conv": f"its input spans {largest:.3g}, too little for a scale in {np.dtype(dtype).name}"}
    ranges["conv"]["input"] = (0.0, 1.01 * least)
    assert fitting(model, layers, ranges, target) == (layers, {})
    assert np.isfinite(dtype(1) / scale_and_zero((0.0, 1.01 * least), target, np.dtype(dtype))[0])


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_weights_that_are_not_finite_are_named(which):
    stored = {"weight": np.ones((2, 2, 3, 3), np.float32), "bias": np.ones(2, np.float32)}
    stored[which].flat[1] = np.nan
    layers = [Layer("conv", "x", "conv.weight", "y")]
    with pytest.raises(
        ValueError, match=rf"^the graph cannot be quantised: its conv\.{which} holds numbers that are not finite$"
    ):
        fitting(convolution(**stored), layers, {"conv": RANGE}, "cpu")
