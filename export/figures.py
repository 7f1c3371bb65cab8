"""How far an exported graph is from the float32 reference, on the reference's own trajectories of real prompts."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from coalescer_fast.models.unet import Conditioning
from coalescer_fast.parity import NUM_PROMPTS, Budget, Row, Verification, at_least, at_most, descriptions, finite
from coalescer_fast.prompts import Descriptions
from coalescer_fast.runtime import onnx_file, tensorrt
from coalescer_fast.runtime.artefact import Artefact, Manifest
from coalescer_fast.runtime.base import Part, Runtime, quiet_torch
from coalescer_fast.runtime.exported import Described

Tensors = tuple[Tensor, ...]
BATCHES = (1, 2, 5)
BUDGETS = {
    "fp32": Budget(psnr_median=60.0, psnr_minimum=60.0, direction_cosine=0.99999, distance_error=1e-3),
    "fp16": Budget(psnr_median=45.0, psnr_minimum=45.0),
    "int8": Budget(psnr_median=28.0, psnr_minimum=20.0, direction_cosine=0.99, distance_error=0.05),
}
# of pixels in [0, 1], directions and distances, in float32
LARGEST_ERROR = 1e-3


@dataclass
class Trajectory:
    """A call of the reference. evaluations: (R, description...) -> (direction, distance), in turn, those of the empty description too;
    latents -> decoded; noise, description... -> pictures (N, 3, H, W) in [0, 1]."""

    noise: Tensor
    description: Tensors = ()
    evaluations: list[tuple[Tensors, Tensors]] = field(default_factory=list)
    latents: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))
    decoded: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))
    pictures: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))

    def calls(self, kind: str) -> list[tuple[Tensors, Tensors]]:
        """(inputs, outputs) of a graph of this kind."""
        if kind == "unet":
            return self.evaluations
        if kind == "decoder":
            return [((self.latents,), (self.decoded,))]
        return [((self.noise, *self.description), (self.pictures,))]


class _Witness(Runtime):
    """A pipeline's runtime: the float32 reference, or another UNet ``run``, with what goes in and comes out noted."""

    name, backend, dtype = "reference", "reference", torch.float32

    def __init__(self, pipe: Any, run: Callable[[Tensors], Tensors] | None):
        self.seen: Trajectory  # of the call that runs
        super().__init__(pipe)
        self.device, self.run = pipe.device, run
        self.unet = copy.deepcopy(pipe.unet)
        self.unet.set_backend("reference")

    def condition(self, texts: Descriptions, device: torch.device) -> Described:
        return Described([], None, [], description=self.pipe.describe(texts, device))

    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        assert isinstance(conditioning, Described)
        if not self.seen.evaluations:
            self.seen.description = conditioning.description
        inputs = (sample, *conditioning.description)
        direction, distance = self.unet(*inputs, return_dict=False) if self.run is None else self.run(inputs)
        self.seen.evaluations.append((inputs, (direction, distance)))
        return direction, distance

    def decode(self, latents: Tensor) -> Tensor:
        self.seen.latents, self.seen.decoded = latents, self.pipe.decode(latents)
        return self.seen.decoded

    def explain(self) -> list[Part]:
        return [Part("all", self.name, "what goes in and comes out is noted")]


def trajectories(
    pipe: Any,
    prompts: int | Sequence[str],
    batches: Sequence[int] = (1,),
    seed: int = 0,
    steps: int = 2,
    guidance: float | None = None,
    run: Callable[[Tensors], Tensors] | None = None,
) -> Iterator[Trajectory]:
    """What the reference does for prompts, or for so many known names without repeats, in calls of the sizes ``batches``, again and again;
    or what it does with another UNet, ``run``.

    The names, their order, and the noise depend on the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = list(descriptions(pipe, prompts, generator))
    runtime = pipe.runtime
    witness = _Witness(pipe, run)
    sizes = cycle(batches)
    bars = getattr(pipe, "_progress_bar_config", {})
    while texts:
        size = next(sizes)
        part, texts = texts[:size], texts[size:]
        part += [part[-1]] * (min(batches) - len(part))  # a graph may take no fewer
        noise = pipe.initial_noise(len(part), generator)
        witness.seen = Trajectory(noise)
        try:
            pipe.runtime = witness
            pipe.set_progress_bar_config(**{**bars, "disable": True})
            pictures = pipe(
                part, num_inference_steps=steps, guidance_scale=guidance, latents=noise, output_type="pt"
            ).images
        finally:
            pipe.runtime = runtime
            pipe.set_progress_bar_config(**bars)
        witness.seen.pictures = pictures
        yield witness.seen


def batches(manifest: Manifest) -> tuple[int, ...]:
    """Those of `BATCHES` that the graph takes, or nearly."""
    least, _, most = manifest.batch
    return tuple(dict.fromkeys(min(max(size, least), most) for size in BATCHES))


def calls(pipe: Any, m: Manifest, names: Sequence[str], seed: int) -> list[Tensors]:
    """Inputs of a graph, of the reference's trajectories in batches that it is best for."""
    steps, scale = call_of(m)
    seen = trajectories(pipe, names, (m.batch[1],), seed, steps, scale)
    return [inputs for each in seen for inputs, _ in each.calls(m.kind)]


def call_of(m: Manifest) -> tuple[int, float | None]:
    """Steps and guidance scale of a generator, or those that other graphs are measured with."""
    return (2, None) if m.schedule is None else (len(m.schedule.etas), m.schedule.guidance_scale)


def opened(artefact: Artefact) -> Callable[[Tensors], Tensors]:
    """By the engine that it is for, of tensors on the CPU."""
    if artefact.manifest.engine not in tensorrt.TITLES:
        return onnx_file.open_artefact(artefact)
    return on_cpu(tensorrt.open_artefact(artefact), "cuda")


