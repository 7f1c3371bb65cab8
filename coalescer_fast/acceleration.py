"""Run the same pipeline faster: `accelerate` chooses what runs its networks, once, and `explain` says what it chose."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import networks
from .console import table
from .dtypes import DTYPES, dtype_name
from .ops import native_library
from .pipeline import CoalescerPipeline
from .prompts import check_batch_sizes, check_texts
from .runtime.cuda.runtime import CudaRuntime
from .runtime.eager import EagerRuntime
from .runtime.engines import artefact as artefacts
from .runtime.engines import compiled, onnxruntime, openvino, tensorrt
from .runtime.engines.artefact import Artefact
from .runtime.engines.exported import ExportedRuntime
from .runtime.engines.per_shape import PerShapeRuntime
from .runtime.native.module import native_bfloat16
from .runtime.native.runtime import NativeRuntime

if TYPE_CHECKING:
    from .runtime.base import Runtime

FLOATS = ("float32", "bfloat16")


@dataclass(frozen=True)
class RuntimeKind:
    """A runtime that `accelerate` can choose, under its name in `RUNTIMES`.

    Attributes:
        make: (pipe, dtype) -> runtime, or None where it runs artefacts alone.
        dtypes: device type -> names of the dtypes that it can compute in there.
        packages: what it needs to prepare networks. To load an artefact it needs the first of them alone.
        unavailable: why it cannot run in this process although the packages are there, or "".
        load: (pipe, artefacts by kind) -> runtime of these artefacts, or None where it runs none.
        engines: what the artefacts that it runs were made for, see `Manifest.engine`.
    """

    make: Callable[[CoalescerPipeline, torch.dtype], Runtime] | None
    dtypes: Mapping[str, Sequence[str]]
    packages: Sequence[str] = ()
    unavailable: Callable[[], str] = lambda: ""
    load: Callable[[CoalescerPipeline, Mapping[str, Artefact]], Runtime] | None = None
    engines: Sequence[str] = ()


RUNTIMES = {
    "cpu": RuntimeKind(NativeRuntime, {"cpu": (*FLOATS, "int8")}, unavailable=lambda: native_library.unavailable()),
    "cuda": RuntimeKind(
        lambda pipe, dtype: CudaRuntime(pipe, "auto", dtype),
        {"cuda": (*FLOATS, "float16")},
        unavailable=lambda: "" if torch.cuda.is_available() else "there is no CUDA device",
    ),
    "compile": RuntimeKind(
        lambda pipe, dtype: PerShapeRuntime(pipe, "compile", compiled.prepare, dtype), {"cpu": FLOATS, "cuda": FLOATS}
    ),
    "onnxruntime": RuntimeKind(
        lambda pipe, dtype: PerShapeRuntime(pipe, "onnxruntime", onnxruntime.prepare, dtype, torch.float32),
        {"cpu": ["float32"]},
        ("onnxruntime", "onnx", "onnxscript"),
        load=lambda pipe, found: ExportedRuntime(pipe, "onnxruntime", found, onnxruntime.open_artefact),
        engines=["onnx"],
    ),
    "openvino": RuntimeKind(
        lambda pipe, dtype: PerShapeRuntime(pipe, "openvino", openvino.prepare, dtype, torch.float32),
        {"cpu": FLOATS},
        ("openvino", "onnx", "onnxscript"),
    ),
    "tensorrt": RuntimeKind(
        None,
        {"cuda": ()},  # an artefact has its own precision
        unavailable=tensorrt.unavailable,
        load=lambda pipe, found: ExportedRuntime(pipe, "tensorrt", found, tensorrt.open_artefact),
        engines=list(tensorrt.TITLES),
    ),
}
# device type -> what "auto" takes there, even where ops of its have to run on the reference
AUTO = {"cpu": "cpu", "cuda": "cuda"}


def unavailable(name: str, loads: bool = False) -> str:
    """Why a runtime cannot run in this process.

    Args:
        name: one of `RUNTIMES`.
        loads: whether it only has to load artefacts.

    Returns:
        What follows its name in a sentence, or "" if it can run.
    """
    packages = RUNTIMES[name].packages[: 1 if loads else None]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            return f"needs the package {package}, which is not installed: run pip install {' '.join(packages)}"
    reason = RUNTIMES[name].unavailable()
    return f"cannot run: {reason}" if reason else ""


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device of this type multiplies bfloat16 itself; emulated it is slower than float32."""
    return native_bfloat16() if device == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)


