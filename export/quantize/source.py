"""A float artefact that is to be quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from coalescer_fast.runtime.engines.artefact import Artefact

from . import qdq
from .layers import Layer, find_layers
from .ranges import Ranges


@dataclass
class Source:
    """A float artefact to quantize.

    Attributes:
        artefact: The artefact.
        model: Its graph, after `layers.find_layers`.
        layers: Its layers that can be quantized.
    """

    artefact: Artefact
    model: Any
    layers: list[Layer]

    @classmethod
    def of(cls, found: Artefact) -> Source:
        """Read an artefact's graph.

        Raises:
            ValueError: If it is not in float, or is for no engine that would run it in int8.
        """
        m = found.manifest
        wrong = None
        if m.engine != "onnx" or m.precision not in ("fp32", "fp16"):
            wrong = f"{m.precision} for {m.engine}"
        elif (m.target, m.precision) == ("cpu", "fp16"):
            wrong = "fp16 for a CPU, which computes it in float32"
        if wrong:
            fix = "quantise what coalescer-export onnx has written in fp32, or in fp16 for tensorrt"
            raise ValueError(f"{found.folder} is {wrong}: {fix}")
        model = onnx.load(str(found.graph))
        return cls(found, model, find_layers(model, m.target))

    def quantized(self, layers: Sequence[Layer], known: Ranges) -> Any:
        """The model with these layers in int8."""
        return qdq.insert(self.model, layers, known.layers, self.artefact.manifest.target)
