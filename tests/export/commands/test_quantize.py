from __future__ import annotations

import csv
import json
import shutil

import pytest

import coalescer_fast as cf
from coalescer_fast.parity import Budget
from coalescer_fast.runtime.engines import artefact

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"needs the package {package}")
import onnx  # noqa: E402

from coalescer_fast.export.measure import accuracy, speed  # noqa: E402
from coalescer_fast.export.quantize import qdq, quantizer, ranges  # noqa: E402
from coalescer_fast.export.quantize.calibration import METHODS  # noqa: E402
from coalescer_fast.export.quantize.layers import find_layers  # noqa: E402

BRIEF = ("--calibration-prompts", "8")
# untrained networks draw noise
LOOSE = Budget(psnr_median=5.0, psnr_minimum=5.0, direction_cosine=0.5, distance_error=10.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setitem(accuracy.BUDGETS, "int8", LOOSE)
    monkeypatch.setattr(quantizer, "HELD_OUT", 8)
    # a network of eight channels is no faster
    monkeypatch.setattr(
        speed, "interleaved", lambda functions: {name: [1.0 + (name == "source")] for name in functions}
    )


@pytest.fixture
def unet(run, exported):
    assert run("quantize", exported / "unet", "-o", "int8", *BRIEF)[:2] == (0, "int8\n")
    return artefact.read("int8")


def test_the_manifest_says_what_it_is(unet, exported):
    m, source = unet.manifest, artefact.read(exported / "unet").manifest
    assert (m.kind, m.engine, m.target, m.precision, m.opset) == ("unet", "onnx", "cpu", "int8", 18)
    assert (m.weights, m.inputs, m.outputs, m.batch) == (source.weights, source.inputs, source.outputs, source.batch)
    assert set(m.files) == {"model.onnx", "ranges.json"}
    known = ranges.read_ranges(unet.folder / "ranges.json")
    assert m.calibration == known.sha256
    assert known.graph == source.files["model.onnx"].sha256
    assert known.method == "percentile 99.999"
    assert len(known.prompts) == 8
    assert m.measured.error["pictures: PSNR, median"] > 5
    assert m.measured.speed["speedup"] == 2
    assert m.measured.pictures == 8
    assert (unet.folder / "model.onnx").stat().st_size < (exported / "unet" / "model.onnx").stat().st_size


def test_verify_and_inspect(run, unet):
    status, out, _ = run("verify", "int8", "--prompts", "3")
    assert status == 0, out
    assert "in int8 against the float32 reference, 3 pictures" in out
    facts = json.loads(run("inspect", "int8", "--json")[1])["unet"]
    layers = len(find_layers(onnx.load("int8/model.onnx"), "tensorrt"))
    assert layers == 0  # what reads int8 has no weight of its own
    assert facts["layers"]["Conv"]["int8"] == int(unet.manifest.recipe.split()[0])
    assert "uint8" in run("inspect", "int8")[1]


def test_measured_on_names_that_calibration_never_saw(run, exported, monkeypatch):
    seen = []
    compare = accuracy.compare
    monkeypatch.setattr(
        accuracy, "compare", lambda *args, **kwargs: (seen.append(args[3]), compare(*args, **kwargs))[1]
    )
    assert run("quantize", exported / "decoder", "-o", "int8", *BRIEF)[0] == 0
    assert run("verify", "int8", "--prompts", "30")[0] == 0
    known = set(ranges.read_ranges(artefact.read("int8").folder / "ranges.json").prompts)
    assert [len(each) for each in seen] == [8, 30]
    assert not any(known & set(each) for each in seen)


def test_it_runs_as_a_pipeline(run, exported, small):
    assert run("quantize", exported, "-o", "int8", *BRIEF)[0] == 0
    assert list(artefact.find("int8")) == ["unet", "decoder", "generator"]
    cf.accelerate(small, "onnxruntime", artefact="int8")
    try:
        assert {part.runs_on for part in small.runtime.explain()[:3]} == {"onnxruntime, int8"}
        assert len(small(["octopus"] * 3).images) == 3
        assert cf.verify(small, ["octopus"]).dtype == "int8"
    finally:
        cf.restore(small)


@pytest.mark.parametrize("kind", ["unet", "generator"])
def test_ranges_are_reused_to_the_bit(run, exported, kind):
    for method in METHODS:
        assert run("quantize", exported / kind, "-o", "one", *BRIEF, "--method", method, "--force")[0] == 0
        assert run("quantize", exported / kind, "-o", "two", "--ranges", "one/ranges.json", "--force")[0] == 0
        one, two = (artefact.read(name).manifest for name in ("one", "two"))
        assert one.files == two.files
        assert one.calibration == two.calibration


def test_ranges_of_another_graph_or_tampered(run, exported, tmp_path, unet):
    status, _, error = run("quantize", exported / "decoder", "-o", "other", "--ranges", "int8/ranges.json")
    assert status == 1
    assert "int8/ranges.json holds the ranges of another graph" in error
    text = (tmp_path / "int8" / "ranges.json").read_text("utf-8")
    (tmp_path / "mine.json").write_text(text.replace('"seed": 0', '"seed": 1'), "utf-8")
    status, _, error = run("quantize", exported / "unet", "-o", "other", "--ranges", "mine.json")
    assert status == 1
    assert (
        error == "coalescer-export: mine.json was changed after it was written: leave --ranges away to calibrate anew"
    )
    shutil.copytree("int8", "broken")
    (tmp_path / "broken" / "ranges.json").write_text(text[:100], "utf-8")
    status, _, error = run("verify", "broken")
    assert status == 1
    assert error.startswith("coalescer-export: broken/ranges.json has 100 bytes where its manifest says")
    assert not (tmp_path / "other").exists()


def test_layers_that_are_kept(run, exported):
    onnx = pytest.importorskip("onnx")
    words = ["--keep-fp32", "unet.mid.*", "unet.down.1.0"]
    assert run("quantize", exported / "unet", "-o", "int8", *BRIEF, *words)[0] == 0
    nodes = {node.name: node for node in onnx.load("int8/model.onnx").graph.node}
    for name, node in nodes.items():
        if node.op_type == "Conv" and name.startswith(("unet.mid.", "unet.down.1.0")):
            assert node.input[1] == f"{name}.weight"
    assert nodes["unet.down.0.0.conv1"].input[1] == "unet.down.0.0.conv1.weight:int8"
    m = artefact.read("int8").manifest
    assert m.flags.int8.kept == "unet.mid.* unet.down.1.0"
    assert m.command[-3:] == ("--keep-fp16", "unet.mid.*", "unet.down.1.0")
    status, _, error = run("quantize", exported / "unet", "-o", "other", *BRIEF, "--keep-fp16", "unet.conv_in")
    assert status == 1
    assert error.startswith("coalescer-export: no layer to keep is called 'unet.conv_in'")
    status, _, error = run("quantize", exported / "unet", "-o", "other", *BRIEF, "--keep-fp16", "*")
    assert (status, error.endswith("is left to quantise: keep fewer")) == (1, True)


def test_for_tensorrt_of_half(run, exported_half):
    assert run("quantize", exported_half, "-o", "int8", *BRIEF)[0] == 0
    m = artefact.read("int8").manifest
    assert (m.target, m.precision, m.opset, m.schedule.guidance_scale) == ("tensorrt", "int8", 21, 2.0)
    assert m.measured.speed is None  # that of ONNX Runtime would not tell about TensorRT
    assert run("verify", "int8", "--prompts", "3")[0] == 0


def test_sensitivity(run, exported):
    status, out, _ = run("quantize", exported / "generator", "-o", "int8", *BRIEF, "--sensitivity", "layers.csv")
    assert status == 0
    with open("layers.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    errors = [float(row["picture error"]) for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert {"layer", "picture error", "PSNR dB"} == set(rows[0])
    names = [row["layer"] for row in rows]
    assert len(names) == len(set(names))
    assert "unet.mid.0.conv1" in names
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == names


@pytest.mark.parametrize("why", ["budget", "speed"])
def test_what_does_not_win_needs_force(run, exported, monkeypatch, tmp_path, why):
    if why == "budget":
        monkeypatch.setitem(accuracy.BUDGETS, "int8", Budget(psnr_median=200.0))
        said = "the decoder in int8 is beyond its budget, pictures: PSNR, median is "
    else:
        monkeypatch.setattr(speed, "interleaved", lambda functions: {name: [1.0] for name in functions})
        said = "the decoder in int8 is no faster here than in fp32, 1e+03 ms against 1e+03 for 4 pictures"
    status, out, error = run("quantize", exported / "decoder", "-o", "int8", *BRIEF)
    assert (status, out) == (1, "")
    assert error.startswith(f"coalescer-export: {said}")
    assert error.endswith("--force to have it" if why == "budget" else "--force to have this")
    assert not list(tmp_path.iterdir())
    assert run("quantize", exported / "decoder", "-o", "int8", *BRIEF, "--force")[0] == 0


def test_nothing_is_left_of_a_failure(run, exported, monkeypatch, tmp_path):
    def fail(model, path):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(qdq, "save", fail)
    assert run("quantize", exported / "decoder", "-o", "int8", *BRIEF)[0] == 130
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_quantised(run, exported, unet):
    status, _, error = run("quantize", "int8", "-o", "twice", *BRIEF)
    assert (status, error.startswith("coalescer-export: int8 is int8 for onnx: quantise what ")) == (1, True)
    status, _, error = run("quantize", exported, "-o", "all", "--ranges", "int8/ranges.json")
    assert (status, "--ranges is of one graph and" in error) == (1, True)
    status, _, error = run("quantize", exported / "unet", "-o", "all", "--percentile", "0.5")
    assert (status, "--percentile is 0.5; expected 50 to 100" in error) == (1, True)
    status, _, error = run("quantize", exported / "unet", "-o", "all", "--calibration-prompts", "100000")
    assert (status, "calibrate on fewer" in error) == (1, True)
