"""The runtime of engines on stand-ins for the library, made of what was recorded of each version, and for the GPU."""

from __future__ import annotations

import ctypes
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import coalescer_fast as cf
from coalescer_fast import acceleration
from coalescer_fast.runtime.cuda.graphs import Graphs
from coalescer_fast.runtime.engines import tensorrt, writing
from coalescer_fast.runtime.engines.manifest import EngineBuild, Flags, Manifest, Port
from coalescer_fast.runtime.engines.tensorrt import LoadedEngine, refusal

from ...helpers.tensorrt_api import Fake, recorded

A10 = ("NVIDIA A10", "8.6")
PLENTY = 10**9
INPUTS = (
    Port("sample", "float32", ("batch", 2, 3, 3)),
    Port("description", "float32", ("batch", 4)),
    Port("token_mask", "bool", ("batch", 5)),
)
OUTPUTS = Port("direction", "float32", ("batch", 2, 3, 3)), Port("distance", "float32", ("batch",))


def manifest(**changes) -> Manifest:
    made = Manifest(
        "unet",
        "tensorrt",
        "tensorrt",
        "fp16",
        "",
        "model.plan",
        "emoji-64",
        {"unet": "1" * 64},
        INPUTS,
        OUTPUTS,
        (1, 2, 4),
        21,
        ("engine", "exported"),
        tensorrt=EngineBuild("10.8.0.43", ("8.6",), "NVIDIA A10", profile={}, source={}),
        flags=Flags("none", versionCompatible=False, stripWeights=""),
    )
    return replace(made, **changes)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "model.plan").write_bytes(b"engine")
    return tmp_path / "engine"


def at(address: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_byte * size).from_address(address), dtype=dtype).view(shape)


def compute(inputs, outputs) -> None:
    """direction = 2 sample + the number of tokens, distance = the description's sum."""
    x = at(inputs["sample"][0], torch.float32, *inputs["sample"][1])
    description = at(inputs["description"][0], torch.float32, *inputs["description"][1])
    tokens = at(inputs["token_mask"][0], torch.bool, *inputs["token_mask"][1]).sum(1)
    at(outputs["direction"], torch.float32, *x.shape).copy_(2 * x + tokens[:, None, None, None])
    at(outputs["distance"], torch.float32, len(x)).copy_(description.sum(1))


def given(n: int):
    return torch.randn(n, 2, 3, 3), torch.randn(n, 4), torch.rand(n, 5) > 0.5


def check(inputs, outputs) -> None:
    sample, description, mask = inputs
    torch.testing.assert_close(outputs[0], 2 * sample + mask.sum(1)[:, None, None, None], atol=0, rtol=0)
    torch.testing.assert_close(outputs[1], description.sum(1))
    assert outputs[0].is_contiguous()


@pytest.fixture(params=recorded())
def fake(request, monkeypatch) -> Fake:
    made = Fake(request.param)
    made.does.ports = [p.name for p in INPUTS], [p.name for p in OUTPUTS]
    made.does.compute = compute
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def load(fake, folder, capture, most_bytes: int = PLENTY, **changes) -> LoadedEngine:
    made = writing.write(folder, manifest(engine=fake.__name__, **changes))
    return LoadedEngine(made, fake, torch.device("cpu"), Graphs(capture, 2, most_bytes))


def test_it_runs_on_torchs_memory_and_is_captured_once_a_batch_size(fake, folder, capture):
    run = load(fake, folder, capture)
    for n in (1, 2, 1, 2, 2):
        inputs = given(n)
        outputs = run(inputs)
        check(inputs, outputs)
    assert run.graphs.captures == 2
    assert fake.calls.count(("create_execution_context", "USER_MANAGED")) == 2
    kept = [x.clone() for x in outputs]
    run(given(2))
    assert all(torch.equal(x, y) for x, y in zip(outputs, kept))  # a result is the caller's own
    inputs = given(3)
    check(inputs, run(inputs))
    assert sorted(run.contexts) == [2, 3]  # the context goes with its graph


def test_inputs_in_any_layout(fake, folder, capture):
    sample, description, mask = given(2)
    inputs = sample.to(memory_format=torch.channels_last), description.expand(2, 4), mask.t().contiguous().t()
    for most_bytes in (PLENTY, 0):
        check(inputs, load(fake, folder, capture, most_bytes)(inputs))


