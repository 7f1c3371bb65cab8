"""How fast graphs are, timed in turn on the inputs of a real call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from coalescer_fast.parity import descriptions
from coalescer_fast.runtime.engines.manifest import Figures, Manifest

from .reference import Tensors, graph_inputs

if TYPE_CHECKING:
    from coalescer_fast.pipeline import CoalescerPipeline


@dataclass(frozen=True)
class Speed:
    """Median times of graphs.

    Attributes:
        batch: Number of pictures in a run.
        milliseconds: Median time of a run, by name of the graph.
    """

    batch: int
    milliseconds: dict[str, float]

    @property
    def speedup(self) -> float | None:
        """Time of the graph "source" over that of "int8", if both were timed."""
        if "source" not in self.milliseconds:
            return None
        return self.milliseconds["source"] / self.milliseconds["int8"]

    def figures(self) -> Figures:
        """For `Measured.speed`."""
        found: Figures = {"batch": self.batch, **{f"{name} ms": ms for name, ms in self.milliseconds.items()}}
        return found if self.speedup is None else {**found, "speedup": self.speedup}


def measure_speed(
    pipe: CoalescerPipeline, manifest: Manifest, runs: Mapping[str, Callable[[Tensors], object]], device: str = "cpu"
) -> Speed:
    """Time graphs in turn, at the batch size that they are best for.

    Args:
        pipe: The pipeline that they were exported from.
        manifest: The manifest of one of them; the others take the same inputs.
        runs: What runs each of them, by name.
        device: Device of their inputs.
    """
    batch = manifest.batch[1]
    (first, *_) = graph_inputs(pipe, manifest, descriptions(pipe, batch, torch.Generator().manual_seed(0)), 0)
    inputs = tuple(x.to(device) for x in first)

    def once(run: Callable[[Tensors], object]) -> None:
        run(inputs)
        if device != "cpu":
            torch.cuda.synchronize()

    times = interleaved({name: partial(once, run) for name, run in runs.items()})
    return Speed(batch, {name: statistics.median(each) * 1e3 for name, each in times.items()})


def require_faster(what: str, speed: Speed, than: str) -> None:
    """Raise ValueError if a graph in int8 is not faster than the one that it was quantized from.

    Args:
        what: What to call the graph.
        speed: Times of "source" and "int8".
        than: Precision of the source.
    """
    assert speed.speedup is not None
    if speed.speedup <= 1:
        int8, source = speed.milliseconds["int8"], speed.milliseconds["source"]
        took = f"{int8:.3g} ms against {source:.3g} for {speed.batch} pictures"
        fix = "use that, or add --force to have this"
        raise ValueError(f"{what} in int8 is no faster here than in {than}, {took}: {fix}")


def interleaved(
    functions: Mapping[str, Callable[[], object]], seconds: float = 3.0, least: int = 5
) -> dict[str, list[float]]:
    """Time functions in turn, so that whatever else runs on the machine disturbs all of them alike.

    Args:
        functions: By name. Each is called once before.
        seconds: How long to go on.
        least: Least number of calls of each.

    Returns:
        Seconds of each call, by name.
    """
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
