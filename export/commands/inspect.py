"""Say what exported artefacts are: manifest, operators, precisions, sizes."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalescer_fast.runtime.engines import artefact
from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.manifest import Manifest
from coalescer_fast.schema import table

from ..engine.layers import counts, read_layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="an artefact, or a folder of several")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    found = artefact.find(args.folder)
    if args.json:
        print(json.dumps({kind: to_json(each) for kind, each in found.items()}, indent=2))
    else:
        print("\n\n".join(map(text_table, found.values())))
    return 0


@dataclass(frozen=True)
class Stored:
    """Constants of one dtype.

    Attributes:
        tensors: How many there are.
        bytes: Their size.
    """

    tensors: int
    bytes: int


@dataclass(frozen=True)
class GraphFacts:
    """What an ONNX graph consists of.

    Attributes:
        operators: Number of nodes by operator.
        stored: Constants by dtype.
        layers: For each operator with weights, number of nodes by dtype of the weights.
    """

    operators: dict[str, int]
    stored: dict[str, Stored]
    layers: dict[str, dict[str, int]]


def graph_facts(path: Path) -> GraphFacts:
    """Count the nodes and constants of an ONNX graph."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    stored: dict[str, Stored] = {}
    dtypes = {}
    for tensor in graph.initializer:
        dtype = dtypes[tensor.name] = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * math.prod(tensor.dims)
        before = stored.get(dtype, Stored(0, 0))
        stored[dtype] = Stored(before.tensors + 1, before.bytes + size)
    for node in graph.node:
        # the dtype of a quantized weight is the one that it is stored in
        if node.op_type == "DequantizeLinear" and node.input[0] in dtypes:
            dtypes[node.output[0]] = dtypes[node.input[0]]
    layers: dict[str, Counter[str]] = {}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in dtypes:
            layers.setdefault(node.op_type, Counter()).update([dtypes[node.input[1]]])
    operators = Counter(node.op_type for node in graph.node)
    return GraphFacts(dict(operators.most_common()), stored, {op: dict(each) for op, each in layers.items()})


def to_json(found: Artefact) -> dict[str, Any]:
    """The manifest with the fields of `GraphFacts`, or for an engine with its layers as ``fused``."""
    out = {"manifest": json.loads(found.manifest.to_json())}
    if found.manifest.engine != "onnx":
        return {**out, "fused": table(list(read_layers(found.folder)))}
    return {**out, **table(graph_facts(found.graph))}


def text_table(found: Artefact) -> str:
    """The manifest and the facts for people, one in a line."""
    rows = [*manifest_rows(found.manifest), *(graph_rows(found) if found.manifest.engine == "onnx" else [])]
    if found.manifest.engine != "onnx":
        rows += [(f"layers {what}", text) for what, text in counts(read_layers(found.folder))]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}s}  {value}" for name, value in rows if value)


def manifest_rows(m: Manifest) -> list[tuple[str, str]]:
    ports = [("input", port) for port in m.inputs] + [("output", port) for port in m.outputs]
    built = {} if m.tensorrt is None else table(m.tensorrt)
    measured = [(name, f"{v:.4g}" if isinstance(v, float) else str(v)) for name, v in flat(table(m.measured))]
    return [
        (m.kind, f"{m.engine} for {m.target}, {m.precision}" + (f", opset {m.opset}" if m.opset else "")),
        ("of", f"{m.model}, " + ", ".join(f"{network} {digest[:12]}" for network, digest in m.weights.items())),
        *[(f"{word} {p.name}", f"{p.dtype} ({', '.join(map(str, p.shape))})") for word, p in ports],
        ("batch", f"{m.batch[0]} to {m.batch[2]}, best {m.batch[1]}"),
        ("schedule", str(m.schedule) if m.schedule else ""),
        ("recipe", m.recipe),
        ("calibration", m.calibration or ""),
        *[(m.engine if key == "version" else key.replace("_", " "), plain(each)) for key, each in built.items()],
        ("flags", ", ".join(f"{name} {value}" for name, value in table(m.flags).items() if value)),
        *[(f"measured {name}", value) for name, value in measured],
        ("made by", ", ".join(f"{name} {version}" for name, version in m.packages.items())),
        *[(f"file {name}", f"{f.bytes / 1e6:.2f} MB, SHA-256 {f.sha256[:12]}") for name, f in m.files.items()],
    ]


def graph_rows(found: Artefact) -> list[tuple[str, str]]:
    said = graph_facts(found.graph)
    stored = [(dtype, f"{each.tensors} tensors, {each.bytes / 1e6:.2f} MB") for dtype, each in said.stored.items()]
    return [
        ("operators", ", ".join(f"{op} {n}" for op, n in said.operators.items())),
        *[(f"stored {dtype}", text) for dtype, text in stored],
        *[(f"weights of {op}", ", ".join(f"{d} {n}" for d, n in each.items())) for op, each in said.layers.items()],
    ]


def plain(value: Any) -> str:
    """A part of an engine's `Manifest.tensorrt` in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join("x".join(map(str, each)) if isinstance(each, list) else str(each) for each in value)
    return "" if value is None else str(value)


def flat(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """The values of nested dictionaries, each with its innermost key."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += flat(value) if isinstance(value, dict) else [(key, value)]
    return found
