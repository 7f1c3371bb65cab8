from __future__ import annotations

import hashlib

import pytest

import coalescer_fast
from coalescer_fast.export.onnx import exporter, graph
from coalescer_fast.runtime.engines import artefact
from coalescer_fast.runtime.engines.hashes import network_hashes
from coalescer_fast.runtime.engines.manifest import File


def test_the_manifest_says_what_it_is(exported, model, small):
    found = artefact.find(exported)
    assert list(found) == ["unet", "decoder", "generator"]
    m = found["generator"].manifest
    assert (m.kind, m.engine, m.target, m.precision, m.opset) == ("generator", "onnx", "cpu", "fp32", 18)
    assert m.model == str(model)
    assert m.weights == network_hashes(small, "generator")
    assert m.batch == (1, 4, 8)
    assert m.schedule.guidance_scale == small.scheduler.config.guidance_scale
    assert (m.calibration, m.tensorrt) == (None, None)
    assert m.measured.pictures == 8
    assert 0 < m.measured.error["largest error"] <= 1e-3
    assert m.packages["coalescer_fast"] == coalescer_fast.__version__
    assert {"torch", "onnx", "onnxscript", "onnxruntime"} <= set(m.packages)
    assert set(m.files) == {"model.onnx", "prompts.npz"}
    for name, file in m.files.items():
        content = (exported / "generator" / name).read_bytes()
        assert file == File(len(content), hashlib.sha256(content).hexdigest())
    assert set(found["unet"].manifest.files) == {"model.onnx"}
    assert found["unet"].manifest.schedule is None


def test_half_is_half_the_size(exported, exported_half):
    m = artefact.read(exported_half).manifest
    assert (m.target, m.precision, m.opset, m.schedule.guidance_scale) == ("tensorrt", "fp16", 21, 2.0)
    assert m.batch == (1, 4, 16)
    assert m.measured.error["pictures: PSNR, minimum"] >= 45


def test_its_command_makes_it_again(exported, run):
    found = artefact.read(exported / "decoder")
    words = found.fix.partition("coalescer-export ")[2].split()
    before = found.manifest.files["model.onnx"].sha256
    words[words.index("-o") + 1] = "again"
    assert run(*words)[:2] == (0, "again\n")
    assert artefact.read("again").manifest.files["model.onnx"].sha256 == before
    status, _, error = run(*words[:-1])
    assert status == 1
    assert error == "coalescer-export: again exists: name another folder, or add --force to replace it"


@pytest.mark.parametrize("what", ["all", "decoder"])
@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError("no space left"), 1)])
def test_nothing_is_left_of_a_failure(run, monkeypatch, tmp_path, model, what, error, status):
    pytest.importorskip("onnxscript", reason="needs the package onnxscript")

    def fail(network, inputs, outputs, batch, opset, path, stage):
        path.write_text("half")
        raise error

    monkeypatch.setattr(graph, "export_graph", fail)
    assert run("onnx", "--model", model, "--what", what, "-o", "out")[0] == status
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_said(run, monkeypatch, tmp_path, model):
    monkeypatch.setattr(exporter, "export_onnx", lambda *args, **kwargs: __import__("coalescer_fast_no_such_package"))
    status, _, error = run("onnx", "--model", model, "-o", "out")
    assert status == 1
    assert "pip install 'coalescer_fast[all]'" in error
    assert not list(tmp_path.iterdir())
