"""What runs a pipeline or a UNet: plain PyTorch, `coalescer_fast.accelerate`, and the other engines that are installed.

Every engine is prepared by a function that returns the results of a call: the pictures of a pipeline, or the output of
a UNet. All run the same weights, in one process.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration import FLOATS, RUNTIMES, accelerate, multiplies_bfloat16, native_dtype, unavailable
from ..dtypes import DTYPES
from ..folders import public_name
from ..parity import Budget, descriptions
from ..pipeline import CoalescerPipeline
from ..runtime.engines import compiled, onnxruntime, openvino
from ..runtime.engines.per_shape import PerShapeRuntime, Prepare
from ..runtime.native.module import runtime_of
from . import calls
from .errors import relative_errors
from .peers import Missing

EAGER, OURS = "eager", "coalescer_fast"
NAMES = (OURS, EAGER, "onnxruntime", "openvino", "compile")  # in the order in which they are prepared
PREPARE: Mapping[str, Prepare] = {
    "compile": compiled.prepare,
    "onnxruntime": onnxruntime.prepare,
    "openvino": openvino.prepare,
}
CHECKED = 4  # calls whose results are compared with the reference's
TIMESTEPS = (999, 499, 19, 749)  # of the checked calls of a UNet; the first is the measured one
COPIES = 2.5  # memory that an engine may take while it is prepared, in float32 copies of the weights
PSNR_CAP = 200.0  # dB, of pictures that are equal

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Engine:
    """A way to compute the same.

    Attributes:
        name: one of `NAMES`.
        dtype: of its networks.
        prepare: (folder for its files) -> one call after the other, of which the first is measured. Raises Missing.
    """

    name: str
    dtype: str
    prepare: Callable[[Path], Sequence[Call]]


@dataclass(frozen=True)
class Agreement:
    """How far results are from the reference.

    Attributes:
        figures: by name.
        wrong: what is beyond the limits of `verify`, in words, or "".
    """

    figures: dict[str, float]
    wrong: str


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        title: in a line.
        facts: for JSON.
        engines: the first of which is the reference.
        compare: (results, the reference's, dtype) -> how far they are from each other.
    """

    title: str
    facts: dict[str, Any]
    engines: Sequence[Engine]
    compare: Callable[[Sequence[Tensor], Sequence[Tensor], str], Agreement]


def dtypes_of(name: str) -> list[str]:
    """The dtypes in which an engine is measured on a CPU, the one that is fastest here first."""
    known = list(FLOATS if name == EAGER else RUNTIMES["cpu" if name == OURS else name].dtypes["cpu"])
    first = native_dtype("cpu", known)
    return [first, *(dtype for dtype in known if dtype != first)]


def check_bfloat16(dtype: str) -> None:
    """Raise Missing for bfloat16 on a processor that does not multiply it."""
    if dtype == "bfloat16" and not multiplies_bfloat16("cpu"):
        raise Missing("this processor does not multiply bfloat16")


def listed(names: Sequence[str], prepare: Callable[[str, str, Path], Sequence[Call]]) -> list[Engine]:
    """The engines of these names, each dtype an engine; the reference, which is the first, in any case."""
    pairs = [(EAGER, "float32")]
    pairs += [(name, dtype) for name in NAMES if name in names for dtype in dtypes_of(name)]
    return [Engine(*pair, partial(prepare, *pair)) for pair in dict.fromkeys(pairs)]


def channels_last(module: nn.Module) -> None:
    nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload,unused-ignore]


# A pipeline: a whole call, from prompt to pictures.


