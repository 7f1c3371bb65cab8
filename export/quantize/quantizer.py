"""A float artefact becomes one in int8: calibrated, measured for error and speed, and refused where it does not win."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coalescer_fast.collect_env import cpu_name
from coalescer_fast.parity import Verification, descriptions
from coalescer_fast.runtime.base import quiet_torch
from coalescer_fast.runtime.engines import onnxruntime, writing
from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.manifest import Figures, Manifest, Quantization

from ..measure import accuracy, speed
from ..measure.reference import graph_inputs
from ..onnx.exporter import GRAPH, packages
from ..onnx.prompt_tables import write_tables
from . import qdq, ranges
from .calibration import PERCENTILE, PROMPTS, observe
from .layers import Layer, fitting, without
from .prompts import held_out
from .ranges import Ranges
from .sensitivity import LayerCost, sensitivity
from .source import Source

if TYPE_CHECKING:
    from coalescer_fast.pipeline import CoalescerPipeline

HELD_OUT = 64  # pictures that the error is measured on
Stage = Callable[[str], object]  # called with the name of each stage when it begins


@quiet_torch()
def quantize_artefact(
    pipe: CoalescerPipeline,
    found: Artefact,
    folder: Path,
    *,
    method: str = "percentile",
    percentile: float = PERCENTILE,
    prompts: int = PROMPTS,
    seed: int = 0,
    known: Ranges | None = None,
    keep: Sequence[str] = (),
    force: bool = False,
    command: tuple[str, ...] = (),
    report: Callable[[list[LayerCost]], object] | None = None,
    stage: Stage = lambda text: None,
) -> Artefact:
    """Write an artefact in int8, for the target of the float artefact that it is made from.

    Args:
        pipe: The pipeline that the float artefact was exported from.
        found: The float artefact.
        folder: An empty folder, from `writing.creating`.
        method: How ranges are cut, see `Histogram.range`.
        percentile: See `Histogram.range`.
        prompts: How many names to calibrate on.
        seed: Of the choice of names and the noise.
        known: Ranges to use instead of a calibration.
        keep: Names or patterns of layers that stay in float.
        force: Write it even if it is beyond `accuracy.BUDGETS`, or no faster.
        command: Arguments of ``coalescer-export``, for the manifest.
        report: Called with what each layer costs, which is measured only for this.
        stage: Called with the name of each stage when it begins.

    Returns:
        The artefact.

    Raises:
        ValueError: If no layer can be quantized, or if the result is beyond its budget or no faster.
    """
    source = Source.of(found)
    found.check_weights(pipe)
    layers = without(source.layers, keep)
    if not layers:
        raise ValueError(f"no layer of {found.folder} is left to quantise: keep fewer")
    if known is None:
        known = calibrate(pipe, source, method, percentile, prompts, seed, stage)
    layers, unfit = fitting(source.model, layers, known.layers, found.manifest.target)
    if not layers:
        name, reason = next(iter(unfit.items()))
        raise ValueError(f"no layer of {found.folder} can be quantised, {name} for one, for {reason}: use it in float")
    if report is not None:
        report(sensitivity(pipe, source, layers, known, stage))
    m = found.manifest
    qdq.save(source.quantized(layers, known), folder / GRAPH)
    (folder / ranges.FILE).write_text(known.to_json(), "utf-8")
    if m.kind == "generator":
        write_tables(pipe.description_encoder, folder)
    quantization = Quantization(
        method=known.method,
        prompts=len(known.prompts),
        kept=" ".join(keep),
        unfit=unfit,
        source=ranges.graph_sha256(m),
    )
    manifest = replace(
        m,
        precision="int8",
        recipe=recipe(m, len(layers), sum(node.op_type == "Conv" for node in source.model.graph.node)),
        graph=GRAPH,
        command=command,
        calibration=known.sha256,
        flags=replace(m.flags, int8=quantization),
        packages=packages(),
        files={},
    )
    return _measured(pipe, source, Artefact(folder, manifest), layers, known, seed + 1, force, stage)


def _measured(
    pipe: CoalescerPipeline,
    source: Source,
    written: Artefact,
    layers: Sequence[Layer],
    known: Ranges,
    seed: int,
    force: bool,
    stage: Stage,
) -> Artefact:
    """Measure an int8 graph, and write its manifest. Raises ValueError as `quantize_artefact` does."""
    m = source.artefact.manifest
    stage("load")
    run = onnxruntime.open_artefact(written)
    if m.target == "cpu" and (left := qdq.float_layers(written.graph, layers)):
        what = f"{left[0]} ({len(left)} of {len(layers)} layers) in float"
        raise ValueError(f"ONNX Runtime computes {what}: report this with its version")
    stage("compare")
    result = accuracy.compare(written, run, pipe, held_out(pipe, known.prompts, HELD_OUT, seed), seed)
    if not force:
        require(m, result)
    measured = accuracy.to_measured(result)
    if m.target == "cpu":
        stage("measure speed")
        times = speed.measure_speed(pipe, m, {"source": onnxruntime.open_artefact(source.artefact), "int8": run})
        if not force:
            speed.require_faster(f"the {m.kind}", times, m.precision)
        setting: Figures = {"threads": torch.get_num_threads(), "cpu": cpu_name()}
        measured = replace(measured, speed={**times.figures(), **setting})
    return writing.write(written.folder, replace(written.manifest, measured=measured))


def recipe(m: Manifest, layers: int, convolutions: int) -> str:
    """What is quantized and how, in words."""
    what = "inputs and weights in int8"
    if m.target == "cpu":
        what = "inputs and outputs in uint8, weights in int8, bias in int32"
    kept = (
        "conv_in, both heads and the last before them, three of the decoder, the conditioning path, normalisations and "
        "attention"
    )
    scales = "weights with a scale a channel"
    return f"{layers} of {convolutions} convolutions: {what}, {scales}; the rest, {kept} among it, in {m.precision}"


def require(m: Manifest, result: Verification) -> None:
    """Raise ValueError if an int8 graph is beyond its budget."""
    if not result.passed:
        row = next(row for row in result.rows if not row.ok)
        limit = "which is not finite" if row.limit is None else f"the limit {row.limit}{row.unit}"
        how = f"{row.what} is {row.value:.3g}{row.unit}, {limit}"
        fix = "keep the layers that --sensitivity names first (--keep-fp16), use another --method"
        raise ValueError(f"the {m.kind} in int8 is beyond its budget, {how}: {fix}, or add --force to have it")


def calibrate(
    pipe: CoalescerPipeline, source: Source, method: str, percentile: float, prompts: int, seed: int, stage: Stage
) -> Ranges:
    """Find the ranges of all layers, over every evaluation of the reference's calls.

    Args:
        pipe: The pipeline.
        source: What to calibrate.
        method: See `Histogram.range`.
        percentile: See `Histogram.range`.
        prompts: How many names to call with.
        seed: Of the choice of names and the noise.
        stage: Called with the name of each stage when it begins.

    Raises:
        ValueError: If a tensor is not finite, or if too few names would be left to measure on.
    """
    m = source.artefact.manifest
    names = descriptions(pipe, prompts, torch.Generator().manual_seed(seed))
    held_out(pipe, names, HELD_OUT, seed)  # raises now, and not after a long calibration
    by_layer = {layer.name: layer.tensors(m.target) for layer in source.layers}
    tensors = list(dict.fromkeys(name for each in by_layer.values() for name in each.values()))
    stage("calibrate")
    histograms = observe(source.model, tensors, graph_inputs(pipe, m, names, seed))
    stage(f"{method} of {len(tensors)} tensors")
    ends = {name: histogram.range(method, percentile) for name, histogram in histograms.items()}
    return Ranges(
        graph=ranges.graph_sha256(m),
        method=f"{method} {percentile:g}" if method == "percentile" else method,
        seed=seed,
        prompts=tuple(names),
        layers={name: {which: ends[tensor] for which, tensor in each.items()} for name, each in by_layer.items()},
    )
