"""The manifest of an exported artefact: what its graph computes, what it was made from, and the hash of every file.

A manifest is the file ``manifest.json`` in the artefact's folder. `Manifest` and the dataclasses it is made of are its
schema: `Manifest.to_json` writes them and `Manifest.from_json` reads them, checking every type and range. The file ends
with the SHA-256 of the rest of it, so that a manifest that was edited by hand is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

from ...scheduler import CoalescerScheduler
from ...schema import OMITTED, FileName, Rule, Sha256, between, one_of
from . import sealed

FORMAT = 1
MANIFEST = "manifest.json"  # name of the file
TOOL = "coalescer-export"
KINDS = ("unet", "decoder", "generator")
ENGINES = ("onnx", "tensorrt", "tensorrt_rtx")
BATCH = "batch"  # stands for the batch size in the shape of a `Port`

Size = Annotated[int, between(1, 2**31 - 1)]
Count = Annotated[int, between(0, 2**63 - 1)]
Extent = Annotated[int | str, Rule(lambda n: n == BATCH if isinstance(n, str) else 0 < n < 2**31, "a size or batch")]
Word = Annotated[str, Rule(lambda text: 0 < len(text) <= 10_000, "1 to 10,000 characters")]
Capability = Annotated[str, Rule(lambda text: bool(re.fullmatch(r"\d{1,2}\.\d", text)), "one such as 8.6")]
Batches = Annotated[tuple[Size, Size, Size], Rule(lambda b: b[0] <= b[1] <= b[2], "three numbers from small to large")]
Shape = tuple[Size, ...]
# of each input: its smallest, best and largest shape
Profile = dict[str, tuple[Shape, Shape, Shape]]
# named numbers; "inf" and "nan" are text, because JSON has neither
Figures = dict[str, int | float | str]


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Attributes:
        name: Its name in the graph.
        dtype: As torch spells it, such as "float32".
        shape: The first extent is "batch", for the number of pictures.
    """

    name: Word
    dtype: Annotated[str, one_of("float32", "float16", "bfloat16", "int64", "int32", "bool")]
    shape: tuple[Extent, ...]


@dataclass(frozen=True)
class Schedule:
    """The steps that a generator takes from noise to picture, as in `CoalescerScheduler`.

    Attributes:
        etas: Step sizes.
        modes: "raw" or "unit", one a step.
        eps: Smallest length that a direction is divided by.
        guided: Indices of the steps that guidance applies to.
        guidance_scale: Guidance scale, 1 for none.
    """

    etas: tuple[float, ...]
    modes: tuple[Annotated[str, one_of("raw", "unit")], ...]
    eps: Annotated[float, between(0, 1)]
    guided: tuple[int, ...]
    guidance_scale: float

    @classmethod
    def of(cls, scheduler: CoalescerScheduler, guidance_scale: float) -> Schedule:
        """The schedule of a scheduler whose steps are set."""
        guided = tuple(i for i in range(len(scheduler.etas)) if scheduler.is_guided(i)) if guidance_scale != 1 else ()
        return cls(tuple(scheduler.etas), tuple(scheduler.modes), scheduler.config.eps, guided, float(guidance_scale))

    def __str__(self) -> str:
        steps = ", ".join(f"{eta:g} {mode}" for eta, mode in zip(self.etas, self.modes))
        where = f" in {len(self.guided)} of them" if self.guided else ""
        count = f"{len(self.etas)} step{'s' * (len(self.etas) != 1)}"
        return f"{count} ({steps}) with guidance {self.guidance_scale:g}{where}"


