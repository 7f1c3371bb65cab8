"""What `benchmarks.networks` compares, each in a process of its own; importing this module loads no torch.

A provider's `load` stands for reading a checkpoint, whose weights are random here. Its `prepare` returns the call that
is timed, which returns its result as an array or a tensor. What a user does once and keeps on disk, as an export, is a
conversion: a process of its own, whose files several providers may read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from coalescer_fast.bench.peers import Missing

from .task import INPUTS, Task

Call = Callable[[], Any]


@dataclass(frozen=True)
class Provider:
    """A way to run a network.

    Attributes:
        dtypes: that it is measured in.
        imports: packages that it needs.
        load: (task) -> what `prepare` takes.
        prepare: (task, loaded) -> the call that is timed.
        conversions: keys of `CONVERSIONS` that come before it, in order.
        uncapped: why no cap to an instruction set holds, or "".
    """

    dtypes: tuple[str, ...]
    imports: tuple[str, ...]
    load: Callable[[Task], Any]
    prepare: Callable[[Task, Any], Call]
    conversions: tuple[str, ...] = ()
    uncapped: str = ""


def tensors(task: Task, timestep: int) -> dict[str, Any]:
    """The arrays of a call by name, as `models.flat` names them."""
    import numpy as np

    with np.load(task.path(INPUTS.format(timestep))) as found:
        return dict(found)


def calls(task: Task) -> list[dict[str, Any]]:
    """The arrays of every call that the inputs hold; the first is the one that is measured."""
    from .models import TIMESTEPS

    return [tensors(task, timestep) for timestep in TIMESTEPS]


def torch_dtype(task: Task) -> Any:
    """The dtype of a checkpoint: float32, or bfloat16 for bf16 and int8."""
    import torch

    return torch.float32 if task.dtype == "fp32" else torch.bfloat16


def arguments(task: Task, **given: Any) -> dict[str, Any]:
    from . import models

    return models.inputs(task.model, task.batch, task.size, task.scale, dtype=torch_dtype(task), **given)


def network(task: Task) -> Any:
    from . import models

    return models.make(task.model, task.scale, torch_dtype(task))


def set_threads(task: Task) -> None:
    import torch

    torch.set_num_threads(task.threads)


def evaluated(task: Task, module: Any) -> Call:
    import torch

    from . import models

    given = arguments(task)

    def call() -> Any:
        with torch.inference_mode():
            return models.evaluate(module, given)

    return call


def coalescer_fast(task: Task, module: Any) -> Call:
    """`coalescer_fast.accelerate` of the module, in the dtype of the task.

    Raises:
        Missing: the instruction set does not multiply this dtype.
        RuntimeError: the module did not run as a native program.
    """
    import torch

    import coalescer_fast
    from coalescer_fast.ops import native_library
    from coalescer_fast.runtime.native.module import no_programs, runtime_of

    from . import models

    set_threads(task)
    if reason := native_library.unavailable():
        raise Missing(reason)
    if task.isa:
        native_library.set_isa(task.isa)
    name, kinds = {
        "fp32": ("float32", [torch.float32]),
        "bf16": ("bfloat16", [torch.bfloat16]),
        "int8": ("int8", [torch.uint8]),
    }[task.dtype]
    if reason := next(filter(None, map(no_programs, kinds)), ""):
        raise Missing(reason)
    ranges = [arguments(task, timestep=timestep) for timestep in models.TIMESTEPS] if task.dtype == "int8" else None
    coalescer_fast.accelerate(
        module, dtype=name, inputs=ranges, keep_weights=task.keep_weights, cache=task.cache or None
    )
    run, runtime = evaluated(task, module), runtime_of(module)
    assert runtime is not None

    def call() -> Any:
        result = run()
        if runtime.refused:
            raise RuntimeError(f"the module runs in torch: {runtime.refused}")
        return result

    return call


def eager(task: Task, module: Any) -> Call:
    """As users have it: contiguous."""
    set_threads(task)
    return evaluated(task, module)


def eager_channels_last(task: Task, module: Any) -> Call:
    import torch

    return eager(task, module.to(memory_format=torch.channels_last))


def compile(task: Task, module: Any) -> Call:
    """torch.compile in channels_last, static shapes, weights frozen."""
    import torch

    from coalescer_fast.runtime.engines import compiled

    from . import models

    set_threads(task)
    given = arguments(task)
    flat = tuple(models.flat(given).values())
    with torch.no_grad():  # inference mode would keep weights from being frozen
        run = compiled.prepare(models.Flat(module, given), flat, torch_dtype(task), Path(task.folder))(flat[1:])

    def call() -> Any:
        with torch.no_grad():
            return run(flat[0])

    return call


def openvino(task: Task, model: Any) -> Call:
    """OpenVINO, tuned for latency, from a file. Raises Missing for bfloat16 under a cap."""
    import openvino as ov

    if task.isa and task.dtype == "bf16":
        raise Missing(f"{task.isa} has no bfloat16")
    hint = "f32" if task.dtype == "fp32" or task.isa else "bf16"
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": task.threads,
        "INFERENCE_PRECISION_HINT": hint,
        **({"CACHE_DIR": task.cache} if task.cache else {}),
    }
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    given = list(calls(task)[0].values())
    for n, value in enumerate(given):
        request.set_input_tensor(n, ov.Tensor(value, shared_memory=True))

    def call(kept: object = given) -> Any:
        request.infer(share_outputs=True)
        return request.get_output_tensor(0).data

    return call


def onnxruntime(task: Task, path: Path) -> Call:
    """ONNX Runtime's CPU provider, all optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = dict(zip((each.name for each in session.get_inputs()), calls(task)[0].values()))
    return lambda: session.run(None, given)[0]


