"""Engines, built on stand-ins for TensorRT that are made from what was recorded of each version."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from coalescer_fast.export.engine import builder
from coalescer_fast.export.measure import speed
from coalescer_fast.export.onnx import modules
from coalescer_fast.export.quantize import ranges
from coalescer_fast.runtime.engines import artefact, tensorrt, writing
from coalescer_fast.runtime.engines.hashes import network_hashes
from coalescer_fast.runtime.engines.manifest import EngineBuild, Flags, Manifest, Port, Quantization, Schedule

from ...helpers.tensorrt_api import Fake, recorded, surface

MEASURE = builder.measure
PLAN = {"version": "10.8", "compute_capabilities": ["8.6"], "gpu": None, "profile": {}, "source": {}}
A10 = ("NVIDIA A10", "8.6")
FULL = [which for which in recorded() if which.startswith("tensorrt ")]
NEWEST, RTX = "tensorrt 11.4.0.106", "tensorrt_rtx 1.7.1.116"
LAYER = {
    "Name": "conv",
    "LayerType": "CaskConvolution",
    "Inputs": [{"Name": "x", "Dimensions": [1, 2, 3, 3], "Format/Datatype": "Half"}],
    "Outputs": [{"Name": "y", "Dimensions": [1, 2, 3, 3], "Format/Datatype": "Float"}],
    "Metadata": "[ONNX Layer: conv]\u001f[ONNX Layer: add]",
}


def write(folder: Path, **changes) -> Path:
    made = Manifest(
        "unet",
        "onnx",
        "tensorrt",
        "fp16",
        "",
        "model.onnx",
        "emoji-64",
        {"decoder" if changes.get("kind") == "decoder" else "unet": "1" * 64},
        (Port("sample", "float32", ("batch", 2, 3, 3)), Port("description", "float32", ("batch", 4))),
        (Port("direction", "float32", ("batch", 2, 3, 3)), Port("distance", "float32", ("batch",))),
        (1, 4, 16),
        21,
        ("onnx", "--what", "unet", "--precision", "fp16", "--target", changes.get("target", "tensorrt")),
    )
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"graph")
    writing.write(folder, replace(made, **changes))
    return folder


@pytest.fixture
def source(tmp_path) -> Path:
    return write(tmp_path / "onnx")


def install(monkeypatch, fake: Fake) -> Fake:
    fake.does.layers = [LAYER]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(tensorrt, "gpu", lambda: A10)
    monkeypatch.setattr(builder, "measure", lambda *args: "")
    return fake


@pytest.fixture(params=FULL)
def fake(request, monkeypatch) -> Fake:
    return install(monkeypatch, Fake(request.param))


@pytest.fixture
def newest(monkeypatch) -> Fake:
    return install(monkeypatch, Fake(NEWEST))


def test_an_engine_says_what_it_is(run, source, fake):
    status, out, _ = run("engine", "onnx", "--saveEngine", "plan", "--maxShapes", "sample:8x2x3x3,description:8x4")
    assert (status, out) == (0, "plan\n")
    found = artefact.read("plan")
    m, before = found.manifest, artefact.read("onnx").manifest
    assert (m.engine, m.graph, m.batch, m.precision, m.opset) == ("tensorrt", "model.plan", (1, 4, 8), "fp16", 21)
    assert m.tensorrt == EngineBuild(
        version=fake.__version__,
        compute_capabilities=("8.6",),
        gpu="NVIDIA A10",
        profile={"sample": ((1, 2, 3, 3), (4, 2, 3, 3), (8, 2, 3, 3)), "description": ((1, 4), (4, 4), (8, 4))},
        source={"model.onnx": before.files["model.onnx"].sha256},
    )
    assert set(m.files) == {"model.plan", "layers.json"}
    assert found.graph.read_bytes() == b"plan"
    assert json.loads(Path("plan/layers.json").read_text()) == [
        {"name": "conv", "type": "CaskConvolution", "inputs": ["Half"], "outputs": ["Float"], "of": ["conv", "add"]}
    ]
    flags = [call[:2] for call in fake.calls if call[0] in ("create_network", "set_flag", "clear_flag")]
    assert flags == [
        ("create_network", 1 << int(fake.NetworkDefinitionCreationFlag.STRONGLY_TYPED)),
        ("clear_flag", "TF32"),
    ]
    assert ("set_shape", "sample", (1, 2, 3, 3), (4, 2, 3, 3), (8, 2, 3, 3)) in fake.calls
    words = found.fix.partition("coalescer-export ")[2].split()
    assert run(*words)[:2] == (0, "plan\n")
    assert artefact.read("plan").manifest == m


EVERYTHING = [
    "--timingCacheFile",
    "t",
    "--hardwareCompatibilityLevel",
    "ampere+",
    "--versionCompatible",
    "--stripWeights",
]


def test_every_option(run, source, fake, capsys):
    Path("onnx/model.onnx.data").write_bytes(b"weights")
    writing.write(Path("onnx"), artefact.read("onnx").manifest)
    assert run("engine", "onnx", "-o", "plan", *EVERYTHING)[0] == 0
    found = artefact.read("plan")
    assert found.manifest.flags == Flags("ampere+", versionCompatible=True, stripWeights="weights.onnx")
    assert set(found.manifest.files) == {"model.plan", "layers.json", "weights.onnx", "model.onnx.data"}
    flags = [call[1] for call in fake.calls if call[0] == "set_flag"]
    assert flags == ["VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT"]
    assert ("IBuilderConfig", "hardware_compatibility_level", fake.HardwareCompatibilityLevel.AMPERE_PLUS) in fake.calls
    assert Path("t").read_bytes() == b"timings"
    assert all(f"--{word}" in found.fix for word in ("stripWeights", "versionCompatible", "timingCacheFile=t"))
    level = ["--hardwareCompatibilityLevel", "sameComputeCapability"]
    status, _, error = run("engine", "onnx", "-o", "plan", "--force", *level)
    if "SAME_COMPUTE_CAPABILITY" in recorded()[f"tensorrt {fake.__version__}"]["HardwareCompatibilityLevel"]:
        assert status == 0
    else:
        assert error.endswith("has no --hardwareCompatibilityLevel sameComputeCapability: use none or ampere+")


def test_the_equivalent_line(run, source, newest, capsys):
    engine_ = ["engine", "onnx", "-o", "plan", "--optShapes", "sample:2x2x3x3,description:2x4", *EVERYTHING]
    from coalescer_fast.export import cli

    assert cli.main(engine_) == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert line == (
        "trtexec --onnx=onnx/model.onnx --saveEngine=plan/model.plan --minShapes=sample:1x2x3x3,description:1x4 "
        "--optShapes=sample:2x2x3x3,description:2x4 --maxShapes=sample:16x2x3x3,description:16x4 --stronglyTyped "
        "--noTF32 --profilingVerbosity=detailed --skipInference --hardwareCompatibilityLevel=ampere+ "
        "--versionCompatible --stripWeights --timingCacheFile=t"
    )


def test_a_renamed_name_fails(run, source, newest, monkeypatch, capsys):
    """Each name that a build uses, taken out of what was recorded, breaks it: so the tests above see every name."""
    from coalescer_fast.export import cli

    assert cli.main(["engine", "onnx", "-o", "plan", *EVERYTHING]) == 0
    used = {(cls, name) for cls, name in newest.used if name in recorded()[NEWEST][cls]}
    assert {cls for cls, _ in used} >= {
        "Builder",
        "BuilderFlag",
        "IBuilderConfig",
        "OnnxParser",
        "NetworkDefinitionCreationFlag",
    }
    for cls, name in sorted(used):
        api = recorded()
        api[NEWEST][cls].remove(name)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[Fake.__module__], "recorded", lambda api=api: api)
            install(patch, Fake(NEWEST))
            with pytest.raises(AttributeError, match=name):
                cli.main(["engine", "onnx", "-o", "plan", "--force", "--debug", *EVERYTHING])
            capsys.readouterr()
    assert artefact.read("plan").manifest.engine == "tensorrt"  # a failed build replaces nothing


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"target": "cpu", "opset": 18},
            [
                "was written for cpu, not for TensorRT",
                "export it again with coalescer-export onnx",
                "--target tensorrt",
            ],
        ),
        ({"opset": 18}, ["has opset 18 where TensorRT is given 21 or later for fp16", "export it again with"]),
        ({"opset": 20, "precision": "int8"}, ["has opset 20 where TensorRT is given 21 or later for int8"]),
        ({"opset": 17, "precision": "fp32"}, ["has opset 17 where TensorRT is given 18 or later for fp32"]),
        (
            {"engine": "tensorrt", "tensorrt": PLAN, "command": ("engine", "where")},
            ["is an engine already", "made of, from where"],
        ),
    ],
)
def test_an_artefact_that_is_not_for_it(run, tmp_path, newest, changes, words):
    write(tmp_path / "onnx", **changes)
    status, out, error = run("engine", "onnx", "-o", "plan")
    assert (status, out) == (1, "")
    assert error.startswith("coalescer-export: onnx ")
    assert all(word in error for word in words), error
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--minShapes", "x:1x2"], ["--minShapes has 'x:1x2'; expected", "sample, description"]),
        (["--maxShapes", "sample:0x2x3x3"], ["--maxShapes has 'sample:0x2x3x3'"]),
        (["--maxShapes", "sample:8x2x3x3"], ["--maxShapes has 8, 16 pictures", "sample, description the same number"]),
        (
            ["--maxShapes", "sample:17x2x3x3,description:17x4"],
            ["1x2x3x3, 4x2x3x3, 17x2x3x3 where the graph takes [1 to 16]x2x3x3"],
        ),
        (["--optShapes", "sample:4x2x6x6"], ["4x2x6x6"]),
        (["--minShapes", "sample:8x2x3x3,description:8x4"], ["8x2x3x3, 4x2x3x3, 16x2x3x3"]),
        (
            ["--computeCapabilities", "80"],
            ["--computeCapabilities is no option of TensorRT:", "--flavour tensorrt_rtx"],
        ),
        (["--flavour", "tensorrt_rtx", "--versionCompatible"], ["--versionCompatible is no option of TensorRT-RTX:"]),
        (["--computeCapabilities", "8.0"], ["8.0", "80,86"]),
        (["--timingCacheFile", "other"], ["other is no timing cache of this version and GPU"]),
    ],
)
def test_options_that_do_not_fit(run, source, newest, argv, words):
    Path("other").write_bytes(b"of another GPU")
    Path("other.sha256").write_text(hashlib.sha256(b"of another GPU").hexdigest() + "  other\n")
    status, out, error = run("engine", "onnx", "-o", "plan", *argv)
    assert status in (1, 2)
    assert out == ""
    assert all(word in error for word in words), error
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["onnx", "other", "other.sha256"]


def test_a_file_that_is_no_timing_cache_of_ours_stays_as_it_is(run, source, fake):
    """TensorRT-RTX takes any bytes for a cache, and a mistyped name must not lose them."""
    Path("letter").write_bytes(b"dear")
    os.mkfifo("pipe")
    for name, words in (("letter", "letter was not written by coalescer-export"), ("pipe", "pipe cannot be written")):
        status, out, error = run("engine", "onnx", "-o", "plan", "--timingCacheFile", name)
        assert (status, out) == (1, "")
        assert words in error
    assert Path("letter").read_bytes() == b"dear"
    Path("empty").touch()
    for name in ("new", "new", "empty", "empty"):
        assert run("engine", "onnx", "-o", "plan", "--force", "--timingCacheFile", name)[0] == 0
        assert Path(name).read_bytes() == b"timings"
    Path("new").write_bytes(b"changed")
    assert run("engine", "onnx", "-o", "plan", "--force", "--timingCacheFile", "new")[0] == 1
    assert Path("new").read_bytes() == b"changed"


@pytest.mark.parametrize(("stage", "words"), [("parse", "does not take"), ("build", "cannot build")])
def test_what_the_library_says_of_a_failure_is_one_sentence(run, source, newest, stage, words):
    setattr(newest.does, stage, "In node 3 conv1:\nAssertion failed: input has type Int32")
    status, out, error = run("engine", "onnx", "-o", "plan")
    assert (status, out) == (1, "")
    assert error.startswith(
        f"coalescer-export: TensorRT 11.4.0.106 {words} onnx/model.onnx "
        "(In node 3 conv1: Assertion failed: input has type"
    )
    assert "an engine is strongly typed" in error
    assert "by coalescer-export onnx --what unet" in error
    assert not Path("plan").exists()


def test_without_a_gpu(run, source, newest, monkeypatch):
    assert run("engine", "onnx", "-o", "plan")[0] == 0
    monkeypatch.setattr(tensorrt, "gpu", lambda: None)
    status, _, error = run("verify", "plan")
    assert status == 1
    assert (
        "plan is an engine for NVIDIA A10, compute capability 8.6, and there is no CUDA device: run it on such a GPU"
        in error
    )
    status, _, error = run("engine", "onnx", "-o", "other")
    assert status == 1
    assert error.endswith(
        "builds an engine on its GPU, and there is no CUDA device: build it there, or take --flavour tensorrt_rtx"
    )
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    status, _, error = run("engine", "onnx", "-o", "other", "--flavour", "tensorrt_rtx")
    assert status == 1
    assert error.endswith("run pip install tensorrt_rtx")
    status, _, error = run("engine", "onnx", "-o", "other", "--flavour", "tensorrt_rtx", "--stripWeights")
    assert error.endswith("leave --stripWeights out")
    assert not Path("other").exists()


def test_tensorrt_rtx_builds_for_gpus_that_are_not_here(run, source, monkeypatch):
    fake = install(monkeypatch, Fake(RTX))
    fake.does.layers = []
    monkeypatch.setattr(tensorrt, "gpu", lambda: None)
    assert run("engine", "onnx", "-o", "plan", "--flavour", "tensorrt_rtx")[0] == 0
    capabilities = [call[1:] for call in fake.calls if call[0] == "set_compute_capability"]
    assert capabilities == [("SM80", 0), ("SM86", 1), ("SM89", 2), ("SM120", 3)]
    m = artefact.read("plan").manifest
    assert (m.engine, m.tensorrt.version, m.tensorrt.gpu) == ("tensorrt_rtx", "1.7.1.116", None)
    assert m.tensorrt.compute_capabilities == ("8.0", "8.6", "8.9", "12.0")
    status, _, error = run(
        "engine", "onnx", "-o", "other", "--flavour", "tensorrt_rtx", "--computeCapabilities", "86,90"
    )
    assert status == 1
    assert error.endswith("TensorRT-RTX 1.7.1.116 has no compute capability 90: use some of 75, 80, 86, 89, 120, 121")


def test_interrupted(run, source, newest, monkeypatch):
    def stop(bar, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.update", stop)
    assert run("engine", "onnx", "-o", "plan")[0] == 130
    assert not Path("plan").exists()


def test_inspect_and_tampering(run, source, newest, tmp_path):
    assert run("engine", "onnx", "-o", "plan")[0] == 0
    status, out, _ = run("inspect", "plan")
    assert status == 0
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert "unet tensorrt for tensorrt, fp16, opset 21" in lines
    assert "tensorrt 11.4.0.106" in lines
    assert "gpu NVIDIA A10" in lines
    assert "profile sample 1x2x3x3 4x2x3x3 16x2x3x3, description 1x4 4x4 16x4" in lines
    assert "layers CaskConvolution 1: Half to Float 1" in lines
    assert json.loads(run("inspect", "plan", "--json")[1])["unet"]["fused"][0]["name"] == "conv"
    for name in ("model.plan", "layers.json", "manifest.json"):
        shutil.copytree("plan", f"bad-{name}")
        path = Path(f"bad-{name}", name)
        content = path.read_bytes()
        path.write_bytes(content[:-3] + b"?" + content[-2:])
        for each in ("inspect", "verify"):
            status, out, error = run(each, path.parent)
            assert (status, out) == (1, "")
            assert error.startswith(f"coalescer-export: {path} ")


@pytest.fixture
def measured(monkeypatch, newest, small, model, tmp_path):
    """Makes the UNet's artefact "onnx" in a precision, and "float" that it was quantized from; then engines can run."""

    def make(precision: str, seconds: dict[str, float], off: float = 1e-3) -> None:
        inputs, outputs = modules.ports(small, "unet")
        facts = {"model": str(model), "weights": network_hashes(small, "unet"), "inputs": inputs, "outputs": outputs}
        source = artefact.read(write(tmp_path / "float", **facts))
        quantization = Quantization(method="max", prompts=1, kept="", source=ranges.graph_sha256(source.manifest))
        int8 = {"command": ("quantize", "float"), "flags": Flags(int8=quantization)}
        write(tmp_path / "onnx", **facts, precision=precision, **(int8 if precision == "int8" else {}))
        network = modules.network(small, "unet", "fp32")

        def open_artefact(found):
            return lambda inputs: tuple(y * (1 + off) for y in network(*inputs))

        monkeypatch.setattr(tensorrt, "open_artefact", open_artefact)
        monkeypatch.setattr(builder, "measure", MEASURE)
        monkeypatch.setattr(builder, "DEVICE", "cpu")
        monkeypatch.setattr(speed, "interleaved", lambda functions: {name: [seconds[name]] for name in functions})

    return make


