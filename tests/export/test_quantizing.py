from __future__ import annotations

import pytest

from coalescer_fast.runtime import artefact

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"needs the package {package}")
from coalescer_fast.export import quantization, quantizing, ranges  # noqa: E402


def test_the_ranges_are_the_tensors(small, exported):
    source = quantizing.Source.of(artefact.read(exported / "generator"))
    known = quantizing.calibrate(small, source, "max", 100, 4, 0, lambda text: None)
    assert set(known.layers) == {layer.name for layer in source.layers}
    tensors = {}
    for layer in source.layers:
        for which, name in layer.tensors("cpu").items():
            ends = known.layers[layer.name][which]
            assert tensors.setdefault(name, ends) == ends  # one tensor, one range
    least, most = known.layers["unet.mid.0.conv1"]["input"]
    assert -0.2785 <= least < 0 < most  # of SiLU
    assert known.layers["unet.mid.0.conv1"]["input"] != known.layers["unet.mid.0.conv1/2"]["input"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_the_embedded_model(embedded, target):
    sources = artefact.find(embedded("fp32" if target == "cpu" else "fp16", target))
    found = artefact.find(embedded("int8", target))
    assert list(found) == list(artefact.KINDS)
    for kind, each in found.items():
        error = each.manifest.measured["error"]
        assert error["pictures: PSNR, median"] >= 28, error
        assert each.manifest.measured["pictures"] == 64
        known = ranges.read_ranges(each.folder / "ranges.json")
        assert len(known.layers) == len(quantization.prepare(quantizing.onnx.load(sources[kind].graph), target))
