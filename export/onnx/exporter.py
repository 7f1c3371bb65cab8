"""A network of a pipeline becomes an artefact in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from coalescer_fast import __version__
from coalescer_fast.runtime.base import quiet_torch
from coalescer_fast.runtime.engines import onnxruntime, writing
from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.hashes import network_hashes
from coalescer_fast.runtime.engines.manifest import Manifest, Schedule

from ..measure import accuracy
from ..measure.reference import batches
from . import graph, modules
from .prompt_tables import write_tables

if TYPE_CHECKING:
    from coalescer_fast.pipeline import CoalescerPipeline

GRAPH = "model.onnx"  # name of the file
HALF_PICTURES = 4  # how many pictures torch draws in float16, which is slow
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "numpy")


@quiet_torch()
def export_onnx(
    pipe: CoalescerPipeline,
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
    """Export one network, and compare it in ONNX Runtime with the float32 reference.

    In float16 the manifest has the figures of the same network in torch: ONNX Runtime on a CPU computes most of such a
    graph in float32, which shows that the graph is right, but not what is lost where every result is rounded.

    Args:
        pipe: The pipeline.
        kind: "unet", "decoder" or "generator", see `modules`.
        folder: An empty folder, from `writing.creating`.
        model: Name of the model, as given to ``from_pretrained``.
        precision: "fp32" or "fp16".
        target: "cpu" or "tensorrt".
        batch: Smallest, best and largest number of pictures in one run.
        steps: Number of steps of a generator.
        guidance: Guidance scale of a generator; the model's own if None.
        command: Arguments of ``coalescer-export``, for the manifest.
        stage: Called with the name of each stage when it begins.

    Returns:
        The artefact.

    Raises:
        ValueError: If the network cannot be exported, or if its figures are beyond `accuracy.BUDGETS`.
    """
    least, best, most = batch
    if not 1 <= least <= best <= most:
        raise ValueError(f"batches are {least}, {best} and {most}; expected 1 <= least <= best <= most")
    inputs, outputs = modules.ports(pipe, kind)
    number = graph.opset(target, precision)
    network = modules.network(pipe, kind, precision, steps, guidance)
    graph.export_graph(network, inputs, outputs, batch, number, folder / GRAPH, stage)
    if kind == "generator":
        write_tables(pipe.description_encoder, folder)
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
    result = accuracy.compare(written, onnxruntime.open_artefact(written), pipe, sum(batches(manifest)))
    accuracy.require(result, f"the exported {kind}")
    if precision == "fp16":
        stage("compare in float16")
        result = accuracy.compare(written, lambda inputs: network(*inputs), pipe, HALF_PICTURES, runtime="torch")
        accuracy.require(result, f"the {kind} in float16")
    return writing.write(folder, replace(manifest, measured=accuracy.to_measured(result)))


def packages(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of this package, and of those among ``names`` that are installed."""
    found = {"coalescer_fast": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
