"""What the tensors of a graph range over on the two-step trajectory, as a file that can be kept, read and reused."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coalescer_fast.parity import descriptions
from coalescer_fast.runtime.engines import onnxruntime
from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.manifest import Manifest

Range = tuple[float, float]
FILE = "ranges.json"
FORMAT = 1
METHODS = ("max", "percentile", "entropy")
PERCENTILE = 99.999
PROMPTS = 64  # to calibrate on
BINS = 8192
COARSE, LEVELS = 2048, 128  # of entropy: bins, and what is left of them


@dataclass(frozen=True)
class Ranges:
    """graph: `graph_sha256` of what was calibrated; method: "max", "percentile 99.999" or "entropy"; prompts, seed: the descriptions, and
    what their noise was drawn with; layers: layer -> {"input": (least, most), "output": ...}."""

    graph: str
    method: str
    seed: int
    prompts: tuple[str, ...]
    layers: dict[str, dict[str, Range]]
    format: int = FORMAT

    def to_json(self) -> str:
        """With ``sha256``, of the rest."""
        content = json.loads(json.dumps(asdict(self)))
        return json.dumps({**content, "sha256": _digest(content)}, indent=1, ensure_ascii=False) + "\n"

    @property
    def sha256(self) -> str:
        return _digest(json.loads(json.dumps(asdict(self))))

    def check_graph(self, source: Artefact, path: Path | str) -> None:
        """Raise ValueError unless it is this artefact's graph that was calibrated."""
        if self.graph != (mine := graph_sha256(source.manifest)):
            raise ValueError(
                f"{path} holds the ranges of another graph ({self.graph[:12]}) than that of {source.folder} ({mine[:12]}): "
                "leave --ranges away to calibrate this one"
            )


def read_ranges(path: Path) -> Ranges:
    """Raises ValueError for a file that `Ranges.to_json` has not given."""
    text = path.read_text("utf-8", errors="replace")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): leave --ranges away to calibrate anew") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} holds no ranges in format {FORMAT}: give the {FILE} of an int8 artefact")
    if content.pop("sha256", None) != _digest(content) or set(content) != {each.name for each in fields(Ranges)}:
        raise ValueError(f"{path} was changed after it was written: leave --ranges away to calibrate anew")
    layers = {layer: {which: tuple(ends) for which, ends in each.items()} for layer, each in content["layers"].items()}
    return Ranges(**{**content, "prompts": tuple(content["prompts"]), "layers": layers})


def graph_sha256(manifest: Manifest) -> str:
    """The hash of the graph's file, or where its weights lie beside it, of both hashes."""
    hashes = [file.sha256 for name, file in sorted(manifest.files.items()) if name.startswith(manifest.graph)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def held_out(pipe: Any, seen: Iterable[str], number: int, seed: int) -> list[str]:
    """So many names that the model was trained on, in an order that depends on the seed alone, none of them among those ``seen``."""
    known = pipe.description_encoder.known_names
    unseen = set(known) - set(seen)
    order = descriptions(pipe, len(known), torch.Generator().manual_seed(seed))
    names = [name for name in order if name in unseen][:number]
    if len(names) < number:
        reason = f"of the model's {len(known)} names {len(names)} are not calibrated on, and {number} are needed to measure it"
        raise ValueError(f"{reason}: calibrate on fewer (--calibration-prompts)")
    return names


def prompts_for(pipe: Any, found: Artefact, number: int, seed: int) -> int | list[str]:
    """What to measure an artefact on, as of `accuracy.compare`: never what it was calibrated on, as far as that is known."""
    path = found.folder / FILE
    return held_out(pipe, read_ranges(path).prompts, number, seed) if path.is_file() else number


class Histogram:
    """Of |x|, in bins over [0, top], where top doubles as larger values come; least, most: of x."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.top = 0.0
        self.least, self.most = np.inf, -np.inf

    def add(self, x: Any) -> None:
        x = x.astype(np.float64).ravel()  # in float32 BINS / top would be infinite for a small top
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
        """The interval of x, cut at plus and minus a, where a is

        max: max |x|; percentile: what so many percent of the |x| do not exceed; entropy: what makes the divergence (Kullback-Leibler) of
        the histogram cut at a from the same in 128 levels smallest.
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
    """How many of the bins to keep, the rest falling into the last one: see `Histogram.range`."""
    counts = counts.copy()
    counts[0] = counts[1]  # zeros, such as ReLU's, are exact whatever a is, and would outweigh all else
    if not counts.any():
        return len(counts)
    used = int(np.flatnonzero(counts)[-1]) + 1
    beyond = counts.sum() - np.cumsum(counts)
    best, smallest = used, np.inf
    for bins in range(min(LEVELS, used), used + 1):
        kept = counts[:bins].astype(np.float64)
        if not kept[-1]:  # no place for the rest, whose divergence would be infinite
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
    """Histograms of a float model's tensors, which it computes of the ``calls``' inputs, in ONNX Runtime."""
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
                        raise ValueError(
                            f"the graph cannot be calibrated: its tensor {name} {error} on a real prompt"
                        ) from error
    return histograms


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
