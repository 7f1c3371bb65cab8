"""How far an exported graph is from the float32 reference, on the reference's own calls with real prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coalescer_fast.parity import NUM_PROMPTS, Budget, Row, Verification, at_least, at_most, finite
from coalescer_fast.runtime.base import quiet_torch
from coalescer_fast.runtime.engines import onnxruntime, tensorrt
from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.manifest import Manifest, Measured

from .reference import Run, Tensors, batches, steps_and_guidance, trajectories

if TYPE_CHECKING:
    from coalescer_fast.pipeline import CoalescerPipeline

# by precision
BUDGETS = {
    "fp32": Budget(psnr_median=60.0, psnr_minimum=60.0, direction_cosine=0.99999, distance_error=1e-3),
    "fp16": Budget(psnr_median=45.0, psnr_minimum=45.0),
    "int8": Budget(psnr_median=28.0, psnr_minimum=20.0, direction_cosine=0.99, distance_error=0.05),
}
# limit in fp32 for the absolute error of pixels in [0, 1], directions and distances
LARGEST_ERROR = 1e-3


def opened(artefact: Artefact) -> Run:
    """Open an artefact with the engine that it is for. Inputs and outputs are on the CPU."""
    if artefact.manifest.engine not in tensorrt.TITLES:
        return onnxruntime.open_artefact(artefact)
    return on_cpu(tensorrt.open_artefact(artefact), "cuda")


def on_cpu(run: Run, device: str) -> Run:
    """A function of tensors on ``device`` as one of tensors on the CPU."""
    return lambda inputs: tuple(y.cpu() for y in run(tuple(x.to(device) for x in inputs)))


@quiet_torch()
def compare(
    artefact: Artefact,
    run: Run,
    pipe: CoalescerPipeline,
    prompts: int | Sequence[str] = NUM_PROMPTS,
    seed: int = 0,
    budget: Budget | None = None,
    runtime: str = "onnxruntime",
) -> Verification:
    """Compare an artefact with the float32 reference.

    Args:
        artefact: The artefact.
        run: Runs its graph.
        pipe: The pipeline that it was exported from.
        prompts: Prompts, or how many to draw from the names that the model was trained on.
        seed: Of the prompts and the noise.
        budget: Limits; those of its precision in `BUDGETS` if None.
        runtime: Name of what runs it.

    Returns:
        The figures; those of outputs that are not finite come first.

    Raises:
        ValueError: If the graph does not take the inputs of such a call.
    """
    m = artefact.manifest
    budget = BUDGETS[m.precision] if budget is None else budget
    steps, guidance = steps_and_guidance(m)
    expected: list[Tensors] = []
    found: list[Tensors] = []
    pictures: list[Tensor] = []
    for trajectory in trajectories(pipe, prompts, batches(m), seed, steps, guidance):
        pictures.append(trajectory.pictures.double())
        for inputs, outputs in trajectory.calls(m.kind):
            artefact.check_inputs(inputs)
            expected.append(tuple(y.double() for y in outputs))
            found.append(tuple(y.double() for y in run(inputs)))
    y, e = ([torch.cat(each) for each in zip(*outputs)] for outputs in (found, expected))
    rows = _not_finite(m, y)
    rows += _heads(y, e, budget) if m.kind == "unet" else _pictures(m.kind, y[0], e[0], budget)
    if m.kind == "unet" and m.precision == "int8":
        # the error of a direction does not tell how different the picture will be
        again = [t.pictures.double() for t in trajectories(pipe, prompts, batches(m), seed, steps, guidance, run)]
        rows += _pictures("generator", torch.cat(again), torch.cat(pictures), budget)
    largest = max(float((a - b).abs().max()) for a, b in zip(y, e))
    what = "largest error"
    rows.append(at_most(what, largest, LARGEST_ERROR) if m.precision == "fp32" else finite(what, largest))
    return Verification(f"{runtime}, {m.kind}", m.precision, sum(map(len, pictures)), tuple(rows))


def _not_finite(m: Manifest, outputs: Sequence[Tensor]) -> list[Row]:
    return [
        finite(f"{port.name}, largest absolute value", float(y.abs().max()))
        for port, y in zip(m.outputs, outputs)
        if not y.isfinite().all()
    ]


def _heads(found: list[Tensor], expected: list[Tensor], budget: Budget) -> list[Row]:
    (direction, distance), (true_direction, true_distance) = found, expected
    a, b = direction.flatten(1), true_direction.flatten(1)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    distance_error = float((distance / true_distance - 1).abs().max())
    return [
        finite("direction, relative L2 error", float((a - b).norm() / b.norm())),
        at_least("direction, cosine, minimum", float(cosine.min()), budget.direction_cosine),
        at_most("distance, relative error, maximum", distance_error, budget.distance_error),
    ]


def _pictures(kind: str, found: Tensor, expected: Tensor, budget: Budget) -> list[Row]:
    if kind == "decoder":
        found, expected = ((x / 2 + 0.5).clamp(0, 1) for x in (found, expected))
    psnr = -10 * (found - expected).square().mean((1, 2, 3)).log10()
    return [
        at_least("pictures: PSNR, median", float(psnr.median()), budget.psnr_median, " dB"),
        at_least("pictures: PSNR, minimum", float(psnr.min()), budget.psnr_minimum, " dB"),
    ]


def require(result: Verification, what: str) -> None:
    """Raise ValueError if a figure is beyond its limit.

    Args:
        result: The figures.
        what: What to call the graph.
    """
    if not result.passed:
        failed = next(row for row in result.rows if not row.ok)
        limit = "which is not finite" if failed.limit is None else f"the limit {failed.limit}"
        raise ValueError(f"{what} is not the model's: {failed.what} is {failed.value:.3g}, {limit}")


def to_measured(result: Verification) -> Measured:
    """The figures as a manifest holds them."""
    error = {row.what: row.value if math.isfinite(row.value) else str(row.value) for row in result.rows}
    return Measured(result.runtime, result.pictures, error)
