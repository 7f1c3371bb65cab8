"""Where ranges are found: histograms of a graph's tensors on real prompts, and how they are cut."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from coalescer_fast.runtime.engines import onnxruntime

from .scales import Range

METHODS = ("max", "percentile", "entropy")
PERCENTILE = 99.999
PROMPTS = 64
BINS = 8192
COARSE, LEVELS = 2048, 128  # of the method "entropy": bins, and levels that are left of them


class Histogram:
    """Histogram of |x| over all values that were added.

    Attributes:
        counts: Counts of `BINS` bins over [0, top].
        top: End of the last bin, which doubles when larger values come.
        least: Smallest x.
        most: Largest x.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.top = 0.0
        self.least, self.most = np.inf, -np.inf

    def add(self, x: Any) -> None:
        """Add the values of an array.

        Raises:
            ValueError: If a value is not finite.
        """
        x = x.astype(np.float64).ravel()  # in float32 BINS / top would overflow for a small top
        least, most = float(x.min()), float(x.max())
        largest = max(-least, most)
        if not np.isfinite(largest):
            raise ValueError("is not finite")
        self.least, self.most = min(self.least, least), max(self.most, most)
        if not self.top:
            self.top = largest
        while self.top < largest:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.top *= 2
        places = (np.abs(x) * (BINS / self.top if self.top else 0)).astype(np.int64)
        self.counts += np.bincount(np.minimum(places, BINS - 1), minlength=BINS)

    def range(self, method: str, percentile: float = PERCENTILE) -> Range:
        """The interval of x, cut at ±a.

        Args:
            method: How a is chosen. "max" takes max |x|. "percentile" takes what so many percent of the |x| do not
                exceed. "entropy" minimises the Kullback-Leibler divergence of the histogram that is cut at a from the
                same histogram in 128 levels.
            percentile: For "percentile".
        """
        largest = max(-self.least, self.most)
        if method == "percentile":
            total = np.cumsum(self.counts)
            bins = int(np.searchsorted(total, percentile / 100 * total[-1])) + 1
            largest = min(largest, bins * self.top / BINS)
        elif method == "entropy":
            largest = min(largest, smallest_divergence(self.counts.reshape(COARSE, -1).sum(1)) * self.top / COARSE)
        return max(self.least, -largest), min(self.most, largest)


def smallest_divergence(counts: Any) -> int:
    """How many of the bins to keep, with all others counted in the last one, for the method "entropy"."""
    counts = counts.copy()
    counts[0] = counts[1]  # zeros, of a ReLU for example, are exact whatever a is, and would outweigh the rest
    if not counts.any():
        return len(counts)
    used = int(np.flatnonzero(counts)[-1]) + 1
    beyond = counts.sum() - np.cumsum(counts)
    best, smallest = used, np.inf
    for bins in range(min(LEVELS, used), used + 1):
        kept = counts[:bins].astype(np.float64)
        if not kept[-1]:  # the last bin must not be empty, or the divergence is infinite
            continue
        level = np.arange(bins) * LEVELS // bins
        mean = np.bincount(level, kept) / np.maximum(np.bincount(level, kept > 0), 1)
        p, q = kept.copy(), np.where(kept > 0, mean[level], 0)
        p[-1] += beyond[bins - 1]
        some = p > 0
        p, q = p[some] / p.sum(), q[some] / q.sum()
        if (divergence := float((p * np.log(p / q)).sum())) < smallest:
            best, smallest = bins, divergence
    return best


def observe(model: Any, tensors: Sequence[str], calls: Iterable[Sequence[Tensor]]) -> dict[str, Histogram]:
    """Run a float model in ONNX Runtime, and collect histograms of some of its tensors.

    Args:
        model: An ``onnx.ModelProto``.
        tensors: Names of the tensors.
        calls: Inputs of each run, in the order of the model's.

    Returns:
        Histograms by name of the tensor.

    Raises:
        ValueError: If a tensor is not finite.
    """
    import onnx

    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    names = [port.name for port in observed.graph.input]
    there = {*names, *(port.name for port in observed.graph.output)}
    observed.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in tensors if name not in there
    )
    histograms = {name: Histogram() for name in tensors}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "observed.onnx"
        onnx.save(observed, path, save_as_external_data=True)
        session = onnxruntime.session(path)
        wanted = [name for name in tensors if name not in names]
        for inputs in calls:
            feed = {name: x.detach().contiguous().numpy() for name, x in zip(names, inputs)}
            for name, x in {**feed, **dict(zip(wanted, session.run(wanted, feed)))}.items():
                if name in histograms:
                    try:
                        histograms[name].add(x)
                    except ValueError as error:
                        reason = f"its tensor {name} {error} on a real prompt"
                        raise ValueError(f"the graph cannot be calibrated: {reason}") from error
    return histograms
