"""From an artefact in ONNX to one with an engine of TensorRT or TensorRT-RTX."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coalescer_fast import files
from coalescer_fast.runtime.engines import artefact, tensorrt, writing
from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.manifest import BATCH, TOOL, EngineBuild, Flags, Manifest, Measured, Quantization
from coalescer_fast.runtime.engines.tensorrt import TITLES

PLAN, LAYERS, WEIGHTS = "model.plan", "layers.json", "weights.onnx"
DEVICE = "cuda"  # that an engine runs on
HARDWARE = ("none", "ampere+", "sameComputeCapability")
# TensorRT has GroupNormalization from opset 21 on; before that it is pieces, whose statistics in half precision would be half
OPSETS = {"fp32": 18, "fp16": 21, "int8": 21}
# input -> its least, best and largest shape
Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
Layer = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """flavour: of `TITLES`; the rest in trtexec's words: compute_capabilities (80) are TensorRT-RTX's, hardware (of `HARDWARE`) and
    version_compatible TensorRT's."""

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


def check_source(found: Artefact) -> None:
    """Raise ValueError unless the artefact is one that TensorRT can be given."""
    m = found.manifest
    if m.engine != "onnx":
        source = f", from {m.command[1]}" if m.command[:1] == ("engine",) and len(m.command) > 1 else ""
        raise ValueError(
            f"{found.folder} is an engine already: build one of the artefact in ONNX that it was made of{source}"
        )
    again = shlex.join([TOOL, *_with(m.command, "--target", "tensorrt"), "-o", "DIR"])
    if m.target != "tensorrt":
        raise ValueError(f"{found.folder} was written for {m.target}, not for TensorRT: export it again with {again}")
    if m.opset is None or m.opset < OPSETS[m.precision]:
        needs = f"{OPSETS[m.precision]} or later for {m.precision}"
        raise ValueError(
            f"{found.folder} has opset {m.opset} where TensorRT is given {needs}: export it again with {again}"
        )


def _with(command: tuple[str, ...], word: str, value: str) -> list[str]:
    """The command with an option set."""
    words = list(command)
    if word in words:
        words[words.index(word) + 1] = value
    else:
        words += [word, value]
    return words


def profile(m: Manifest, least: str | None = None, best: str | None = None, most: str | None = None) -> Profile:
    """Of texts such as "noise:1x16x8x8,description:1x128" for some or all inputs; where nothing is said, the exported range.

    Raises: ValueError for shapes that the graph does not take.
    """
    asked = []
    for word, text, batch in zip(("--minShapes", "--optShapes", "--maxShapes"), (least, best, most), m.batch):
        shapes = {p.name: tuple(batch if size == BATCH else int(size) for size in p.shape) for p in m.inputs}
        asked.append(shapes | _parse(word, text, shapes))
        if len(sizes := {shape[0] for shape in asked[-1].values()}) > 1:
            several = ", ".join(map(str, sorted(sizes)))
            raise ValueError(
                f"{word} has {several} pictures for several inputs: give every one of {', '.join(shapes)} the same number"
            )
    for p in m.inputs:
        a, b, c = (shapes[p.name] for shapes in asked)
        fits = all(len(x) == len(p.shape) and all(e in (BATCH, n) for e, n in zip(p.shape, x)) for x in (a, b, c))
        if not fits or not m.batch[0] <= a[0] <= b[0] <= c[0] <= m.batch[2]:
            takes = "x".join(f"[{m.batch[0]} to {m.batch[2]}]" if size == BATCH else str(size) for size in p.shape)
            given = ", ".join("x".join(map(str, x)) for x in (a, b, c))
            raise ValueError(
                f"the shapes of {p.name} are {given} where the graph takes {takes}: give some within that, in this order"
            )
    return {p.name: (asked[0][p.name], asked[1][p.name], asked[2][p.name]) for p in m.inputs}