def test_without_graphs(fake, folder, capture):
    run = load(fake, folder, capture, 0)
    for n in (1, 4, 2):
        inputs = given(n)
        check(inputs, run(inputs))
    assert run.graphs.captures == 0
    assert len(run.contexts) == 1


def test_threads(fake, folder, capture):
    run = load(fake, folder, capture)

    def one(i: int) -> None:
        inputs = given(1 + i % 3)
        check(inputs, run(inputs))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(12)))


def test_weights_beside_the_engine_are_put_in(fake, folder, capture):
    (folder / "weights.onnx").write_bytes(b"weights")
    run = load(fake, folder, capture, flags=Flags(stripWeights="weights.onnx"))
    assert ("refit_from_file", str(folder / "weights.onnx")) in fake.calls
    inputs = given(1)
    check(inputs, run(inputs))
    fake.does.refit = False
    with pytest.raises(
        ValueError,
        match=r"^the weights of .*weights.onnx do not fit .*model.plan .*build it again with: coalescer-export engine",
    ):
        load(fake, folder, capture, flags=Flags(stripWeights="weights.onnx"))


def test_a_engine_that_the_library_refuses(fake, folder, capture):
    fake.does.load = "Serialization assertion failed\n"
    with pytest.raises(
        ValueError, match=r"cannot load .*model.plan \(Serialization assertion failed\): build it again with"
    ) as caught:
        load(fake, folder, capture)
    assert "\n" not in str(caught.value)
    fake.does.load, fake.does.ports = None, (["x"], ["y"])
    with pytest.raises(ValueError, match=r"has other inputs and outputs \(x, y\) than its manifest says"):
        load(fake, folder, capture)


def test_a_run_that_fails_says_so(fake, folder, capture):
    fake.does.compute = None
    with pytest.raises(RuntimeError, match=r"TensorRT.*: it does not say why"):
        load(fake, folder, capture)(given(1))


def test_a_version_compatible_engine_brings_its_runtime(fake, folder, capture):
    load(fake, folder, capture)
    assert not any("engine_host_code_allowed" in call for call in fake.calls)
    load(fake, folder, capture, flags=Flags(versionCompatible=True))
    assert ("Runtime", "engine_host_code_allowed", True) in fake.calls


@pytest.mark.parametrize(
    ("flags", "made", "version", "here", "words"),
    [
        ({}, {}, "10.8.0.43", A10, ""),
        ({}, {}, "11.4.0.106", A10, "is an engine of TensorRT 10.8.0.43, and 11.4.0.106 is installed"),
        ({"versionCompatible": True}, {}, "10.16.1.11", A10, ""),
        (
            {"versionCompatible": True},
            {},
            "11.4.0.106",
            A10,
            "is an engine of TensorRT 10, and 11.4.0.106 is installed",
        ),
        ({}, {}, "10.8.0.43", None, "is an engine for NVIDIA A10, compute capability 8.6, and there is no CUDA device"),
        (
            {},
            {},
            "10.8.0.43",
            ("RTX 3090", "8.6"),
            "is an engine for NVIDIA A10, compute capability 8.6, and this is RTX 3090, 8.6",
        ),
        ({"hardwareCompatibilityLevel": "sameComputeCapability"}, {}, "10.8.0.43", ("RTX 3090", "8.6"), ""),
        (
            {"hardwareCompatibilityLevel": "sameComputeCapability"},
            {},
            "10.8.0.43",
            ("L4", "8.9"),
            "compute capability 8.6 and this is L4",
        ),
        ({"hardwareCompatibilityLevel": "ampere+"}, {}, "10.8.0.43", ("H100", "9.0"), ""),
        ({"hardwareCompatibilityLevel": "ampere+"}, {}, "10.8.0.43", ("T4", "7.5"), "8.0 or later and this is T4, 7.5"),
        ({}, {"gpu": None, "compute_capabilities": ("8.0", "8.9")}, "10.8.0.43", ("L4", "8.9"), ""),
        (
            {},
            {"gpu": None, "compute_capabilities": ("8.0", "8.9")},
            "10.8.0.43",
            ("H100", "9.0"),
            "capability 8.0 or 8.9 and this is H100",
        ),
    ],
)
def test_another_version_or_gpu(flags, made, version, here, words):
    m = manifest(flags=Flags(**flags))
    reason = refusal(replace(m, tensorrt=replace(m.tensorrt, **made)), version, here)
    assert words in reason
    assert bool(reason) == bool(words)


