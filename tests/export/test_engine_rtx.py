"""What TensorRT-RTX makes of our graphs on a machine without a GPU, for each compute capability: the fused layers of its log."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coalescer_fast.export import cli
from coalescer_fast.runtime import artefact, tensorrt

from .conftest import build

CAPABILITIES = (80, 86, 89, 120)
OUTSIDE = ("unet.conv_in", "unet.direction_head")  # in high precision
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def library():
    try:
        return tensorrt.load("tensorrt_rtx")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def pipe():
    """Channels are multiples of 64: it takes 8, 16, 24... to a group for GroupNorm to be one kernel."""
    made = build(anchor="mlp", anchor_hidden_dim=16, sample_size=8, block_out_channels=(64, 128), norm_num_groups=8)
    for module in made.unet.modules():
        if hasattr(module, "num_groups"):  # weights that are equal are kept once, and give the layers one name
            torch.nn.init.normal_(module.weight)
    return made


@pytest.fixture(scope="module")
def folders(pipe, tmp_path_factory) -> dict[str, Path]:
    """By precision, folders of all three graphs; of int8 the UNet."""
    pytest.importorskip("onnxscript", reason="needs the package onnxscript")
    root = tmp_path_factory.mktemp("rtx")
    pipe.save_pretrained(root / "model")
    for precision in ("fp32", "fp16"):
        argv = ["onnx", "--model", str(root / "model"), "--precision", precision, "--target", "tensorrt", "-o", str(root / precision)]
        assert cli.main(argv) == 0
    quantise(root / "fp16" / "unet", root / "int8" / "unet")
    return {name: root / name for name in ("fp32", "fp16", "int8")}


def quantise(source: Path, folder: Path) -> None:
    """Q/DQ around inputs and weights of the body's convolutions, with a scale that is as good as another: what is looked at is the plan."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(source / "model.onnx")
    graph = model.graph
    weights = {each.name: each for each in graph.initializer}
    nodes, done = [], set()

    def constant(name, value):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    for node in graph.node:
        if node.op_type == "Conv" and not node.name.startswith(OUTSIDE):
            x, w = node.input[:2]
            if x not in done:
                args = [constant(f"{x}.scale", np.float16(0.05)), constant(f"{x}.zero", np.int8(0))]
                nodes.append(helper.make_node("QuantizeLinear", [x, *args], [f"{x}.q"], name=f"quantize/{x}"))
                nodes.append(helper.make_node("DequantizeLinear", [f"{x}.q", *args], [f"{x}.dq"], name=f"dequantize/{x}"))
                done.add(x)
            value = numpy_helper.to_array(weights[w]).astype(np.float32)
            scale = np.maximum(np.abs(value).reshape(len(value), -1).max(1) / 127, 1e-4).astype(np.float16)
            whole = np.clip(np.rint(value / scale.astype(np.float32)[:, None, None, None]), -127, 127).astype(np.int8)
            args = [constant(f"{w}.int8", whole), constant(f"{w}.scale", scale), constant(f"{w}.zero", np.zeros(len(scale), np.int8))]
            nodes.append(helper.make_node("DequantizeLinear", args, [f"{w}.dq"], name=f"dequantize/{w}", axis=0))
            node.input[0], node.input[1] = f"{x}.dq", f"{w}.dq"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    artefact.write(folder, replace(artefact.read(source).manifest, precision="int8", measured={}))


def build_plans(source: Path, out: Path, capability: int) -> dict[str, list[dict]]:
    argv = ["engine", str(source), "-o", str(out), "--flavour", "tensorrt_rtx", "--computeCapabilities", str(capability)]
    assert cli.main(argv) == 0
    found = artefact.find(out)
    for each in found.values():
        assert each.manifest.tensorrt["compute_capabilities"] == [f"{capability // 10}.{capability % 10}"]
        assert each.manifest.tensorrt["gpu"] is None
        assert each.graph.stat().st_size > 1000
    return {kind: json.loads((each.folder / "layers.json").read_text()) for kind, each in found.items()}


def kernels(layers, name: str) -> list[dict]:
    """Those that compute a part of this layer of the graph, but for ones that set an argument."""
    return [each for each in layers if name in each["of"] and each["outputs"] != ["Int32"]]


def silu(layer) -> bool:
    return any(name.startswith("node_silu") for name in layer["of"])


def blocks(pipe) -> list[str]:
    return [name for name, module in pipe.unet.named_modules() if hasattr(module, "norm2")]


@pytest.mark.parametrize(("precision", "capability"), [("fp32", CAPABILITIES[1]), *(("fp16", each) for each in CAPABILITIES)])
def test_fusions(folders, pipe, tmp_path, precision, capability):
    plans = build_plans(folders[precision], tmp_path / "plan", capability)
    assert set(plans) == set(artefact.KINDS)
    layers = plans["unet"]
    (_,) = kernels(layers, "unet.norm_out")  # whose SiLU is with the cast and the mean that the heads begin with
    for block in blocks(pipe):
        (one,) = kernels(layers, f"unet.{block}.norm1")  # GroupNorm and SiLU
        assert silu(one), one
        (one,) = kernels(layers, f"unet.{block}.norm2")  # GroupNorm; scale, shift and SiLU are a second
        assert not silu(one)
        ends = [each for part in ("conv2", "shortcut", "shortcut:2") for each in kernels(layers, f"unet.{block}.{part}")]
        # convolution, bias and what is added to it
        assert any(any(name.startswith("node_add") for name in each["of"]) for each in ends), ends
    half = "Half" if precision == "fp16" else "Float"
    for each in layers:
        if each["type"] == "correlation" and not any(name.startswith(OUTSIDE[1]) for name in each["of"]):
            assert set(each["inputs"]) == {half}, each


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_int8(folders, tmp_path, capability):
    import onnx

    (layers,) = build_plans(folders["int8"] / "unet", tmp_path / "plan", capability).values()
    graph = onnx.load(folders["int8"] / "unet" / "model.onnx").graph
    quantised = {node.name for node in graph.node if node.op_type == "QuantizeLinear"}
    assert quantised
    found = [name for each in layers for name in each["of"] if name in quantised]
    assert set(found) == quantised
    body = {node.name for node in graph.node if node.op_type == "Conv" and not node.name.startswith(OUTSIDE)}
    for name in body:
        made = [each for each in kernels(layers, name) if each["type"] == "correlation"]
        assert len(made) == 1
        assert made[0]["inputs"][0] == "Int8", made
        assert made[0]["constants"][0] == "Int8", made