def on_cpu(run: Callable[[Tensors], Tensors], device: str) -> Callable[[Tensors], Tensors]:
    """A function of tensors on a device as one of tensors on the CPU."""
    return lambda inputs: tuple(y.cpu() for y in run(tuple(x.to(device) for x in inputs)))


@quiet_torch()
def compare(
    artefact: Artefact,
    run: Callable[[Tensors], Tensors],
    pipe: Any,
    prompts: int | Sequence[str] = NUM_PROMPTS,
    seed: int = 0,
    budget: Budget | None = None,
    runtime: str = "onnxruntime",
) -> Verification:
    """Figures of an artefact that ``run`` runs, outputs that are not finite first, against ``budget``, that of its precision if None."""
    m = artefact.manifest
    budget = BUDGETS[m.precision] if budget is None else budget
    steps, scale = call_of(m)
    expected: list[Tensors] = []
    found: list[Tensors] = []
    drawn: list[Tensor] = []
    for trajectory in trajectories(pipe, prompts, batches(m), seed, steps, scale):
        drawn.append(trajectory.pictures.double())
        for inputs, outputs in trajectory.calls(m.kind):
            artefact.check_inputs(inputs)
            expected.append(tuple(y.double() for y in outputs))
            found.append(tuple(y.double() for y in run(inputs)))
    y, e = ([torch.cat(each) for each in zip(*all_)] for all_ in (found, expected))
    rows = _not_finite(m, y)
    rows += _heads(y, e, budget) if m.kind == "unet" else _pictures(m.kind, y[0], e[0], budget)
    if (
        m.kind == "unet" and m.precision == "int8"
    ):  # what counts: a direction's error does not say what becomes of a picture
        again = [each.pictures.double() for each in trajectories(pipe, prompts, batches(m), seed, steps, scale, run)]
        rows += _pictures("generator", torch.cat(again), torch.cat(drawn), budget)
    largest = max(float((a - b).abs().max()) for a, b in zip(y, e))
    what = "largest error"
    rows.append(at_most(what, largest, LARGEST_ERROR) if m.precision == "fp32" else finite(what, largest))
    return Verification(f"{runtime}, {m.kind}", m.precision, sum(map(len, drawn)), tuple(rows))


def _not_finite(m: Manifest, outputs: Sequence[Tensor]) -> list[Row]:
    return [
        finite(f"{p.name}, largest absolute value", float(y.abs().max()))
        for p, y in zip(m.outputs, outputs)
        if not y.isfinite().all()
    ]


def _heads(found: list[Tensor], expected: list[Tensor], budget: Budget) -> list[Row]:
    (direction, distance), (true_direction, true_distance) = found, expected
    a, b = direction.flatten(1), true_direction.flatten(1)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return [
        finite("direction, relative L2 error", float((a - b).norm() / b.norm())),
        at_least("direction, cosine, minimum", float(cosine.min()), budget.direction_cosine),
        at_most(
            "distance, relative error, maximum",
            float((distance / true_distance - 1).abs().max()),
            budget.distance_error,
        ),
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
    """Raise ValueError if a figure fails."""
    if not result.passed:
        failed = next(row for row in result.rows if not row.ok)
        limit = "which is not finite" if failed.limit is None else f"the limit {failed.limit}"
        raise ValueError(f"{what} is not the model's: {failed.what} is {failed.value:.3g}, {limit}")


def speed(
    pipe: Any, m: Manifest, runs: Mapping[str, Callable[[Tensors], object]], device: str = "cpu"
) -> dict[str, Any]:
    """ "NAME ms", medians, of runs of a graph at its best batch, in turn; of "source" and "int8" the "speedup", too."""
    (first, *_) = calls(pipe, m, descriptions(pipe, m.batch[1], torch.Generator().manual_seed(0)), 0)
    inputs = tuple(x.to(device) for x in first)

    def once(run: Callable[[Tensors], object]) -> None:
        run(inputs)
        if device != "cpu":
            torch.cuda.synchronize()

    times = interleaved({name: partial(once, run) for name, run in runs.items()})
    out: dict[str, Any] = {
        "batch": m.batch[1],
        **{f"{name} ms": statistics.median(each) * 1e3 for name, each in times.items()},
    }
    return {**out, "speedup": out["source ms"] / out["int8 ms"]} if "source" in runs else out


def require_faster(what: str, times: Mapping[str, Any], than: str) -> None:
    """Raise ValueError if in int8 it is no faster than its source, see `speed`."""
    if times["speedup"] <= 1:
        took = f"{times['int8 ms']:.3g} ms against {times['source ms']:.3g} for {times['batch']} pictures"
        raise ValueError(
            f"{what} in int8 is no faster here than in {than}, {took}: use that, or add --force to have this"
        )


def interleaved(
    functions: Mapping[str, Callable[[], object]], seconds: float = 3.0, least: int = 5
) -> dict[str, list[float]]:
    """Seconds of each call, in turn, so that whatever disturbs the machine disturbs all alike; one call each beforehand."""
    names, taken = list(functions), {name: list[float]() for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[names[0]]) < least:
        names.reverse()
        for name in names:
            start = time.perf_counter()
            functions[name]()
            taken[name].append(time.perf_counter() - start)
    return taken


def to_measured(result: Verification) -> dict[str, Any]:
    """For `Manifest.measured`: figure -> value, and how many pictures by what."""
    rows = {row.what: row.value if math.isfinite(row.value) else str(row.value) for row in result.rows}
    return {"runtime": result.runtime, "pictures": result.pictures, "error": rows}