def to_openvino(task: Task) -> None:
    """An IR in float32, and one whose weights are in half precision, as OpenVINO saves them by default."""
    import openvino as ov
    import torch

    from . import models

    given = arguments(task)
    flat = models.flat(given)
    with torch.no_grad():
        module = models.Flat(network(task), given).eval()
        model = ov.convert_model(
            module, example_input=tuple(flat.values()), input=[list(x.shape) for x in flat.values()]
        )
    ov.save_model(model, task.path("fp32.xml"), compress_to_fp16=False)
    ov.save_model(model, task.path("fp16.xml"), compress_to_fp16=True)


def to_int8(task: Task) -> None:
    """An IR in int8, of that in float32."""
    import openvino as ov

    from ..harness.int8 import quantized

    model = ov.Core().read_model(task.path("fp32.xml"))
    ov.save_model(quantized(model, [list(call.values()) for call in calls(task)]), task.path("int8.xml"))


def to_onnx(task: Task) -> None:
    import torch

    from coalescer_fast.runtime.engines.onnx import export

    from . import models

    given = arguments(task)
    with torch.no_grad():
        export(models.Flat(network(task), given).eval(), tuple(models.flat(given).values()), Path(task.folder))


@dataclass(frozen=True)
class Conversion:
    """Files made from a network.

    Attributes:
        run: (task) -> None writes them into the task's folder.
        imports: packages that it needs.
    """

    run: Callable[[Task], None]
    imports: tuple[str, ...]


CONVERSIONS = {
    "openvino": Conversion(to_openvino, ("torch", "diffusers", "openvino")),
    "int8": Conversion(to_int8, ("openvino", "nncf")),
    "onnx": Conversion(to_onnx, ("torch", "diffusers", "onnx", "onnxscript")),
}


def file(name: str, task: Task) -> Path:
    return task.path(name)


def ir(task: Task) -> Path:
    """The file that OpenVINO reads; see `isa` on float32 under a cap."""
    return task.path(
        {"fp32": "fp16.xml" if task.isa else "fp32.xml", "bf16": "fp16.xml", "int8": "int8.xml"}[task.dtype]
    )


OURS = "coalescer_fast"
TORCH = ("torch", "diffusers")
MLAS = "its kernels (MLAS) ask the processor itself what it has, and no setting caps them"
PROVIDERS = {
    OURS: Provider(("fp32", "bf16", "int8"), (*TORCH, "coalescer_fast"), network, coalescer_fast),
    "eager": Provider(("fp32", "bf16"), TORCH, network, eager),
    "eager_channels_last": Provider(("fp32", "bf16"), TORCH, network, eager_channels_last),
    "compile": Provider(("fp32", "bf16"), TORCH, network, compile),
    "openvino": Provider(("fp32", "bf16"), ("openvino",), ir, openvino, ("openvino",)),
    "openvino_int8": Provider(("int8",), ("openvino",), ir, openvino, ("openvino", "int8")),
    "onnxruntime": Provider(("fp32",), ("onnxruntime",), partial(file, "Flat.onnx"), onnxruntime, ("onnx",), MLAS),
}


def peak(task: Task) -> float:
    """Billions of operations a second of torch's product of large matrices in a dtype, packed as weights; the best."""
    import time

    import torch

    set_threads(task)
    n = 2048
    a, b = (torch.randn(n, n, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    if task.dtype == "int8":
        x, y = a.mul(20).round().clamp(0, 127).to(torch.uint8), b.mul(20).round().clamp(-127, 127).to(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(y, [n, n])
        ones, zeros = torch.ones(n), torch.zeros(n, dtype=torch.int32)

        def product() -> object:
            return torch.ops.onednn.qlinear_pointwise(
                x, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
            )
    else:
        x, y = (each.to(torch_dtype(task)) for each in (a, b))
        packed = torch.ops.mkldnn._reorder_linear_weight(y, n)

        def product() -> object:
            return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e9


def missing(packages: tuple[str, ...]) -> None:
    """Import these packages. Raises Missing for one that is not installed."""
    import importlib

    for name in packages:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise Missing(f"it needs the package {name}: pip install {name}") from error
