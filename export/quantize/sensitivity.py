"""What each layer alone costs in int8."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coalescer_fast.runtime.engines import onnxruntime
from coalescer_fast.runtime.engines.artefact import Artefact

from ..measure.reference import Run, Tensors, graph_inputs
from ..onnx.exporter import GRAPH
from . import qdq
from .layers import Layer
from .prompts import held_out
from .ranges import Ranges
from .source import Source

if TYPE_CHECKING:
    from coalescer_fast.pipeline import CoalescerPipeline

PROMPTS = 8


@dataclass(frozen=True)
class LayerCost:
    """What it costs to quantize one layer, in all its uses.

    Attributes:
        layer: Name of the module.
        errors: Relative L2 error ||y - y_float|| / ||y_float|| of each output, by name.
        psnr: Median PSNR of the pictures in dB, for graphs that draw pictures.
    """

    layer: str
    errors: dict[str, float]
    psnr: float | None = None

    def row(self) -> dict[str, float | str]:
        """As a row of a table."""
        errors = {f"{output} error": error for output, error in self.errors.items()}
        return {"layer": self.layer, **errors, **({} if self.psnr is None else {"PSNR dB": self.psnr})}


def sensitivity(
    pipe: CoalescerPipeline,
    source: Source,
    layers: Sequence[Layer],
    known: Ranges,
    stage: Callable[[str], object] = lambda text: None,
) -> list[LayerCost]:
    """Quantize each layer alone, and compare with the float graph on prompts that were not calibrated on.

    Args:
        pipe: The pipeline.
        source: The float graph.
        layers: The layers to try.
        known: Ranges of these layers.
        stage: Called with the name of each stage when it begins.

    Returns:
        What each layer costs, the largest error of the first output first.
    """
    m = source.artefact.manifest
    names = held_out(pipe, known.prompts, PROMPTS, known.seed + 2)
    inputs = graph_inputs(pipe, m, names, known.seed + 2)
    exact = _outputs(onnxruntime.open_artefact(source.artefact), inputs)
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        alone = Artefact(Path(folder), replace(m, graph=GRAPH))
        for module in dict.fromkeys(layer.module for layer in layers):
            stage(f"sensitivity: {module}")
            one = [layer for layer in layers if layer.module == module]
            qdq.save(source.quantized(one, known), alone.graph)
            found = _outputs(onnxruntime.open_artefact(alone), inputs)
            errors, psnr = {}, None
            for port, y, e in zip(m.outputs, found, exact):
                errors[port.name] = float((y - e).norm() / e.norm())
                if port.name == "picture":
                    scale = 2 if m.kind == "decoder" else 1  # whose pictures are in [-1, 1]
                    psnr = float((-10 * ((y - e) / scale).square().mean((1, 2, 3)).log10()).median())
            costs.append(LayerCost(module, errors, psnr))
    first = m.outputs[0].name
    return sorted(costs, key=lambda cost: -cost.errors[first])


def _outputs(run: Run, inputs: Sequence[Tensors]) -> list[Tensor]:
    return [torch.cat(each).double() for each in zip(*(run(each) for each in inputs))]
