"""Say what exported artefacts are: manifest, operators, precisions, sizes."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from coalescer_fast.runtime.engines import artefact
from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.manifest import Port
from coalescer_fast.schema import table as table_of

from ..engine.builder import LAYERS, counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="an artefact, or a folder of several")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    found = artefact.find(args.folder)
    if args.json:
        print(json.dumps({kind: facts(each) for kind, each in found.items()}, indent=2))
    else:
        print("\n\n".join(map(table, found.values())))
    return 0


def facts(found: Artefact) -> dict[str, Any]:
    """The manifest, and ``operators``, ``stored`` and ``layers`` of an ONNX graph, or ``fused`` of an engine, its `engine.Layer`s.

    operators: op type -> nodes; stored: dtype -> {"tensors", "bytes"} of constants; layers: op type -> dtype of the weights -> nodes.
    """
    out: dict[str, Any] = {"manifest": json.loads(found.manifest.to_json())}
    if found.manifest.engine != "onnx":
        return {**out, "fused": json.loads((found.folder / LAYERS).read_text("utf-8"))}
    import onnx

    graph = onnx.load(str(found.graph), load_external_data=False).graph
    stored: dict[str, Counter[str]] = {}
    dtypes = {}
    for tensor in graph.initializer:
        # quantised weights are called by what they are stored in, before DequantizeLinear
        dtypes[tensor.name] = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        count = stored.setdefault(dtypes[tensor.name], Counter())
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for extent in tensor.dims:
            size *= extent
        count.update(tensors=1, bytes=size)
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in dtypes:
            dtypes[node.output[0]] = dtypes[node.input[0]]
    layers: dict[str, Counter[str]] = {}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in dtypes:
            layers.setdefault(node.op_type, Counter()).update([dtypes[node.input[1]]])
    operators = Counter(node.op_type for node in graph.node)
    return {
        **out,
        "operators": dict(operators.most_common()),
        "stored": {dtype: dict(each) for dtype, each in stored.items()},
        "layers": {op: dict(each) for op, each in layers.items()},
    }


def table(found: Artefact) -> str:
    m, said = found.manifest, facts(found)
    rows = [
        (m.kind, f"{m.engine} for {m.target}, {m.precision}" + (f", opset {m.opset}" if m.opset else "")),
        ("of", f"{m.model}, " + ", ".join(f"{network} {digest[:12]}" for network, digest in m.weights.items())),
        *[
            (f"{word} {port.name}", described(port))
            for word, ports in (("input", m.inputs), ("output", m.outputs))
            for port in ports
        ],
        ("batch", f"{m.batch[0]} to {m.batch[2]}, best {m.batch[1]}"),
        ("schedule", str(m.schedule) if m.schedule else ""),
        ("recipe", m.recipe),
        ("calibration", m.calibration or ""),
        *[
            (m.engine if key == "version" else key.replace("_", " "), plain(value))
            for key, value in table_of(m.tensorrt or {}).items()
        ],
        ("flags", ", ".join(f"{k} {v}" for k, v in table_of(m.flags).items() if v)),
        *[(f"measured {k}", f"{v:.4g}" if isinstance(v, float) else str(v)) for k, v in flat(table_of(m.measured))],
        ("made by", ", ".join(f"{name} {number}" for name, number in m.packages.items())),
        *[(f"file {name}", f"{each.bytes / 1e6:.2f} MB, SHA-256 {each.sha256[:12]}") for name, each in m.files.items()],
        ("operators", ", ".join(f"{op} {n}" for op, n in said.get("operators", {}).items())),
        *[
            (f"stored {dtype}", f"{each['tensors']} tensors, {each['bytes'] / 1e6:.2f} MB")
            for dtype, each in said.get("stored", {}).items()
        ],
        *[
            (f"weights of {op}", ", ".join(f"{d} {n}" for d, n in each.items()))
            for op, each in said.get("layers", {}).items()
        ],
        *[(f"layers {what}", text) for what, text in counts(said.get("fused", []))],
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}s}  {value}" for name, value in rows if value)


def described(port: Port) -> str:
    return f"{port.dtype} ({', '.join(map(str, port.shape))})"


def plain(value: Any) -> str:
    """A part of an engine's `Manifest.tensorrt` in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join("x".join(map(str, each)) if isinstance(each, list) else str(each) for each in value)
    return "" if value is None else str(value)


def flat(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """What stands in nested dictionaries, by the innermost key."""
    return [
        pair for key, value in values.items() for pair in (flat(value) if isinstance(value, dict) else [(key, value)])
    ]