@dataclass(frozen=True)
class File:
    """Size and hash of a file of the artefact.

    Attributes:
        bytes: Its size.
        sha256: Its hash.
    """

    bytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class EngineBuild:
    """How a TensorRT engine was built, and where it can run.

    Attributes:
        version: Version of TensorRT or TensorRT-RTX that built it.
        compute_capabilities: Compute capabilities of the GPUs that it runs on, such as "8.6".
        gpu: Name of the GPU model, if it runs on that model alone.
        profile: Smallest, best and largest shape of each input.
        source: Hashes of the files of the ONNX artefact that it was built from, by name.
    """

    version: Word
    compute_capabilities: tuple[Capability, ...]
    gpu: Word | None
    profile: Profile
    source: dict[FileName, Sha256]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How an int8 graph was quantized.

    Attributes:
        method: How ranges were cut, such as "percentile 99.999".
        prompts: Number of prompts in the calibration.
        kept: Layers, or patterns, that were asked to stay in float, separated by spaces.
        unfit: Layers that had to stay in float, each with the reason.
        source: Hash of the float graph.
    """

    method: Word
    prompts: Count
    kept: str
    unfit: dict[str, str] = field(default_factory=dict)
    source: Sha256


@dataclass(frozen=True)
class Flags:
    """Options that decided the result, beside those in the other fields of a manifest. The first three are trtexec's.

    Attributes:
        hardwareCompatibilityLevel: GPUs that an engine runs on beside the one that built it.
        versionCompatible: Whether an engine runs with later versions of the same major version.
        stripWeights: Name of the ONNX file with the weights, if the engine has none; else "".
        int8: How an int8 graph was quantized.
    """

    hardwareCompatibilityLevel: Annotated[str, one_of("none", "ampere+", "sameComputeCapability")] | None = field(
        default=None, metadata=OMITTED
    )
    versionCompatible: bool | None = field(default=None, metadata=OMITTED)
    stripWeights: str | None = field(default=None, metadata=OMITTED)
    int8: Quantization | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class Measured:
    """What was measured when the artefact was made. Nothing reads these figures but people.

    Attributes:
        runtime: What ran the graph.
        pictures: Number of pictures.
        error: Figures of the comparison with the float32 reference.
        speed: Milliseconds, and the setting that they were measured in.
    """

    runtime: str | None = field(default=None, metadata=OMITTED)
    pictures: Count | None = field(default=None, metadata=OMITTED)
    error: Figures | None = field(default=None, metadata=OMITTED)
    speed: Figures | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class Manifest:
    """What an artefact is.

    Attributes:
        kind: "unet", "decoder" or "generator".
        engine: What runs the graph: "onnx" (ONNX Runtime), "tensorrt" or "tensorrt_rtx".
        target: What the graph was written for, "cpu" or "tensorrt".
        precision: "fp32", "fp16" or "int8".
        recipe: Which part is computed in which dtype, in words.
        graph: Name of the file that the engine opens.
        model: Name of the model, as given to ``from_pretrained``.
        weights: `hashes.network_sha256` of each network in the graph.
        inputs: Inputs of the graph, in order.
        outputs: Outputs of the graph, in order.
        batch: Smallest, best and largest number of pictures in one run.
        opset: ONNX opset of the graph.
        command: Arguments of ``coalescer-export`` that make the artefact again, without ``-o``.
        schedule: Steps of a generator.
        calibration: Hash of the ranges of an int8 graph.
        tensorrt: How an engine was built.
        flags: Further options that decided the result.
        measured: Figures.
        packages: Versions of the packages that made it, by name.
        files: Size and hash of every file; `writing.write` fills this in.
        format: Version of this schema.
    """

    kind: Annotated[str, one_of(*KINDS)]
    engine: Annotated[str, one_of(*ENGINES)]
    target: Annotated[str, one_of("cpu", "tensorrt")]
    precision: Annotated[str, one_of("fp32", "fp16", "int8")]
    recipe: str
    graph: FileName
    model: Word
    weights: dict[str, Sha256]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    batch: Batches
    opset: Annotated[int, between(1, 1000)] | None
    command: tuple[str, ...]
    schedule: Schedule | None = None
    calibration: Sha256 | None = None
    tensorrt: EngineBuild | None = None
    flags: Flags = field(default_factory=Flags)
    measured: Measured = field(default_factory=Measured)
    packages: dict[str, str] = field(default_factory=dict)
    files: dict[FileName, File] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return sealed.dumps(self, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the text of a ``manifest.json``.

        Raises:
            ValueError: If `to_json` did not write this text. The message says what is wrong, but not in which file.
        """
        try:
            content = sealed.parse(text)
        except ValueError as error:
            raise ValueError(f"is damaged ({error})") from error
        if not isinstance(content, dict) or "format" not in content:
            raise ValueError("is damaged (it says no format)")
        if content["format"] != FORMAT:
            raise ValueError(f"has format {content['format']!r:.40} where this coalescer_fast reads format {FORMAT}")
        content = sealed.unseal(content, cls)
        try:
            found = sealed.build(content, cls)
            found._check()
        except ValueError as error:
            raise ValueError(f"is damaged ({' '.join(str(error).split())})") from error
        return found

    def _check(self) -> None:
        """Raise ValueError if two fields contradict each other."""
        for holds, sentence in (*self._file_rules(), *self._graph_rules(), *self._schedule_rules()):
            if not holds:
                raise ValueError(sentence)

    def _file_rules(self) -> list[tuple[bool, str]]:
        needed = [self.graph, *([self.flags.stripWeights] if self.tensorrt and self.flags.stripWeights else [])]
        return [
            (MANIFEST not in self.files, f"files lists {MANIFEST}, which cannot vouch for itself"),
            *[(name in self.files, f"{name} is not among its files") for name in needed],
        ]

    def _graph_rules(self) -> list[tuple[bool, str]]:
        # networks in the graph, least number of inputs, number of outputs
        networks, inputs, outputs = {
            "unet": ({"unet"}, 2, 2),
            "decoder": ({"decoder"}, 1, 1),
            "generator": ({"unet", "decoder"}, 2, 1),
        }[self.kind]
        ports = (*self.inputs, *self.outputs)
        names = {port.name for port in ports}
        kind, is_onnx = f"it is a {self.kind}", self.engine == "onnx"
        rules = [
            (set(self.weights) == networks, f"weights is of {', '.join(self.weights) or 'nothing'}; {kind}"),
            (len(self.inputs) >= inputs, f"inputs has {len(self.inputs)}; {kind} and takes {inputs} or more"),
            (len(self.outputs) == outputs, f"outputs has {len(self.outputs)}; {kind} and gives {outputs}"),
            (len(names) == len(ports), "an input or output is there twice"),
            (all(port.shape[:1] == (BATCH,) for port in ports), "a shape does not begin with the batch"),
            (
                is_onnx == (self.tensorrt is None),
                f"tensorrt is {_presence(self.tensorrt)}; its engine is {self.engine}",
            ),
            (not is_onnx or self.opset is not None, "opset is missing"),
        ]
        if self.tensorrt is not None:
            known = set(self.tensorrt.profile) <= {port.name for port in self.inputs}
            rules.append((known, "tensorrt.profile is not of its inputs"))
        return rules

    def _schedule_rules(self) -> list[tuple[bool, str]]:
        made = self.schedule
        is_generator = self.kind == "generator"
        rules = [(is_generator == (made is not None), f"schedule is {_presence(made)}; it is a {self.kind}")]
        if made is not None:
            steps = len(made.etas)
            rules.append((0 < steps == len(made.modes), f"schedule has {steps} etas and {len(made.modes)} modes"))
            rules.append((set(made.guided) <= set(range(steps)), "schedule.guided names a step that is not there"))
        return rules


def _presence(value: object) -> str:
    return "missing" if value is None else "there"