def of_pipeline(pipe: CoalescerPipeline, model: str, pictures: int, names: Sequence[str]) -> Subject:
    """A whole call of a pipeline, which becomes channels_last.

    Args:
        pipe: in float32 on a CPU.
        model: its name.
        pictures: of a call.
        names: of engines.
    """
    pipe.set_progress_bar_config(disable=True)
    for network in (pipe.unet, pipe.vae):
        channels_last(network)
    known = descriptions(pipe, CHECKED * pictures, torch.Generator().manual_seed(0))
    texts = list(islice(cycle(known), CHECKED * pictures))

    def drawing(mine: Any) -> Iterator[Call]:
        for i in range(CHECKED):
            prompts = texts[i * pictures : (i + 1) * pictures]

            def draw(prompts: list[str] = prompts, seed: int = i) -> Tensor:
                generator = torch.Generator().manual_seed(seed)
                drawn: Tensor = mine(prompts, generator=generator, output_type="pt").images.float()
                return drawn

            yield draw

    def prepare(name: str, dtype: str, folder: Path) -> Sequence[Call]:
        if name == EAGER:
            check_bfloat16(dtype)
            mine = pipe.twin() if dtype == "float32" else copy.deepcopy(pipe).to(DTYPES[dtype])
        else:
            try:
                mine = accelerate(pipe.twin(), "auto" if name == OURS else name, dtype)
            except ValueError as reason:
                raise Missing(str(reason)) from reason
        if isinstance(mine.runtime, PerShapeRuntime):  # engines that read the same export find it in one folder
            own = mine.runtime.prepare
            mine.runtime.prepare = lambda module, args, dtype, _: own(module, args, dtype, folder)
        return list(drawing(mine))

    scale = float(pipe.scheduler.config.guidance_scale)
    guided = f"guidance {scale:g}" if scale != 1 else "no guidance"
    what = f"{pictures} picture{'s' * (pictures != 1)} a call"
    name = public_name(model)
    title = f"{name}: from prompt to picture, 2 steps, {guided}, {what}"
    facts = {"model": name, "pictures": pictures, "steps": 2, "guidance_scale": scale, "prompts": texts}
    return Subject(title, facts, listed(names, prepare), compare_pictures)


def compare_pictures(drawn: Sequence[Tensor], expected: Sequence[Tensor], dtype: str) -> Agreement:
    """By the PSNR of pictures in [0, 1], as `verify` does."""
    errors = torch.cat([(x.double() - y.double()).square().mean((1, 2, 3)) for x, y in zip(drawn, expected)])
    psnr = (-10 * errors.log10()).clamp_max(PSNR_CAP)
    limits = Budget.of(DTYPES[dtype])
    median, least = float(psnr.median()), float(psnr.min())
    wrong = [
        f"the {what} PSNR of its pictures is {value:.1f} dB, below {limit:g}"
        for what, value, limit in (("median", median, limits.psnr_median), ("smallest", least, limits.psnr_minimum))
        if not value >= limit
    ]
    return Agreement({"psnr_median_db": median, "psnr_min_db": least}, "; ".join(wrong))


# A UNet of diffusers: one evaluation.


def load_unet(folder: Path) -> nn.Module:
    """The UNet in a folder, or in the folder unet of a pipeline, in float32 and evaluation mode.

    Raises:
        ValueError: for a folder without one.
    """
    import diffusers

    found = next((path for path in (folder, folder / "unet") if (path / "config.json").is_file()), None)
    if found is None:
        raise ValueError(f"{folder} holds no UNet: name a folder with its config.json, as save_pretrained writes it")
    try:
        config = json.loads((found / "config.json").read_text("utf-8"))
        kind = config.get("_class_name")
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{found / 'config.json'} is damaged: save the UNet again with save_pretrained") from error
    if kind not in ("UNet2DModel", "UNet2DConditionModel"):
        raise ValueError(
            f"the network in {found} is a {kind}; expected UNet2DModel or UNet2DConditionModel of diffusers"
        )
    try:
        module = getattr(diffusers, kind).from_pretrained(str(found), use_safetensors=True, torch_dtype=torch.float32)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{found} cannot be loaded ({reason:.200}): save it again with save_pretrained") from error
    unet: nn.Module = module.eval().requires_grad_(False)
    return unet