def native_dtype(device: str, dtypes: Sequence[str]) -> str:
    """Choose among dtypes: bfloat16 where the device multiplies it, else on a GPU float16, else float32."""
    order = ["bfloat16"] * multiplies_bfloat16(device) + ["float16"] * (device == "cuda") + ["float32"]
    return next(name for name in order if name in dtypes)


def accelerate(
    pipe: Any,
    backend: str = "auto",
    dtype: str | torch.dtype = "auto",
    artefact: str | Path | None = None,
    *,
    prompts: Sequence[str] | None = None,
    inputs: Sequence[Any] | None = None,
    keep_weights: bool = True,
    cache: str | Path | None = None,
    winograd_memory: int | None = None,
    **call: Any,
) -> Any:
    """Have the calls of a pipeline or a module run fast from now on.

    The same call with the same seed gives the same pictures, up to rounding.

    **A CoalescerPipeline** runs on one of these:

    - "cpu": each network as a program of native kernels, weights packed once, memory laid out once for every batch size
      and resolution. Nothing is compiled, no package is needed. With int8 products of the UNet multiply
      8-bit integers, of what norms, attention and gates give, their ranges found here on ``prompts`` (a few dozen
      known names); it needs AVX2 or AVX-512.
    - "cuda": channels innermost, fused ops, and all steps with the decoder in one CUDA graph for each batch size,
      resolution, step count and use of guidance, captured at the first call of its kind; calls with a callback or a
      trace go step by step.
    - "compile" (on GPUs, too), "onnxruntime" and "openvino": the networks by torch.compile, ONNX Runtime or OpenVINO,
      each prepared for a batch size and resolution when it first comes, which takes seconds, by `warmup` or in a call;
      the last eight are kept.
    - "onnxruntime" with ``artefact``, a folder that `coalescer-export` wrote: its graphs, for the batch sizes and in
      the precision that they were exported for. Nothing is prepared. They are of these weights, or refused, now and in
      every call.
    - "tensorrt" with ``artefact``, a folder of engines that `coalescer-export engine` built for this GPU: on the
      caller's stream, in a CUDA graph for each batch size. Not yet run on a GPU.

    What depends on the description alone is computed once a call, in float32; R, distances and the update are float32.
    What is changed of the networks later, weights, layers, attributes or hooks, takes effect at the next call (see
    `refresh` for what no call can see), but not while a call runs. A network with hooks is run by its own code on
    "cpu" and refused by the others; on "cpu", so is one with layers of other packages.

    On "cpu", the bits of a picture depend on weights, prompt, noise, dtype, instruction set and winograd_memory alone:
    not on the batch, its order, the number of threads, earlier calls or the process. A copy of the pipeline, by
    ``copy.deepcopy`` or pickle, is accelerated again in the same way. After a fork, "cpu" goes on in the child with one
    thread, and the others ask to be accelerated again.

    **Another diffusers pipeline**, or **a module**, runs on "cpu" where it is on a CPU: of a pipeline the UNet, a
    ControlNet, and encoder and decoder of the autoencoder; of an AutoencoderKL or AutoencoderTiny its encoder and
    decoder; any other module itself, if it is made of operations that there are steps for, as UNet2DConditionModel and
    UNet2DModel are. The module's own forward is recorded at the first call of every structure and shapes of its
    arguments, and runs as a native program from then on. What has no step, and what has hooks inside, runs in torch;
    `explain` says why. So does a call that needs a gradient: of an input, or of parameters in training mode. Outputs
    have the dtype of the first image. Changes, such as adapters that are added, scaled, switched or fused, take effect
    at the next call.

    **On a CUDA device**, what would run natively on a CPU runs on "cuda", in bfloat16, float16 or float32: by torch's
    convolutions, products and attention and our fused ops, channels innermost, in one CUDA graph for every structure,
    shapes and dtypes of the arguments. Everything else is as on a CPU. Run on an H200 alone.

    **On processors with AMX**, which torch's convolutions use and native ones do not, "auto" leaves to torch what is
    faster there: UNet and decoder of a CoalescerPipeline in bfloat16 or int8, as a copy in bfloat16, channels
    innermost; and a module whose weights are bfloat16, as it is. `explain` says so. "cpu" takes native programs.

    Args:
        pipe: a pipeline or module on a CPU or a CUDA device; for "compile" and artefacts a CoalescerPipeline.
        backend: "auto", which is "cpu" on a CPU and "cuda" on a CUDA device, or for an artefact what runs it; or one of
            `RUNTIMES`.
        dtype: "auto", which is bfloat16 where device and runtime have it (else float32, and float16 by "cuda"), or a
            dtype or its name, as in `RUNTIMES`.
        artefact: a folder that `coalescer-export` wrote, to run it instead of the pipeline's own networks.
        prompts: of a pipeline with int8, what its ranges are found with; there is a default.
        inputs: of a module with int8, what its ranges are found with: the arguments of some calls, each a tuple or a
            dict. The ranges serve images of all sizes.
        keep_weights: on a CPU, False frees the weights of modules as they are packed, so that each is in memory once.
            The modules can then neither be restored nor copied or saved.
        cache: on a CPU, a folder where packed weights are kept for the next process, which maps them into its memory.
        winograd_memory: bytes that weights of Winograd's convolutions, which are faster and have larger weights, may
            take beyond those of direct ones, for each network and size of images; `explain` shows what they take.
            Default: 512 MiB, or two fifths of all weights if that is more.
        **call: of a diffusers pipeline with int8, what else its calls are given while ranges are found, such as
            num_inference_steps (4 without), guidance_scale, image.

    Returns:
        ``pipe`` itself, with another ``runtime`` or with modules whose ``forward`` is another; `restore` undoes it.

    Raises:
        TypeError: for anything but a pipeline or a module.
        ValueError: for a backend or dtype that does not exist or cannot run here, for an artefact that is damaged or of
            another model, and for arguments that do not go together.
    """
    of_others = is_of_others(pipe)
    if artefact is not None and not isinstance(artefact, (str, Path)):
        raise TypeError(f"artefact is {artefact!r:.80}; expected the name of a folder")
    if backend not in ("auto", *RUNTIMES):
        raise ValueError(f"backend is {backend!r}; use one of auto, {', '.join(RUNTIMES)}")
    _check_bytes("winograd_memory", winograd_memory)
    if of_others:
        device = networks.device(pipe)
        if backend not in ("auto", *AUTO) or artefact is not None:
            given = "artefact" if artefact is not None else f"backend {backend!r}"
            raise ValueError(f"{given} is for CoalescerPipelines: a {type(pipe).__name__} runs on 'cpu' or 'cuda'")
        name = AUTO[device.type]
        if backend not in ("auto", name):
            raise ValueError(
                f"backend {backend!r} runs on {backend}, and the networks are on {device}: move them first"
            )
        if backend != "auto" and (reason := unavailable(name)):
            raise ValueError(f"backend {backend!r} {reason}")
        chosen = _dtype(dtype, name, device.type)
        _check_bfloat16(chosen, dtype, device, name)
        auto = backend == "auto"
        networks.accelerate(pipe, DTYPES[chosen], prompts, inputs, keep_weights, cache, winograd_memory, call, auto)
        return pipe
    others = {"inputs": inputs is not None, "keep_weights": not keep_weights, "cache": cache is not None}
    if unwanted := [*(name for name, is_given in others.items() if is_given), *call]:
        raise ValueError(
            f"a CoalescerPipeline takes no {' and no '.join(unwanted)}: "
            "leave out all but backend, dtype, artefact, prompts and winograd_memory"
        )
    if artefact is not None:
        if winograd_memory is not None:
            raise ValueError("winograd_memory is for networks, and an artefact is ready: leave it out")
        return _load(pipe, backend, dtype, artefact)
    _check_device(pipe, backend)
    device = pipe.device.type
    name = AUTO[device] if backend == "auto" else backend
    if winograd_memory is not None and name != "cpu":
        raise ValueError(f"winograd_memory is for backend 'cpu' alone: leave it out with {name!r}")
    if (make := RUNTIMES[name].make) is None:
        raise ValueError(f"backend {name!r} runs artefacts alone: give artefact=DIR, of coalescer-export engine")
    chosen = _dtype(dtype, name, device)
    _check_bfloat16(chosen, dtype, pipe.device, name)
    if backend != "auto" and (reason := unavailable(name)):
        raise ValueError(f"backend {name!r} {reason}")
    if prompts is not None and chosen != "int8":
        raise ValueError("prompts are what dtype 'int8' finds its ranges with: leave them out")
    recipe: dict[str, Any] = {"backend": name, "dtype": chosen}
    if prompts is not None:
        prompts = check_texts("prompts", prompts)
        recipe["prompts"] = list(prompts)
    if winograd_memory is not None:
        recipe["winograd_memory"] = winograd_memory
    if name == "cpu":
        reason = native_library.slower_than_torch(DTYPES[chosen]) if backend == "auto" else ""
        pipe.runtime = NativeRuntime(pipe, DTYPES[chosen], prompts or (), reason, winograd_memory)
        recipe["backend"] = "auto" if reason else name
    else:
        pipe.runtime = make(pipe, DTYPES[chosen])
    pipe.recipe = recipe
    return pipe


