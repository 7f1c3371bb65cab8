"""What an engine is built with: options and shapes, named as trtexec names them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.manifest import BATCH, Manifest, Profile
from coalescer_fast.runtime.engines.tensorrt import TITLES

ENGINE = "model.plan"  # name of the file with the engine
HARDWARE = ("none", "ampere+", "sameComputeCapability")


@dataclass(frozen=True)
class Options:
    """Options of a build.

    Attributes:
        flavour: "tensorrt" or "tensorrt_rtx".
        compute_capabilities: GPUs to build for, such as 80. Of TensorRT-RTX only.
        hardware: GPUs to run on beside the one that it is built on, of `HARDWARE`. Of TensorRT only.
        version_compatible: Run with later versions of the same major version. Of TensorRT only.
        strip_weights: Leave the weights out of the engine.
        timing_cache: File with the timings of kernels, to read and to write.

    Raises:
        ValueError: For an option that the flavour does not have.
    """

    flavour: str = "tensorrt"
    compute_capabilities: tuple[int, ...] = ()
    hardware: str = "none"
    version_compatible: bool = False
    strip_weights: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        rtx, title = self.flavour == "tensorrt_rtx", TITLES[self.flavour]
        given = {
            "--computeCapabilities": bool(self.compute_capabilities) and not rtx,
            "--hardwareCompatibilityLevel": self.hardware != "none" and rtx,
            "--versionCompatible": self.version_compatible and rtx,
        }
        for word, wrong in given.items():
            if wrong:
                other = "tensorrt" if rtx else "tensorrt_rtx"
                raise ValueError(f"{word} is no option of {title}: leave it out, or take --flavour {other}")

    def arguments(self) -> list[str]:
        """Command-line arguments for these options, without the flavour."""
        words = []
        if self.compute_capabilities:
            words.append("--computeCapabilities=" + ",".join(map(str, self.compute_capabilities)))
        words += [f"--hardwareCompatibilityLevel={self.hardware}"] if self.hardware != "none" else []
        words += ["--versionCompatible"] if self.version_compatible else []
        words += ["--stripWeights"] if self.strip_weights else []
        words += [f"--timingCacheFile={self.timing_cache}"] if self.timing_cache else []
        return words


def profile(m: Manifest, least: str | None = None, best: str | None = None, most: str | None = None) -> Profile:
    """Smallest, best and largest shape of each input.

    Args:
        m: The manifest of the ONNX artefact.
        least: Smallest shapes, such as "noise:1x16x8x8,description:1x128". An input that is left out has its exported
            shape.
        best: Best shapes.
        most: Largest shapes.

    Raises:
        ValueError: For shapes that the graph does not take.
    """
    asked = []
    for word, text, batch in zip(("--minShapes", "--optShapes", "--maxShapes"), (least, best, most), m.batch):
        shapes = {p.name: tuple(batch if size == BATCH else int(size) for size in p.shape) for p in m.inputs}
        asked.append(shapes | _parse(word, text, shapes))
        if len(sizes := {shape[0] for shape in asked[-1].values()}) > 1:
            several = ", ".join(map(str, sorted(sizes)))
            fix = f"give every one of {', '.join(shapes)} the same number"
            raise ValueError(f"{word} has {several} pictures for several inputs: {fix}")
    for p in m.inputs:
        a, b, c = (shapes[p.name] for shapes in asked)
        fits = all(len(x) == len(p.shape) and all(e in (BATCH, n) for e, n in zip(p.shape, x)) for x in (a, b, c))
        if not fits or not m.batch[0] <= a[0] <= b[0] <= c[0] <= m.batch[2]:
            takes = "x".join(f"[{m.batch[0]} to {m.batch[2]}]" if size == BATCH else str(size) for size in p.shape)
            given = ", ".join("x".join(map(str, x)) for x in (a, b, c))
            fix = "give some within that, in this order"
            raise ValueError(f"the shapes of {p.name} are {given} where the graph takes {takes}: {fix}")
    return {p.name: (asked[0][p.name], asked[1][p.name], asked[2][p.name]) for p in m.inputs}


def _parse(word: str, text: str | None, inputs: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the input. Raises ValueError for another form, or an unknown name."""
    shapes = {}
    for part in text.split(",") if text else ():
        name, _, shape = part.strip().rpartition(":")
        if name not in inputs or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
            raise ValueError(f"{word} has {part!r}; expected input:1x2x3 for inputs of {', '.join(inputs)}")
        shapes[name] = tuple(map(int, shape.split("x")))
    return shapes


def trtexec_command(found: Artefact, out: Path, options: Options, shapes: Profile) -> str:
    """The command line of trtexec, or of tensorrt_rtx, that builds the same engine."""
    rtx = options.flavour == "tensorrt_rtx"
    words = ["tensorrt_rtx" if rtx else "trtexec", f"--onnx={found.graph}", f"--saveEngine={out / ENGINE}"]
    for i, word in enumerate(("minShapes", "optShapes", "maxShapes")):
        words.append(f"--{word}=" + ",".join(f"{name}:{'x'.join(map(str, each[i]))}" for name, each in shapes.items()))
    words += [] if rtx else ["--stronglyTyped"]
    words += ["--noTF32", "--profilingVerbosity=detailed", "--skipInference", *options.arguments()]
    return shlex.join(words)
