"""An artefact in ONNX becomes one with an engine of TensorRT or TensorRT-RTX, and is measured where it can run."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from coalescer_fast import files
from coalescer_fast.runtime.engines import artefact, tensorrt, writing
from coalescer_fast.runtime.engines.artefact import Artefact
from coalescer_fast.runtime.engines.manifest import TOOL, EngineBuild, Flags, Manifest, Measured, Profile
from coalescer_fast.runtime.engines.tensorrt import TITLES

from .layers import FusedLayer, layers_of_inspector, layers_of_log, write_layers
from .options import ENGINE, Options
from .progress import progress_monitor

WEIGHTS = "weights.onnx"  # name of the file with the weights of an engine that has none
DEVICE = "cuda"  # where an engine runs
# Least opset for each precision. Before 21 there is no GroupNormalization but its pieces, whose statistics would be in
# half precision.
OPSETS = {"fp32": 18, "fp16": 21, "int8": 21}


def check_source(found: Artefact) -> None:
    """Raise ValueError unless an engine can be built from the artefact."""
    m = found.manifest
    if m.engine != "onnx":
        source = f", from {m.command[1]}" if m.command[:1] == ("engine",) and len(m.command) > 1 else ""
        fix = f"build one of the artefact in ONNX that it was made of{source}"
        raise ValueError(f"{found.folder} is an engine already: {fix}")
    again = shlex.join([TOOL, *_with_option(m.command, "--target", "tensorrt"), "-o", "DIR"])
    if m.target != "tensorrt":
        raise ValueError(f"{found.folder} was written for {m.target}, not for TensorRT: export it again with {again}")
    if m.opset is None or m.opset < OPSETS[m.precision]:
        needs = f"{OPSETS[m.precision]} or later for {m.precision}"
        reason = f"{found.folder} has opset {m.opset} where TensorRT is given {needs}"
        raise ValueError(f"{reason}: export it again with {again}")


def _with_option(command: tuple[str, ...], word: str, value: str) -> list[str]:
    """The command with an option set to a value."""
    words = list(command)
    if word in words:
        words[words.index(word) + 1] = value
    else:
        words += [word, value]
    return words


def build_engine(
    found: Artefact, folder: Path, shapes: Profile, options: Options, command: tuple[str, ...], bar: Any = None
) -> Artefact:
    """Build an engine.

    Args:
        found: The artefact in ONNX.
        folder: An empty folder, from `writing.creating`.
        shapes: Smallest, best and largest shape of each input, from `options.profile`.
        options: The other options.
        command: Arguments of ``coalescer-export``, for the manifest.
        bar: A bar of tqdm that shows the builder's progress.

    Returns:
        The artefact with the engine.

    Raises:
        ValueError: If the library is missing or cannot build the engine.
    """
    from ..onnx.exporter import PACKAGES, packages

    check_source(found)
    rtx, title = options.flavour == "tensorrt_rtx", TITLES[options.flavour]
    here = tensorrt.gpu()
    if here is None and not rtx:
        reason = f"{title} builds an engine on its GPU, and there is no CUDA device"
        raise ValueError(f"{reason}: build it there, or take --flavour tensorrt_rtx")
    if here is None and options.strip_weights:
        reason = f"{title} builds an engine without weights on a GPU only, and there is no CUDA device"
        raise ValueError(f"{reason}: leave --stripWeights out")
    trt = tensorrt.load(options.flavour)
    layers: list[FusedLayer] = []
    log = tensorrt.logger(trt, lambda text: layers.extend(layers_of_log(text)))
    engine = _serialized(trt, log, found, shapes, options, bar)
    (folder / ENGINE).write_bytes(engine)
    write_layers(folder, layers or layers_of_inspector(trt, log, engine))
    if options.strip_weights:
        for path in found.folder.glob(f"{found.manifest.graph}*"):
            # weights in a file of their own keep its name, by which the graph finds them
            shutil.copy(path, folder / (WEIGHTS if path == found.graph else path.name))
    m = found.manifest
    name, capability = here if here is not None and not rtx else (None, None)
    capabilities = (capability,) if capability else tuple(map(dotted, options.compute_capabilities))
    built = replace(
        m,
        engine=options.flavour,
        graph=ENGINE,
        batch=next((a[0], b[0], c[0]) for a, b, c in shapes.values()),
        command=command,
        flags=Flags(
            hardwareCompatibilityLevel=options.hardware,
            versionCompatible=options.version_compatible,
            stripWeights=WEIGHTS if options.strip_weights else "",
        ),
        tensorrt=EngineBuild(
            version=trt.__version__,
            compute_capabilities=capabilities,
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
    """Measure an engine, and note the figures in its manifest.

    It is compared with the float32 reference. In int8 it is also compared in speed with an engine of the artefact that
    was quantized, which is built for that.

    Args:
        built: The engine, which `build_engine` made from the other arguments.
        found: The artefact in ONNX.
        shapes: As of `build_engine`.
        options: As of `build_engine`.
        force: Accept any figures.
        bar: A bar of tqdm.

    Returns:
        What was not measured and why, or "".

    Raises:
        ValueError: If the figures are beyond `accuracy.BUDGETS`, or if int8 is no faster.
    """
    m = built.manifest
    if reason := tensorrt.refusal(m, tensorrt.engine_build(m).version, tensorrt.gpu()):
        return f"not measured, it {reason}"
    from coalescer_fast.pipeline import CoalescerPipeline

    from ..measure import accuracy, reference, speed

    pipe = CoalescerPipeline.from_pretrained(m.model)
    built.check_weights(pipe)
    run = tensorrt.open_artefact(built)
    on_cpu = accuracy.on_cpu(run, DEVICE)
    result = accuracy.compare(built, on_cpu, pipe, sum(reference.batches(m)), runtime=m.engine)
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
                before = build_engine(source, Path(folder), shapes, options, (), bar)
                runs = {"source": tensorrt.open_artefact(before), "int8": run}
        times = speed.measure_speed(pipe, m, runs, DEVICE)
    if "source" in runs and not force:
        speed.require_faster(f"the engine of the {m.kind}", times, source.manifest.precision)
    name, _ = tensorrt.gpu() or ("", "")
    measured = replace(accuracy.to_measured(result), speed={**times.figures(), "gpu": name})
    writing.write(built.folder, replace(m, measured=measured))
    return missing


def source_of(found: Artefact) -> Artefact:
    """The float artefact that an int8 artefact was made from. Raises ValueError if it is not there any more."""
    from ..quantize.ranges import graph_sha256

    source = artefact.read(found.manifest.command[1])
    quantization = found.manifest.flags.int8
    if quantization is None or graph_sha256(source.manifest) != quantization.source:
        raise ValueError(f"{source.folder} has another graph by now")
    return source


def dotted(capability: int) -> str:
    """A compute capability as torch writes it: "8.0" for 80."""
    return "{}.{}".format(*divmod(capability, 10))


def _serialized(trt: Any, log: Any, found: Artefact, shapes: Profile, options: Options, bar: Any) -> Any:
    """The engine as bytes. Raises ValueError as `build_engine` does, and what interrupted the build."""
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    which = f"{TITLES[options.flavour]} {trt.__version__}"
    if not parser.parse_from_file(str(found.graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reason = "; ".join(" ".join(str(error.desc()).split()) for error in errors)[:600] or log.reason()
        raise ValueError(f"{which} does not take {found.graph} ({reason}): {_fix(found.manifest, found.folder)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # what the recipe calls float32 is computed in float32
    _set_flags(trt, config, options)
    cache = _timing_cache(config, options)
    if found.manifest.batch[0] != found.manifest.batch[2]:
        ranges = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            ranges.set_shape(name, least, best, most)
        config.add_optimization_profile(ranges)
    config.progress_monitor = monitor = progress_monitor(trt, bar)
    engine = builder.build_serialized_network(network, config)
    if engine is not None and cache is not None and options.timing_cache is not None:
        _write_timing_cache(options.timing_cache, bytes(config.get_timing_cache().serialize()))
    if monitor.stopped is not None:
        raise monitor.stopped
    if engine is None:
        raise ValueError(f"{which} cannot build {found.graph} ({log.reason()}): {_fix(found.manifest, found.folder)}")
    return engine


def _set_flags(trt: Any, config: Any, options: Options) -> None:
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for i, each in enumerate(options.compute_capabilities):
            known = getattr(trt.ComputeCapability, f"SM{each}", None)
            if known is None or not config.set_compute_capability(known, i):
                members = sorted(int(n[2:]) for n in trt.ComputeCapability.__members__ if n.startswith("SM"))
                able = ", ".join(map(str, members))
                raise ValueError(f"TensorRT-RTX {trt.__version__} has no compute capability {each}: use some of {able}")
    if options.hardware == "ampere+":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif options.hardware == "sameComputeCapability":
        level = getattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY", None)
        if level is None:
            option = "--hardwareCompatibilityLevel sameComputeCapability"
            raise ValueError(f"TensorRT {trt.__version__} has no {option}: use none or ampere+")
        config.hardware_compatibility_level = level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT)


def _timing_cache(config: Any, options: Options) -> Any:
    """The timing cache of a build, to be kept alive until its end, or None.

    Raises:
        ValueError: If the file is not a timing cache that `_write_timing_cache` wrote, since it will be replaced.
    """
    path = options.timing_cache
    if path is None:
        return None
    files.check_writable(path)
    stored = path.read_bytes() if path.exists() else b""
    hash_file = _hash_file(path)
    known = hash_file.read_bytes().partition(b" ")[0] if hash_file.is_file() else b""
    if stored and known != hashlib.sha256(stored).hexdigest().encode():
        reason = f"{path} was not written by {TOOL}, or was changed since: {hash_file.name} does not have its hash"
        raise ValueError(f"{reason}, name another file")
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, False):
        raise ValueError(f"{path} is no timing cache of this version and GPU: name another file, or delete it")
    return cache


def _write_timing_cache(path: Path, content: bytes) -> None:
    files.write_bytes(path, content)
    files.write_text(_hash_file(path), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")


def _hash_file(cache: Path) -> Path:
    """The file beside a timing cache with its hash, because TensorRT-RTX accepts any bytes as a cache."""
    return cache.with_name(f"{cache.name}.sha256")


def _fix(m: Manifest, folder: Path) -> str:
    """What to do when the library refuses a graph, which is nearly always for its types and operators."""
    again = shlex.join([TOOL, *m.command, "-o", str(folder), "--force"])
    typed = "an engine is strongly typed and takes each type as the graph has it"
    return f"{typed}; another --precision may be taken, by {again}"
