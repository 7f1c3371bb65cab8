"""From an artefact in float to one in int8: calibrated, measured for error and speed, and refused where it does not win."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from coalescer_fast.collect_env import cpu_name
from coalescer_fast.parity import Verification, descriptions
from coalescer_fast.runtime import artefact, onnx_file
from coalescer_fast.runtime.artefact import Artefact, Manifest
from coalescer_fast.runtime.base import quiet_torch

from . import figures, quantization, ranges
from .exporting import GRAPH, packages
from .quantization import Layer
from .ranges import Ranges

HELD_OUT = 64  # pictures that the error is measured on
SENSITIVITY_PROMPTS = 8
Stage = Callable[[str], object]
Row = dict[str, float | str]


@dataclass
class Source:
    """An artefact in float and its prepared graph, see `quantization.prepare`."""

    artefact: Artefact
    model: Any
    layers: list[Layer]

    @classmethod
    def of(cls, found: Artefact) -> Source:
        m = found.manifest
        wrong = None
        if m.engine != "onnx" or m.precision not in ("fp32", "fp16"):
            wrong = f"{m.precision} for {m.engine}"
        elif (m.target, m.precision) == ("cpu", "fp16"):
            wrong = "fp16 for a CPU, which computes it in float32"
        if wrong:
            raise ValueError(
                f"{found.folder} is {wrong}: quantise what coalescer-export onnx has written in fp32, or in fp16 for tensorrt"
            )
        model = onnx.load(str(found.graph))
        return cls(found, model, quantization.prepare(model, m.target))

    def quantised(self, layers: Sequence[Layer], known: Ranges) -> Any:
        return quantization.insert(self.model, layers, known.layers, self.artefact.manifest.target)


@quiet_torch()
def quantise(
    pipe: Any,
    found: Artefact,
    folder: Path,
    *,
    method: str = "percentile",
    percentile: float = ranges.PERCENTILE,
    prompts: int = ranges.PROMPTS,
    seed: int = 0,
    known: Ranges | None = None,
    keep: Sequence[str] = (),
    force: bool = False,
    command: tuple[str, ...] = (),
    report: Callable[[list[Row]], object] | None = None,
    stage: Stage = lambda text: None,
) -> Artefact:
    """Write an artefact in int8 into an empty folder (of `artefact.creating`), for the target of the one that is ``found``.

    Args:
        method, percentile: see `ranges.Histogram.range`; prompts: how many names to calibrate on; seed: of their choice and the noise.
        known: ranges to use instead.
        keep: names or patterns of layers that stay as they are.
        force: write it even if it is beyond `figures.BUDGETS`, or no faster.
        command: see `Manifest`; stage: told what begins.
        report: given `sensitivity`, which is measured for it.

    Raises: ValueError for what cannot be quantised, or does not win.
    """
    source = Source.of(found)
    found.check_weights(pipe)
    layers = quantization.without(source.layers, keep)
    if not layers:
        raise ValueError(f"no layer of {found.folder} is left to quantise: keep fewer")
    if known is None:
        known = calibrate(pipe, source, method, percentile, prompts, seed, stage)
    layers, unfit = quantization.fitting(source.model, layers, known.layers, found.manifest.target)
    if not layers:
        name, reason = next(iter(unfit.items()))
        raise ValueError(f"no layer of {found.folder} can be quantised, {name} for one, for {reason}: use it in float")
    if report is not None:
        report(sensitivity(pipe, source, layers, known, stage))
    m, path = found.manifest, folder / GRAPH
    quantization.save(source.quantised(layers, known), path)
    (folder / ranges.FILE).write_text(known.to_json(), "utf-8")
    flags = {
        "method": known.method,
        "prompts": len(known.prompts),
        "kept": " ".join(keep),
        "unfit": unfit,  # layer -> why it stays in float
        "source": ranges.graph_sha256(m),
    }
    manifest = replace(
        m,
        precision="int8",
        recipe=recipe(m, len(layers), sum(node.op_type == "Conv" for node in source.model.graph.node)),
        graph=GRAPH,
        command=command,
        calibration=known.sha256,
        flags={**m.flags, "int8": flags},
        packages=packages(),
        files={},
    )
    written = Artefact(folder, manifest)
    stage("load")
    run = onnx_file.open_artefact(written)
    if m.target == "cpu" and (left := quantization.float_layers(path, layers)):
        raise ValueError(
            f"ONNX Runtime computes {left[0]} ({len(left)} of {len(layers)} layers) in float: report this with its version"
        )
    stage("compare")
    result = figures.compare(written, run, pipe, ranges.held_out(pipe, known.prompts, HELD_OUT, seed + 1), seed + 1)
    measured = figures.to_measured(result)
    if m.target == "cpu":
        stage("measure speed")
        times = figures.speed(pipe, m, {"source": onnx_file.open_artefact(found), "int8": run})
        measured["speed"] = {**times, "threads": torch.get_num_threads(), "cpu": cpu_name()}
    if not force:
        check(m, result, measured)
    return artefact.write(folder, replace(manifest, measured=measured))


def recipe(m: Manifest, layers: int, convolutions: int) -> str:
    what = (
        "inputs and outputs in uint8, weights in int8, bias in int32"
        if m.target == "cpu"
        else "inputs and weights in int8"
    )
    kept = "conv_in, both heads and the last before them, three of the decoder, the conditioning path, normalisations and attention"
    return f"{layers} of {convolutions} convolutions: {what}, weights with a scale a channel; the rest, {kept} among it, in {m.precision}"


def check(m: Manifest, result: Verification, measured: Mapping[str, Any]) -> None:
    """Raise ValueError if the quantised graph does not win."""
    if not result.passed:
        row = next(row for row in result.rows if not row.ok)
        limit = "which is not finite" if row.limit is None else f"the limit {row.limit}{row.unit}"
        how = f"{row.what} is {row.value:.3g}{row.unit}, {limit}"
        mend = "keep the layers that --sensitivity names first (--keep-fp16), use another --method"
        raise ValueError(f"the {m.kind} in int8 is beyond its budget, {how}: {mend}, or add --force to have it")
    if times := measured.get("speed"):
        figures.require_faster(f"the {m.kind}", times, m.precision)


def calibrate(
    pipe: Any, source: Source, method: str, percentile: float, prompts: int, seed: int, stage: Stage
) -> Ranges:
    """Ranges of all layers over the reference's trajectories of so many known names: every evaluation that a call makes."""
    found = source.artefact
    m = found.manifest
    names = descriptions(pipe, prompts, torch.Generator().manual_seed(seed))
    ranges.held_out(pipe, names, HELD_OUT, seed)  # so that what is missing is not said after a long calibration
    by_layer = {layer.name: layer.tensors(m.target) for layer in source.layers}
    tensors = list(dict.fromkeys(name for each in by_layer.values() for name in each.values()))
    stage("calibrate")
    histograms = ranges.observe(source.model, tensors, figures.calls(pipe, m, names, seed))
    stage(f"{method} of {len(tensors)} tensors")
    ends = {name: histogram.range(method, percentile) for name, histogram in histograms.items()}
    return Ranges(
        graph=ranges.graph_sha256(m),
        method=f"{method} {percentile:g}" if method == "percentile" else method,
        seed=seed,
        prompts=tuple(names),
        layers={name: {which: ends[tensor] for which, tensor in each.items()} for name, each in by_layer.items()},
    )