def _check_bytes(name: str, value: Any) -> None:
    """Raise ValueError for anything but None or a whole number of bytes."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(f"{name} is {value!r:.80}; expected a whole number of bytes, 0 or more")


def _dtype(dtype: str | torch.dtype, backend: str, device: str) -> str:
    """The name of the dtype to compute in."""
    dtypes = RUNTIMES[backend].dtypes[device]
    chosen = native_dtype(device, dtypes) if dtype == "auto" else dtype_name(dtype)
    if chosen not in dtypes:
        raise ValueError(
            f"dtype is {dtype!r}; use one of auto, {', '.join(dtypes)} with backend {backend!r} on {device}"
        )
    return chosen


def _check_bfloat16(chosen: str, given: str | torch.dtype, device: torch.device, backend: str) -> None:
    """Raise ValueError for bfloat16 on a GPU that does not multiply it."""
    if device.type == "cuda" and chosen == "bfloat16" and not multiplies_bfloat16("cuda"):
        able = native_dtype("cuda", RUNTIMES[backend].dtypes["cuda"])
        raise ValueError(f"dtype is {given!r}, which {device} lacks: use {able}")


def _load(pipe: CoalescerPipeline, backend: str, dtype: str | torch.dtype, artefact: str | Path) -> CoalescerPipeline:
    loads = {name: kind.load for name, kind in RUNTIMES.items() if kind.load is not None}
    if backend not in ("auto", *loads):
        raise ValueError(f"backend {backend!r} takes no artefact; use one of auto, {', '.join(loads)}")
    if dtype != "auto":
        raise ValueError(f"dtype is {dtype!r}, and an artefact has its own precision: leave dtype out")
    found = None
    if backend == "auto":
        found = artefacts.find(artefact)
        engine = next(iter(found.values())).manifest.engine
        backend = next(name for name in loads if engine in RUNTIMES[name].engines)
    _check_device(pipe, backend)
    if reason := unavailable(backend, loads=True):
        raise ValueError(f"backend {backend!r} {reason}")
    pipe.runtime = loads[backend](pipe, found or artefacts.find(artefact))
    pipe.recipe = {"backend": backend, "artefact": str(artefact)}
    return pipe


def _check_device(pipe: CoalescerPipeline, backend: str) -> None:
    devices = list(AUTO if backend == "auto" else RUNTIMES[backend].dtypes)
    if pipe.device.type not in devices:
        where = f"runs on {' and '.join(devices)}, and the pipeline is on {pipe.device}"
        raise ValueError(f"backend {backend!r} {where}: move it with pipe.to({devices[0]!r}) first")


def restore(pipe: Any) -> Any:
    """Undo `accelerate`: the next call is the reference's, to the bit. Returns ``pipe``.

    Raises:
        ValueError: if weights were freed by ``keep_weights=False``, and for modules and diffusers pipelines that are
            not accelerated.
    """
    if is_of_others(pipe):
        networks.restore(pipe)
    else:
        pipe.runtime, pipe.recipe = EagerRuntime(pipe), None
    return pipe


def refresh(pipe: Any) -> Any:
    """Have an accelerated pipeline or module take over its networks as they are now, whether or not it sees a change.

    Every call looks for changes by itself: other weights, modules, attributes or hooks, and all writes that torch
    counts. What torch does not count, writes through ``.data`` or numpy, it finds on a CPU if they change a whole
    tensor, and else perhaps not: call this after them.

    Returns:
        ``pipe``.

    Raises:
        ValueError: if the pipeline is not accelerated, or if an artefact is not of its weights.
    """
    if is_of_others(pipe):
        networks.refresh(pipe)
        return pipe
    runtime = _accelerated(pipe)
    runtime.forget()
    runtime.refresh()
    return pipe


def warmup(pipe: Any, batch_sizes: Sequence[int] = (1,), *, inputs: Sequence[Any] | None = None, **call: Any) -> None:
    """Do now what the first call of these batch sizes would do once: pack weights, prepare networks, capture graphs.

    Args:
        pipe: an accelerated pipeline or module.
        batch_sizes: pictures a call of a pipeline.
        inputs: of a module, the arguments of calls of all the shapes to come, each a tuple or a dict.
        **call: what else the calls to come will be given, of that which is prepared for: num_inference_steps, height,
            width, output_type, guidance_scale (whether it is 1).

    Raises:
        TypeError: for batch_sizes that are no whole numbers.
        ValueError: if the pipeline is not accelerated, and without inputs of a module.
    """
    if is_of_others(pipe):
        networks.warmup(pipe, batch_sizes, inputs, call)
        return
    _accelerated(pipe)
    if inputs is not None:
        raise ValueError("inputs are for modules: a pipeline takes batch_sizes and the arguments of its calls")
    check_batch_sizes(batch_sizes)
    for n in batch_sizes:
        pipe("", num_images_per_prompt=n, generator=torch.Generator().manual_seed(0), **{"output_type": "pt", **call})


def explain(pipe: Any) -> str:
    """A table of what runs each part of a pipeline or module, and why.

    Of native programs it says, once there was a call, how many products multiply in 8 bits, how many 3x3 convolutions
    have which of Winograd's forms, and why the others are direct. `docs/networks.md` shows how to measure the steps of
    such a program.
    """
    found = networks.explain(pipe) if is_of_others(pipe) else pipe.runtime.explain()
    rows = [(part.name, part.runs_on, part.because) for part in found]
    return table([("part", "runs on", "because"), *rows])


def is_of_others(pipe: object) -> bool:
    """Whether it is a module or a diffusers pipeline, and no CoalescerPipeline. Raises TypeError for anything else."""
    if isinstance(pipe, CoalescerPipeline):
        return False
    if not isinstance(pipe, networks.NETWORKS):
        raise TypeError(
            f"pipe is of type {type(pipe).__name__}; "
            "expected a CoalescerPipeline, another diffusers pipeline or a module"
        )
    return True


def check_pipeline(pipe: object) -> None:
    """Raise TypeError for anything but a pipeline of ours."""
    if not isinstance(pipe, CoalescerPipeline):
        raise TypeError(
            f"pipe is of type {type(pipe).__name__}; "
            "expected a CoalescerPipeline, as of CoalescerPipeline.from_pretrained"
        )


def _accelerated(pipe: CoalescerPipeline) -> Runtime:
    """The runtime of an accelerated pipeline. Raises ValueError for any other."""
    check_pipeline(pipe)
    if isinstance(pipe.runtime, EagerRuntime):
        raise ValueError("the pipeline is not accelerated: call coalescer_fast.accelerate(pipe) first")
    return pipe.runtime