def test_an_engine_that_can_run_is_measured(run, measured):
    measured("fp16", {"fp16": 2e-3})
    assert run("engine", "onnx", "-o", "plan")[:2] == (0, "plan\n")
    found = artefact.read("plan").manifest.measured
    assert found.runtime == "tensorrt, unet"
    assert found.error["distance, relative error, maximum"] == pytest.approx(1e-3, rel=0.01)
    assert found.speed == {"batch": 4, "fp16 ms": 2.0, "gpu": "NVIDIA A10"}
    lines = {" ".join(line.split()) for line in run("inspect", "plan")[1].splitlines()}
    assert "measured fp16 ms 2" in lines


def test_an_engine_beyond_the_budget_needs_force(run, measured):
    measured("fp16", {"fp16": 2e-3}, off=0.5)
    status, out, error = run("engine", "onnx", "-o", "plan")
    assert (status, out) == (1, "")
    assert error.startswith(
        "coalescer-export: the engine of the unet is not the model's: "
        "distance, relative error, maximum is 0.5, the limit"
    )
    assert not Path("plan").exists()
    assert run("engine", "onnx", "-o", "plan", "--force")[:2] == (0, "plan\n")


def test_int8_is_compared_in_speed_with_an_engine_of_what_was_quantised(run, measured, newest):
    measured("int8", {"source": 3e-3, "int8": 2e-3})
    assert run("engine", "onnx", "-o", "plan")[0] == 0
    assert artefact.read("plan").manifest.measured.speed == {
        "batch": 4, "source ms": 3.0, "int8 ms": 2.0, "speedup": 1.5, "gpu": "NVIDIA A10"
    }  # fmt: skip
    assert len([call for call in newest.calls if call[0] == "create_network"]) == 2


