from __future__ import annotations

import pytest
import torch
from torch import nn

from coalescer_fast.runtime.engines.manifest import Port

onnx = pytest.importorskip("onnx", reason="needs the package onnx")
pytest.importorskip("onnxscript", reason="needs the package onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
from coalescer_fast.export.onnx import graph  # noqa: E402


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        half = torch.nn.functional.conv2d(x[:, :2], self.layer.weight[:, :2]) + torch.nn.functional.conv2d(
            x[:, 2:], self.layer.weight[:, 2:]
        )
        return (self.layer(self.layer(x)) + half,)


class Fixed(nn.Module):
    def forward(self, x):
        return (x * len(x),)


PORT = Port("x", "float32", ("batch", 4, 3, 3)), Port("y", "float32", ("batch", 4, 3, 3))


def export(tmp_path, module, batch=(1, 2, 4)):
    with torch.no_grad():
        graph.export_graph(module.eval(), PORT[:1], PORT[1:], batch, 18, tmp_path / "model.onnx")
    return onnx.load(tmp_path / "model.onnx")


def test_layers_have_their_names_and_weights_are_stored_once(tmp_path):
    module = Twice()
    model = export(tmp_path, module)
    names = [node.name for node in model.graph.node if node.op_type == "Conv"]
    assert sorted(names) == ["layer", "layer/2", "layer:1", "layer:2"]
    sizes = sorted(list(tensor.dims) for tensor in model.graph.initializer)
    assert sizes.count([4, 4, 1, 1]) == 1
    assert sizes.count([4, 2, 1, 1]) == 2
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert str(tmp_path) not in str(model)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for n in (1, 3):
        x = torch.randn(n, 4, 3, 3)
        (y,) = session.run(None, {"x": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), module(x)[0], atol=1e-5, rtol=0)


def test_a_large_model_has_its_weights_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "LARGEST", 100)
    layer = nn.Conv2d(4, 4, 3, padding=1)
    export(tmp_path, Tupled(layer))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    x = torch.randn(2, 4, 3, 3)
    (y,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), layer(x), atol=1e-5, rtol=0)


class Tupled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return (self.layer(x),)


def test_one_batch_size_is_fixed(tmp_path):
    model = export(tmp_path, Fixed(), (3, 3, 3))
    assert [each.dim_value for each in model.graph.input[0].type.tensor_type.shape.dim] == [3, 4, 3, 3]


def test_a_batch_that_cannot_vary_is_an_error_and_not_a_fixed_size(tmp_path):
    with pytest.raises(ValueError, match=r"^the network cannot be exported: .*batch"):
        export(tmp_path, Fixed())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "precision", "expected"), [("cpu", "fp32", 18), ("tensorrt", "fp32", 21), ("cpu", "fp16", 21)]
)
def test_opsets(target, precision, expected):
    assert graph.opset(target, precision) == expected


def test_normalisations(exported, exported_half):
    def count(path):
        model = onnx.load(path)
        assert model.opset_import[0].version in (18, 21)
        kinds = [node for node in model.graph.node if node.op_type in ("GroupNormalization", "InstanceNormalization")]
        assert all(attribute.i == 1 for node in kinds for attribute in node.attribute if attribute.name == "stash_type")
        return {node.op_type for node in kinds}, len(kinds)

    assert count(exported / "generator" / "model.onnx")[0] == {"InstanceNormalization"}
    assert count(exported_half / "model.onnx")[0] == {"GroupNormalization"}
    # two evaluations, and one of the empty description
    assert count(exported / "generator" / "model.onnx")[1] == 3 * count(exported / "unet" / "model.onnx")[1]


def test_every_layer_has_a_name_and_a_stored_weight(exported, exported_half):
    for path in (*exported.glob("*/model.onnx"), exported_half / "model.onnx"):
        graph = onnx.load(path).graph
        stored = {tensor.name for tensor in graph.initializer}
        convolutions = [node for node in graph.node if node.op_type == "Conv"]
        assert all(node.input[1] in stored for node in convolutions)
        assert all(node.name.startswith(("unet.", "decoding.", "decoder.")) for node in convolutions)
        names = [node.name for node in graph.node]
        assert len(set(names)) == len(names)
