"""What TensorRT-RTX fuses in the embedded model's graphs, built without a GPU for each compute capability."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import coalescer_fast as cf
from coalescer_fast.export import cli
from coalescer_fast.runtime.engines import artefact, tensorrt
from coalescer_fast.runtime.engines.manifest import KINDS

CAPABILITIES = (80, 86, 89, 120)
HEADS = ("unet.direction_head", "unet.distance_head")  # in float32, whatever the rest
# TensorRT-RTX computes these layers with what follows them
FUSED = ("correlation", "runtime_fusion")
# convolutions that are not quantised
KEPT = {
    "unet": {"unet.conv_in", "unet.direction_head", "unet.up.7.0.conv2"},
    "decoder": {"decoder.layers.0", "decoder.layers.11", "decoder.layers.13"},
}
KEPT["generator"] = KEPT["unet"] | KEPT["decoder"]
TYPES = {"fp32": "Float", "fp16": "Half"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def library():
    try:
        return tensorrt.load("tensorrt_rtx")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def unet():
    return cf.CoalescerPipeline.from_pretrained("emoji-64").unet


def residual_blocks(unet) -> list[str]:
    return [name for name, module in unet.named_modules() if hasattr(module, "norm2")]


def build(source: Path, out: Path, capability: int) -> dict[str, list[dict]]:
    argv = [
        "engine",
        str(source),
        "-o",
        str(out),
        "--flavour",
        "tensorrt_rtx",
        "--computeCapabilities",
        str(capability),
    ]
    assert cli.main(argv) == 0
    found = artefact.find(out)
    for each in found.values():
        assert each.manifest.tensorrt.compute_capabilities == (f"{capability // 10}.{capability % 10}",)
        assert each.manifest.tensorrt.gpu is None
        assert each.graph.stat().st_size > 1000
    return {kind: json.loads((each.folder / "layers.json").read_text()) for kind, each in found.items()}


def kernels(layers, name: str) -> list[dict]:
    """Those that compute a part of this layer of the graph, but for ones that set an argument."""
    return [each for each in layers if name in each["of"] and each["outputs"] != ["Int32"]]


def uses(nodes, layer: str) -> list[str]:
    """Names of the nodes that are this layer, "unet.mid.0.conv1" and "unet.mid.0.conv1/2"."""
    found = [node.name for node in nodes if node.name.partition("/")[0] == layer]
    assert found, layer
    return found


def holds(kernel, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in kernel["of"])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_fusions(embedded, unet, tmp_path, precision, capability):
    import onnx

    source = embedded(precision, "tensorrt")
    engines = build(source, tmp_path / "engine", capability)
    assert set(engines) == set(KINDS)
    blocks = residual_blocks(unet)
    attentions = [
        name for name, module in unet.named_modules() if isinstance(module, nn.GroupNorm) and name.endswith(".norm")
    ]
    assert len(blocks) > 5
    assert attentions
    for kind in ("unet", "generator"):
        layers, nodes = engines[kind], onnx.load(source / kind / "model.onnx").graph.node
        for block in blocks:
            for name in uses(nodes, f"unet.{block}.norm1"):
                (one,) = [each for each in kernels(layers, name) if "Gnor" in each["name"]]  # GroupNorm and SiLU
                assert holds(one, "node_silu"), one
            for name in uses(nodes, f"unet.{block}.norm2"):
                (one,) = [
                    each for each in kernels(layers, name) if "Gnor" in each["name"]
                ]  # scale, shift and SiLU are a second kernel
                assert not holds(one, "node_silu"), one
            # one of the convolutions that end in a sum has bias and sum with it
            ends = [
                name
                for part in ("conv2", "shortcut", "shortcut:2")
                for name in [f"unet.{block}.{part}"]
                if kernels(layers, name)
            ]
            assert any(
                holds(each, "node_add") for name in ends for each in kernels(layers, name) if each["type"] in FUSED
            ), block
        for attention in attentions:
            for name in uses(nodes, f"unet.{attention}"):
                assert len([each for each in kernels(layers, name) if "Gnor" in each["name"]]) == 1
        convolutions = {node.name for node in nodes if node.op_type == "Conv"}
        for name in convolutions:
            (one,) = [each for each in kernels(layers, name) if each["type"] in FUSED]
            assert one["inputs"][0] == ("Float" if name.startswith(HEADS) else TYPES[precision]), one


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_int8(embedded, unet, tmp_path, capability):
    import onnx

    source = embedded("int8", "tensorrt")
    for kind, layers in build(source, tmp_path / "engine", capability).items():
        nodes = onnx.load(source / kind / "model.onnx").graph.node
        # every Q and DQ is in a layer of the engine, but none that was not inserted
        inserted = {node.name for node in nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
        of = {name for each in layers for name in each["of"]}
        assert {name for name in of if name.endswith(("/quantize", "/dequantize"))} == inserted
        body = [node for node in nodes if node.op_type == "Conv" and node.input[1].endswith(":int8")]
        assert len(body) == int(artefact.read(source / kind).manifest.recipe.split()[0])
        for node in body:
            (one,) = [each for each in kernels(layers, node.name) if each["type"] == "correlation"]
            assert one["inputs"][0] == "Int8", one
            assert one["constants"][0] == "Int8", one
        for block in residual_blocks(unet) if kind != "decoder" else []:
            for name in uses(nodes, f"unet.{block}.norm1"):
                (one,) = [
                    each for each in kernels(layers, name) if "Gnor" in each["name"]
                ]  # GroupNorm, SiLU and rounding to 8 bits
                assert holds(one, "node_silu"), one
                assert one["outputs"][0] == "Int8", one
        rest = [node.name.partition("/")[0] for node in nodes if node.op_type == "Conv" and node not in body]
        assert {name.removeprefix("decoding.") for name in rest} == KEPT[kind]