def test_int8_that_is_no_faster_needs_force(run, measured):
    measured("int8", {"source": 2e-3, "int8": 2e-3})
    status, out, error = run("engine", "onnx", "-o", "plan")
    assert (status, out) == (1, "")
    assert error == (
        "coalescer-export: the engine of the unet in int8 is no faster here than in fp16, "
        "2 ms against 2 for 4 pictures: use that, or add --force to have this"
    )
    assert not Path("plan").exists()
    assert run("engine", "onnx", "-o", "plan", "--force")[:2] == (0, "plan\n")
    assert artefact.read("plan").manifest.measured.speed["speedup"] == 1


@pytest.mark.parametrize("what", ["gone", "other"])
def test_int8_without_what_was_quantised_is_said(run, measured, what):
    measured("int8", {"int8": 2e-3})
    if what == "other":
        Path("float/model.onnx").write_bytes(b"another graph")
        writing.write(Path("float"), Manifest.from_json(Path("float/manifest.json").read_text()))
    else:
        shutil.rmtree("float")
    status, _, error = run("engine", "onnx", "-o", "plan")
    assert status == 0
    assert error.startswith("unet: not compared in speed with what was quantised: float ")
    assert "speedup" not in artefact.read("plan").manifest.measured.speed


def test_a_folder_of_several(run, source, newest, tmp_path):
    write(tmp_path / "many" / "unet")
    write(tmp_path / "many" / "decoder", kind="decoder", outputs=(Port("picture", "float32", ("batch", 3, 6, 6)),))
    assert run("engine", "many", "-o", "engines")[0] == 0
    found = artefact.find("engines")
    assert {kind: each.manifest.command[1] for kind, each in found.items()} == {
        "unet": "many/unet",
        "decoder": "many/decoder",
    }
    generator = {
        "weights": dict.fromkeys(("unet", "decoder"), "1" * 64),
        "schedule": Schedule((1.0,), ("unit",), 1e-6, (), 1.0),
    }
    picture = (Port("picture", "float32", ("batch", 3, 6, 6)),)
    write(tmp_path / "many" / "generator", kind="generator", target="cpu", outputs=picture, **generator)
    assert run("engine", "many", "-o", "more")[0] == 1
    assert not Path("more").exists()


def test_the_record_agrees_with_what_is_installed():
    found = []
    for package in tensorrt.TITLES:
        try:
            module = tensorrt.load(package)
        except ValueError:
            continue
        if (api := recorded().get(f"{package} {module.__version__}")) is not None:
            found.append(package)
            assert surface(module) == api
    if not found:
        pytest.skip("no recorded version of tensorrt or tensorrt_rtx is installed")