def of_unet(module: Any, name: str, pictures: int, size: int | None, names: Sequence[str]) -> Subject:
    """One evaluation of a UNet, which becomes channels_last.

    Args:
        module: in float32 on a CPU.
        name: what it is called.
        pictures: of an evaluation.
        size: height and width of the sample; that of its configuration if None.
        names: of engines.

    Raises:
        ValueError: for a UNet whose arguments are not known, and for one without a size.
    """
    kind, size = type(module).__name__, size or module.config.sample_size
    if not isinstance(size, int):
        raise ValueError(f"sample_size of {name} is {size!r}: give --size")
    channels_last(module)
    given = [calls.inputs(kind, module.config, pictures, size, timestep) for timestep in TIMESTEPS]

    def prepare(engine: str, dtype: str, folder: Path) -> Sequence[Call]:
        mine = sharing(module)
        if engine == EAGER and dtype == "float32":
            return [partial(evaluated, mine, each) for each in given]
        check_memory(module)
        if engine == OURS:
            return accelerated(mine, given, dtype)
        check_bfloat16(dtype)
        if engine != EAGER and (reason := unavailable(engine)):
            raise Missing(f"{engine} {reason}")
        if engine == EAGER:
            nn.Module.to(mine, DTYPES[dtype])
            return [partial(evaluated, mine, cast(each, dtype)) for each in given]
        own = dtype if engine == "compile" else "float32"  # the others round themselves
        tensors = [tuple(calls.flat(cast(each, own)).values()) for each in given]
        with torch.no_grad():  # inference mode would keep weights from being frozen
            bind = PREPARE[engine](calls.Flat(mine, given[0]), tensors[0], DTYPES[dtype], folder)

        def run(call: Callable[[Tensor], Any], sample: Tensor) -> Tensor:
            with torch.no_grad():
                result = call(sample)
            first: Tensor = result if isinstance(result, Tensor) else result[0]
            return first.float()

        return [partial(run, bind(rest), sample) for sample, *rest in tensors]

    count = sum(parameter.numel() for parameter in module.parameters())
    title = f"{name}: one evaluation of a {kind}, {count / 1e6:.1f} M parameters, {size}x{size}, batch {pictures}"
    facts = {"unet": name, "class": kind, "parameters": count, "size": size, "pictures": pictures}
    return Subject(title, facts, listed(names, prepare), compare_outputs)


def accelerated(module: nn.Module, given: Sequence[dict[str, Any]], dtype: str) -> list[Call]:
    """Calls of a module after `accelerate`, which raise RuntimeError if it runs in torch all the same.

    Raises:
        Missing: the dtype cannot run here.
    """
    try:
        accelerate(module, dtype=dtype, inputs=list(given) if dtype == "int8" else None)
    except ValueError as reason:
        raise Missing(str(reason)) from reason
    runtime = runtime_of(module)
    assert runtime is not None

    def call(arguments: dict[str, Any]) -> Tensor:
        result = evaluated(module, arguments)
        if runtime.refused:
            raise RuntimeError(f"it runs in torch: {runtime.refused}")
        return result

    return [partial(call, each) for each in given]


def evaluated(module: nn.Module, arguments: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        return calls.evaluate(module, arguments).float()


def cast(arguments: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The arguments of a call with their floating-point tensors in another dtype."""

    def one(value: Any) -> Any:
        if isinstance(value, dict):
            return cast(value, dtype)
        return value.to(DTYPES[dtype]) if value.is_floating_point() else value

    return {key: one(value) for key, value in arguments.items()}


def sharing(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters and buffers are in the same memory."""
    same: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    same |= {id(buffer): buffer for buffer in module.buffers()}
    return copy.deepcopy(module, same)


def check_memory(module: nn.Module) -> None:
    """Raise Missing unless another engine of the module fits into memory, as far as the system says."""
    needed = COPIES * sum(p.numel() * p.element_size() for p in module.parameters())
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), needed)
    if free < needed:
        raise Missing(f"it may need {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")


def compare_outputs(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: str) -> Agreement:
    """By the relative error of outputs, as `verify` does."""
    error = max(relative_errors(tuple(found), tuple(expected)), key=lambda e: (e != e, e))
    limit = Budget.of(DTYPES[dtype]).output_error
    return Agreement({"relative_error": error}, "" if error <= limit else f"error {error:.2g} is above {limit:g}")