def test_loading_says_what_differs_and_the_fix(folder, monkeypatch):
    made = writing.write(folder, manifest())
    monkeypatch.setattr(tensorrt, "gpu", lambda: None)
    with pytest.raises(
        ValueError,
        match=r"engine is an engine for NVIDIA A10, .* no CUDA device: run it on such a GPU, or build it again with: ",
    ):
        tensorrt.open_artefact(made)
    monkeypatch.setattr(tensorrt, "gpu", lambda: A10)
    monkeypatch.setitem(sys.modules, "tensorrt", Fake("tensorrt 11.4.0.106"))
    with pytest.raises(
        ValueError,
        match=r"10.8.0.43, and 11.4.0.106 is installed: build it again with: coalescer-export engine exported -o",
    ):
        tensorrt.open_artefact(made)
    with pytest.raises(
        ValueError, match="is for onnx, not for TensorRT: make an engine of it with coalescer-export engine"
    ):
        tensorrt.open_artefact(replace(made, manifest=manifest(engine="onnx")))
    with pytest.raises(
        ValueError, match=r"takes \(1 to 4, 2, 3, 3\): build it again with --minShapes and --maxShapes around"
    ):
        made.check_inputs(given(5))


def test_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ValueError, match=r"^TensorRT cannot be loaded \(.*\): run pip install tensorrt$"):
        tensorrt.load("tensorrt")
    old = Fake("tensorrt 10.8.0.43")
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    assert tensorrt.load("tensorrt") is old
    for version in ("10.7.0", "8.6.1", "12.0.0.1"):
        old.__version__ = version
        with pytest.raises(
            ValueError, match=f"^TensorRT {version} is installed, and 10.8 to 11 can be used: run pip install"
        ):
            tensorrt.load("tensorrt")


def test_accelerate(folder, monkeypatch):
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    with pytest.raises(ValueError, match=r"^backend 'tensorrt' runs on cuda, and the pipeline is on cpu: move it"):
        cf.accelerate(pipe, "tensorrt", artefact=folder)
    monkeypatch.setattr(type(pipe), "device", torch.device("cuda", 0))
    with pytest.raises(
        ValueError, match=r"^backend 'tensorrt' runs artefacts alone: give artefact=DIR, of coalescer-export engine$"
    ):
        cf.accelerate(pipe, "tensorrt")
    monkeypatch.setattr(tensorrt, "gpu", lambda: A10)
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^backend 'tensorrt' cannot run: none of the packages tensorrt and tensorrt_rtx "
    ):
        cf.accelerate(pipe, "tensorrt", artefact=folder)
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="is no exported artefact"):
        cf.accelerate(pipe, "tensorrt", artefact=folder)
    assert pipe.runtime.name == "reference"
    assert acceleration.unavailable("tensorrt") == ""


@pytest.mark.gpu
@pytest.mark.parametrize("flavour", list(tensorrt.TITLES))
def test_on_a_gpu(tmp_path, flavour):
    pytest.importorskip(flavour, reason=f"needs the package {flavour}")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from coalescer_fast.export import cli

    capability = "{}{}".format(*torch.cuda.get_device_capability())
    if flavour == "tensorrt_rtx" and not hasattr(tensorrt.load(flavour).ComputeCapability, f"SM{capability}"):
        pytest.skip(f"{tensorrt.TITLES[flavour]} builds no engine for compute capability {capability}")
    assert cli.main(["onnx", "--target", "tensorrt", "--precision", "fp16", "-o", str(tmp_path / "onnx")]) == 0
    assert cli.main(["engine", str(tmp_path / "onnx"), "-o", str(tmp_path / "engine"), "--flavour", flavour]) == 0
    assert cli.main(["verify", str(tmp_path / "engine")]) == 0
    # int8 is what it is: how fast is in its manifest
    assert cli.main(["quantize", str(tmp_path / "onnx"), "-o", str(tmp_path / "int8")]) == 0
    assert (
        cli.main(
            ["engine", str(tmp_path / "int8"), "-o", str(tmp_path / "engine-int8"), "--flavour", flavour, "--force"]
        )
        == 0
    )
    assert cli.main(["verify", str(tmp_path / "engine-int8")]) == 0
    shutil.rmtree(tmp_path / "onnx")
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64").to("cuda")
    assert len(cf.accelerate(pipe, artefact=tmp_path / "engine")("octopus").images) == 1