def _parse(word: str, text: str | None, inputs: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for part in text.split(",") if text else ():
        name, _, shape = part.strip().rpartition(":")
        if name not in inputs or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
            raise ValueError(f"{word} has {part!r}; expected input:1x2x3 for inputs of {', '.join(inputs)}")
        shapes[name] = tuple(map(int, shape.split("x")))
    return shapes


def equivalent(found: Artefact, out: Path, options: Options, shapes: Profile) -> str:
    """What trtexec, or tensorrt_rtx, is given for the same plan."""
    rtx = options.flavour == "tensorrt_rtx"
    words = ["tensorrt_rtx" if rtx else "trtexec", f"--onnx={found.graph}", f"--saveEngine={out / PLAN}"]
    for i, word in enumerate(("minShapes", "optShapes", "maxShapes")):
        words.append(f"--{word}=" + ",".join(f"{name}:{'x'.join(map(str, each[i]))}" for name, each in shapes.items()))
    words += [] if rtx else ["--stronglyTyped"]
    words += ["--noTF32", "--profilingVerbosity=detailed", "--skipInference", *flag_words(options)]
    return shlex.join(words)


def flag_words(options: Options) -> list[str]:
    words = []
    if options.compute_capabilities:
        words.append("--computeCapabilities=" + ",".join(map(str, options.compute_capabilities)))
    words += [f"--hardwareCompatibilityLevel={options.hardware}"] if options.hardware != "none" else []
    words += ["--versionCompatible"] if options.version_compatible else []
    words += ["--stripWeights"] if options.strip_weights else []
    words += [f"--timingCacheFile={options.timing_cache}"] if options.timing_cache else []
    return words


def build(
    found: Artefact, folder: Path, shapes: Profile, options: Options, command: tuple[str, ...], bar: Any = None
) -> Artefact:
    """Build the plan of an artefact into an empty folder (of `writing.creating`). bar: of tqdm, shows the builder's progress.

    Raises: ValueError if there is no such library, or it cannot build that.
    """
    from ..onnx.exporter import PACKAGES, packages

    check_source(found)
    rtx, title = options.flavour == "tensorrt_rtx", TITLES[options.flavour]
    here = tensorrt.gpu()
    if here is None and not rtx:
        raise ValueError(
            f"{title} builds an engine on its GPU, and there is no CUDA device: build it there, or take --flavour tensorrt_rtx"
        )
    if here is None and options.strip_weights:
        raise ValueError(
            f"{title} builds an engine without weights on a GPU only, and there is no CUDA device: leave --stripWeights out"
        )
    trt = tensorrt.load(options.flavour)
    heard: list[Layer] = []
    log = tensorrt.logger(trt, lambda text: heard.extend(layers_of_log(text)))
    plan, monitor = _build(trt, log, found, shapes, options, bar)
    if monitor.stopped is not None:
        raise monitor.stopped
    if plan is None:
        raise ValueError(f"{title} {trt.__version__} cannot build {found.graph} ({log.reason()}): {_mend(found)}")
    (folder / PLAN).write_bytes(plan)
    layers = heard or _inspected(trt, log, plan)
    (folder / LAYERS).write_text(json.dumps(layers, indent=1) + "\n", "utf-8")
    if options.strip_weights:
        for path in found.folder.glob(f"{found.manifest.graph}*"):
            # external weights keep their name, by which the graph finds them
            shutil.copy(path, folder / (WEIGHTS if path == found.graph else path.name))
    m = found.manifest
    name, capability = here if here is not None and not rtx else (None, None)
    built = replace(
        m,
        engine=options.flavour,
        graph=PLAN,
        batch=next((a[0], b[0], c[0]) for a, b, c in shapes.values()),
        command=command,
        flags=Flags(
            hardwareCompatibilityLevel=options.hardware,
            versionCompatible=options.version_compatible,
            stripWeights=WEIGHTS if options.strip_weights else "",
        ),
        tensorrt=EngineBuild(
            version=trt.__version__,
            compute_capabilities=(capability,) if capability else tuple(map(dotted, options.compute_capabilities)),
            gpu=name,
            profile=shapes,
            source={name: file.sha256 for name, file in m.files.items()},
        ),
        measured=Measured(),
        packages=packages((*PACKAGES, options.flavour)),
    )
    return writing.write(folder, built)


def measure(
    built: Artefact, found: Artefact, shapes: Profile, options: Options, force: bool = False, bar: Any = None
) -> str:
    """Compare an engine, ``build`` of the rest, with the reference, in int8 its speed with that of an engine of what was quantised, too, and note
    the figures in its manifest. Returns what was not measured and why, or "".

    Raises: ValueError, unless ``force``, for figures beyond `accuracy.BUDGETS`, and for int8 that is no faster.
    """
    m = built.manifest
    if reason := tensorrt.refusal(m, tensorrt.engine_build(m).version, tensorrt.gpu()):
        return f"not measured, it {reason}"
    from coalescer_fast.pipeline import CoalescerPipeline

    from ..measure import accuracy

    pipe: Any = CoalescerPipeline.from_pretrained(m.model)
    built.check_weights(pipe)
    run = tensorrt.open_artefact(built)
    result = accuracy.compare(built, accuracy.on_cpu(run, DEVICE), pipe, sum(accuracy.batches(m)), runtime=m.engine)
    if not force:
        accuracy.require(result, f"the engine of the {m.kind}")
    runs, missing = {m.precision: run}, ""
    with tempfile.TemporaryDirectory() as folder:
        if m.precision == "int8":
            try:
                source = source_of(found)
            except ValueError as error:
                missing = f"not compared in speed with what was quantised: {error}"
            else:
                before = build(source, Path(folder), shapes, options, (), bar)
                runs = {"source": tensorrt.open_artefact(before), "int8": run}
        times = accuracy.speed(pipe, m, runs, DEVICE)
    if "source" in runs and not force:
        accuracy.require_faster(f"the engine of the {m.kind}", times, source.manifest.precision)
    speed = {**times, "gpu": (tensorrt.gpu() or ("", ""))[0]}
    writing.write(built.folder, replace(m, measured=replace(accuracy.to_measured(result), speed=speed)))
    return missing


def source_of(found: Artefact) -> Artefact:
    """What an artefact in int8 was made of. Raises ValueError if that is there no longer."""
    from ..quantize.ranges import graph_sha256

    source = artefact.read(found.manifest.command[1])
    if graph_sha256(source.manifest) != quantization(found.manifest).source:
        raise ValueError(f"{source.folder} has another graph by now")
    return source


def quantization(m: Manifest) -> Quantization:
    """How an int8 artefact was quantized."""
    assert m.flags.int8 is not None
    return m.flags.int8


def dotted(capability: int) -> str:
    """80 -> "8.0", as torch has it."""
    return "{}.{}".format(*divmod(capability, 10))


def _build(trt: Any, log: Any, found: Artefact, shapes: Profile, options: Options, bar: Any) -> tuple[Any, Any]:
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(found.graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = "; ".join(" ".join(str(error.desc()).split()) for error in errors)[:600] or log.reason()
        raise ValueError(
            f"{TITLES[options.flavour]} {trt.__version__} does not take {found.graph} ({said}): {_mend(found)}"
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 in the recipe is float32
    _set_flags(trt, config, options)
    cache = _timing_cache(config, options)
    if found.manifest.batch[0] != found.manifest.batch[2]:
        ranges = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            ranges.set_shape(name, least, best, most)
        config.add_optimization_profile(ranges)
    config.progress_monitor = monitor = progress(trt, bar)
    plan = builder.build_serialized_network(network, config)
    if plan is not None and cache is not None and options.timing_cache is not None:
        written = bytes(config.get_timing_cache().serialize())
        files.write_bytes(options.timing_cache, written)
        files.write_text(
            _vouching(options.timing_cache), f"{hashlib.sha256(written).hexdigest()}  {options.timing_cache.name}\n"
        )
    return plan, monitor


def _set_flags(trt: Any, config: Any, options: Options) -> None:
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for i, each in enumerate(options.compute_capabilities):
            known = getattr(trt.ComputeCapability, f"SM{each}", None)
            if known is None or not config.set_compute_capability(known, i):
                able = ", ".join(
                    map(str, sorted(int(n[2:]) for n in trt.ComputeCapability.__members__ if n.startswith("SM")))
                )
                raise ValueError(f"TensorRT-RTX {trt.__version__} has no compute capability {each}: use some of {able}")
    if options.hardware == "ampere+":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif options.hardware == "sameComputeCapability":
        level = getattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY", None)
        if level is None:
            raise ValueError(
                f"TensorRT {trt.__version__} has no --hardwareCompatibilityLevel sameComputeCapability: use none or ampere+"
            )
        config.hardware_compatibility_level = level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT)


def _timing_cache(config: Any, options: Options) -> Any:
    """Kept, for it has to outlive the build. It is written over in the end, so a file that is none of ours is refused now."""
    if options.timing_cache is None:
        return None
    files.check_writable(options.timing_cache)
    stored = options.timing_cache.read_bytes() if options.timing_cache.exists() else b""
    vouching = _vouching(options.timing_cache)
    known = vouching.read_bytes().partition(b" ")[0] if vouching.is_file() else b""
    if stored and known != hashlib.sha256(stored).hexdigest().encode():
        reason = f"{options.timing_cache} was not written by {TOOL}, or was changed since: {vouching.name} does not have its hash"
        raise ValueError(f"{reason}, name another file")
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, False):
        raise ValueError(
            f"{options.timing_cache} is no timing cache of this version and GPU: name another file, or delete it"
        )
    return cache


def _vouching(cache: Path) -> Path:
    """The file with the hash of a timing cache, by which it is known again; TensorRT-RTX takes any bytes for a cache."""
    return cache.with_name(f"{cache.name}.sha256")


def _mend(found: Artefact) -> str:
    """For a graph that a parser or builder refuses, which is nearly always a question of types and operators."""
    again = shlex.join([TOOL, *found.manifest.command, "-o", str(found.folder), "--force"])
    return f"an engine is strongly typed and takes each type as the graph has it; another --precision may be taken, by {again}"


def progress(trt: Any, bar: Any) -> Any:
    """An IProgressMonitor that moves the bar; ``stopped``: what ended the build early, an interrupt for instance."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.stopped: BaseException | None = None
            self.left: dict[str, int] = {}  # steps of phases that run

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.left[phase_name] = num_steps
            self._show(lambda: self._grow(phase_name, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.left[phase_name] = self.left.get(phase_name, 1) - 1
            self._show(lambda: bar.update())
            return self.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            left = max(self.left.pop(phase_name, 0), 0)
            self._show(lambda: bar.update(left))

        def _grow(self, phase: str, steps: int) -> None:
            bar.total = (bar.total or 0) + steps
            bar.set_description(phase[:40])

        def _show(self, change: Callable[[], object]) -> None:
            # an exception must not pass through the library
            try:
                if bar is not None:
                    change()
            except BaseException as error:
                self.stopped = error

    return Monitor()


def _inspected(trt: Any, log: Any, plan: Any) -> list[Layer]:
    """Of the engine inspector, which needs the GPU."""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        return []
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return [
        {
            "name": each["Name"],
            "type": each["LayerType"],
            "inputs": [t["Format/Datatype"] for t in each.get("Inputs", [])],
            "outputs": [t["Format/Datatype"] for t in each.get("Outputs", [])],
            "of": re.findall(r"\[ONNX Layer: (.+?)\]", each.get("Metadata", "")),
        }
        for each in json.loads(text)["Layers"]
        if isinstance(each, dict)
    ]


def layers_of_log(text: str) -> list[Layer]:
    """The fused layers that a message of the builder's tells of, one a line; in "of", what of the ONNX graph is in it."""
    layers = []
    for line in text.split("\n"):
        head, found, rest = line.partition(", Inputs: [")
        if found and (named := re.match(r"Name: (.+), LayerType: (\w+)$", head)):
            given, _, rest = rest.partition(", Outputs: [")
            outputs, _, rest = rest.partition(", TacticName: ")
            inputs, _, constants = given.partition(", Constants: [")
            ends = {"inputs": inputs, "constants": constants, "outputs": outputs}
            types = {end: re.findall(r"Datatype: (\w+)", part) for end, part in ends.items()}
            layers.append(
                {"name": named[1], "type": named[2], **types, "of": re.findall(r"\[ONNX Layer: (.+?)\]", rest)}
            )
    return layers


def counts(layers: list[Layer]) -> list[tuple[str, str]]:
    """For each type of layer, how many, and how many for each way from types to types."""
    kinds: dict[str, Counter[str]] = {}
    for each in layers:
        ends = [" ".join(dict.fromkeys(each[end])) or "nothing" for end in ("inputs", "outputs")]
        kinds.setdefault(each["type"], Counter()).update([f"{ends[0]} to {ends[1]}"])
    return [
        (kind, f"{sum(ways.values())}: " + ", ".join(f"{way} {n}" for way, n in ways.most_common()))
        for kind, ways in kinds.items()
    ]
