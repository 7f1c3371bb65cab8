"""The file ``layers.json`` of an engine: what the builder has fused into each of its layers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coalescer_fast.schema import OMITTED, conform, table

FILE = "layers.json"


@dataclass(frozen=True)
class FusedLayer:
    """A layer of an engine.

    Attributes:
        name: TensorRT's name of it.
        type: TensorRT's type of it, such as "kgen".
        inputs: Type of each input, such as "Half".
        constants: Type of each constant, if it is known.
        outputs: Type of each output.
        of: Names of the nodes of the ONNX graph that are in it.
    """

    name: str
    type: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...] | None = field(default=None, metadata=OMITTED, kw_only=True)
    outputs: tuple[str, ...]
    of: tuple[str, ...]


def write_layers(folder: Path, layers: Iterable[FusedLayer]) -> None:
    """Write ``layers.json`` into a folder."""
    (folder / FILE).write_text(json.dumps(table(list(layers)), indent=1) + "\n", "utf-8")


def read_layers(folder: Path) -> tuple[FusedLayer, ...]:
    """Read ``layers.json``. Raises ValueError if `write_layers` did not write it."""
    content = json.loads((folder / FILE).read_text("utf-8"))
    found: tuple[FusedLayer, ...] = conform(content, tuple[FusedLayer, ...], FILE)
    return found


def layers_of_log(text: str) -> list[FusedLayer]:
    """The layers that a message of the builder lists, one in a line."""
    layers = []
    for line in text.split("\n"):
        head, found, rest = line.partition(", Inputs: [")
        if found and (named := re.match(r"Name: (.+), LayerType: (\w+)$", head)):
            given, _, rest = rest.partition(", Outputs: [")
            outputs, _, rest = rest.partition(", TacticName: ")
            inputs, _, constants = given.partition(", Constants: [")
            layers.append(
                FusedLayer(
                    named[1],
                    named[2],
                    inputs=_types(inputs),
                    constants=_types(constants),
                    outputs=_types(outputs),
                    of=_onnx_names(rest),
                )
            )
    return layers


def layers_of_inspector(trt: Any, log: Any, engine_bytes: Any) -> list[FusedLayer]:
    """The layers of an engine by the engine inspector, which needs the GPU; none if the engine cannot be loaded."""
    engine = trt.Runtime(log).deserialize_cuda_engine(engine_bytes)
    if engine is None:
        return []
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return [
        FusedLayer(
            each["Name"],
            each["LayerType"],
            inputs=tuple(t["Format/Datatype"] for t in each.get("Inputs", [])),
            outputs=tuple(t["Format/Datatype"] for t in each.get("Outputs", [])),
            of=_onnx_names(each.get("Metadata", "")),
        )
        for each in json.loads(text)["Layers"]
        if isinstance(each, dict)
    ]


def counts(layers: Iterable[FusedLayer]) -> list[tuple[str, str]]:
    """For each type of layer, how many there are, and how many for each pair of input and output types, in words."""
    kinds: dict[str, Counter[str]] = {}
    for layer in layers:
        inputs, outputs = (" ".join(dict.fromkeys(types)) or "nothing" for types in (layer.inputs, layer.outputs))
        kinds.setdefault(layer.type, Counter()).update([f"{inputs} to {outputs}"])
    return [
        (kind, f"{sum(ways.values())}: " + ", ".join(f"{way} {n}" for way, n in ways.most_common()))
        for kind, ways in kinds.items()
    ]


def _types(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"Datatype: (\w+)", text))


def _onnx_names(metadata: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\[ONNX Layer: (.+?)\]", metadata))
