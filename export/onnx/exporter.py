"""From a pipeline to an artefact in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from coalescer_fast import __version__
from coalescer_fast.runtime.base import quiet_torch
from coalescer_fast.runtime.engines import onnxruntime, writing
from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.hashes import network_hashes
from coalescer_fast.runtime.engines.manifest import Manifest, Schedule

from ..measure import accuracy
from . import graph, modules

GRAPH = "model.onnx"
HALF_PICTURES = 4  # that torch draws in float16, slowly
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "numpy")


@quiet_torch()
def export_onnx(
    pipe: Any,
    kind: str,
    folder: Path,
    *,
    model: str,
    precision: str = "fp32",
    target: str = "cpu",
    batch: tuple[int, int, int] = (1, 4, 16),
    steps: int = 2,
    guidance: float | None = None,
    command: tuple[str, ...] = (),
    stage: Callable[[str], object] = lambda text: None,
) -> Artefact:
    """Export one network into an empty folder (of `writing.creating`), and measure it in ONNX Runtime at batches 1, 2 and 5.

    In float16 the manifest has the figures of the same network in torch: ONNX Runtime on a CPU computes most of such a graph in float32,
    which shows that it is right, and not what is lost where every result is rounded.

    Args:
        kind: "unet", "decoder" or "generator", see `modules`.
        model: name of the pipeline, as of ``from_pretrained``.
        precision: "fp32" or "fp16"; target: "cpu" or "tensorrt", which decide the opset.
        batch: least, best and most pictures.
        steps, guidance: a generator's; the model's own guidance if None.
        command: see `Manifest`; stage: told what begins.

    Raises: ValueError for a network that cannot be exported, or whose figures are beyond `accuracy.BUDGETS`.
    """
    least, best, most = batch
    if not 1 <= least <= best <= most:
        raise ValueError(f"batches are {least}, {best} and {most}; expected 1 <= least <= best <= most")
    inputs, outputs = modules.ports(pipe, kind)
    number = graph.opset(target, precision)
    network = modules.network(pipe, kind, precision, steps, guidance)
    graph.export_graph(network, inputs, outputs, batch, number, folder / GRAPH, stage)
    manifest = Manifest(
        kind=kind,
        engine="onnx",
        target=target,
        precision=precision,
        recipe=modules.RECIPES[precision],
        graph=GRAPH,
        model=model,
        weights=network_hashes(pipe, kind),
        inputs=inputs,
        outputs=outputs,
        batch=batch,
        opset=number,
        command=command,
        schedule=Schedule.of(*modules.schedule_of(pipe, steps, guidance)) if kind == "generator" else None,
        packages=packages(),
    )
    stage("compare")
    written = Artefact(folder, manifest)
    result = accuracy.compare(written, onnxruntime.open_artefact(written), pipe, sum(accuracy.batches(manifest)))
    accuracy.require(result, f"the exported {kind}")
    if precision == "fp16":
        stage("compare in float16")
        result = accuracy.compare(written, lambda inputs: network(*inputs), pipe, HALF_PICTURES, runtime="torch")
        accuracy.require(result, f"the {kind} in float16")
    return writing.write(folder, replace(manifest, measured=accuracy.to_measured(result)))


def packages(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of this package and of those that are installed."""
    found = {"coalescer_fast": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
