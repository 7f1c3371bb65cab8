from __future__ import annotations

import re
from dataclasses import replace

import pytest

from coalescer_fast.runtime.engines import artefact
from coalescer_fast.runtime.engines.manifest import KINDS

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"needs the package {package}")
import onnx  # noqa: E402

from coalescer_fast.export.measure import speed  # noqa: E402
from coalescer_fast.export.quantize import qdq, quantizer, ranges  # noqa: E402
from coalescer_fast.export.quantize.layers import find_layers  # noqa: E402
from coalescer_fast.export.quantize.source import Source  # noqa: E402


def test_the_ranges_are_the_tensors(small, exported):
    source = Source.of(artefact.read(exported / "generator"))
    known = quantizer.calibrate(small, source, "max", 100, 4, 0, lambda text: None)
    assert set(known.layers) == {layer.name for layer in source.layers}
    tensors = {}
    for layer in source.layers:
        for which, name in layer.tensors("cpu").items():
            ends = known.layers[layer.name][which]
            assert tensors.setdefault(name, ends) == ends  # one tensor, one range
    least, most = known.layers["unet.mid.0.conv1"]["input"]
    assert -0.2785 <= least < 0 < most  # of SiLU
    assert known.layers["unet.mid.0.conv1"]["input"] != known.layers["unet.mid.0.conv1/2"]["input"]


def test_a_layer_that_no_scale_fits_stays_in_float_and_the_manifest_says_why(small, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizer, "HELD_OUT", 4)
    monkeypatch.setattr(speed, "interleaved", lambda functions: {name: [1.0] for name in functions})
    found = artefact.read(exported / "unet")
    source = Source.of(found)
    known = quantizer.calibrate(small, source, "max", 100, 4, 0, lambda text: None)
    first, *others = source.layers
    dead = {name: (0.0, 0.0) for name, tensor in first.tensors("cpu").items() if name == "input"}
    layers = {**known.layers, first.name: {**known.layers[first.name], **dead}}
    written = quantizer.quantize_artefact(small, found, tmp_path, known=replace(known, layers=layers), force=True)
    assert written.manifest.flags.int8.unfit == {first.name: "its input spans 0, too little for a scale in float32"}
    assert written.manifest.recipe.startswith(f"{len(others)} of ")
    assert qdq.float_layers(written.graph, source.layers) == [first.name]
    for path in tmp_path.iterdir():
        path.unlink()
    layers = {layer.name: {which: (0.0, 0.0) for which in known.layers[layer.name]} for layer in source.layers}
    with pytest.raises(
        ValueError, match=rf"can be quantised, {re.escape(first.name)} for one, for its input spans 0, "
    ):
        quantizer.quantize_artefact(small, found, tmp_path, known=replace(known, layers=layers), force=True)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_is_not_finite_is_named(small, exported, monkeypatch):
    source = Source.of(artefact.read(exported / "decoder"))
    weight = next(each for each in source.model.graph.initializer if each.name == source.layers[0].weight)
    array = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(array * float("inf"), weight.name))
    with pytest.raises(
        ValueError, match=r"^the graph cannot be calibrated: its tensor \S+ is not finite on a real prompt$"
    ):
        quantizer.calibrate(small, source, "max", 100, 4, 0, lambda text: None)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_the_embedded_model(embedded, target):
    sources = artefact.find(embedded("fp32" if target == "cpu" else "fp16", target))
    found = artefact.find(embedded("int8", target))
    assert list(found) == list(KINDS)
    for kind, each in found.items():
        error = each.manifest.measured.error
        assert error["pictures: PSNR, median"] >= 28, error
        assert each.manifest.measured.pictures == 64
        known = ranges.read_ranges(each.folder / "ranges.json")
        assert len(known.layers) == len(find_layers(onnx.load(sources[kind].graph), target))