def sensitivity(
    pipe: Any, source: Source, layers: Sequence[Layer], known: Ranges, stage: Stage = lambda text: None
) -> list[Row]:
    """What each layer costs if it alone is quantised, in all its uses, worst first: of every output the relative L2 error
    ||y - y_float|| / ||y_float||, of pictures the median PSNR, too. On real prompts that were not calibrated on."""
    m = source.artefact.manifest
    names = ranges.held_out(pipe, known.prompts, SENSITIVITY_PROMPTS, known.seed + 2)
    inputs = figures.calls(pipe, m, names, known.seed + 2)
    exact = _outputs(onnx_file.open_artefact(source.artefact), inputs)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        alone = Artefact(Path(folder), replace(m, graph=GRAPH))
        for module in dict.fromkeys(layer.module for layer in layers):
            stage(f"sensitivity: {module}")
            quantization.save(
                source.quantised([layer for layer in layers if layer.module == module], known), alone.graph
            )
            found = _outputs(onnx_file.open_artefact(alone), inputs)
            row: Row = {"layer": module}
            for port, y, e in zip(m.outputs, found, exact):
                row[f"{port.name} error"] = float((y - e).norm() / e.norm())
                if port.name == "picture":
                    scale = 2 if m.kind == "decoder" else 1  # whose pictures are in [-1, 1]
                    psnr = -10 * ((y - e) / scale).square().mean((1, 2, 3)).log10()
                    row["PSNR dB"] = float(psnr.median())
            rows.append(row)
    first = f"{m.outputs[0].name} error"
    return sorted(rows, key=lambda row: -float(row[first]))


def _outputs(run: Callable[[Any], Any], inputs: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.cat(each).double() for each in zip(*(run(each) for each in inputs))]
