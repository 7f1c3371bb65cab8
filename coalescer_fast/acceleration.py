"""The same pipeline, faster: what runs it is decided once, by `accelerate`, and said by `explain`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .pipeline import CoalescerPipeline
    from .runtime.networks import Networks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BACKENDS = ("auto", "cpu", "cuda")


def accelerate(pipe: CoalescerPipeline, backend: str = "auto", dtype: str | torch.dtype = "auto") -> CoalescerPipeline:
    """Have the pipeline's calls run fast from now on; the same call with the same seed gives the same pictures, up to rounding.

    On a CPU: channels innermost in memory, weights packed once for oneDNN, native fused ops, and bfloat16 where the CPU multiplies it
    itself (else float32). On a CUDA device: channels innermost, fused ops, bfloat16 (float16 before compute capability 8.0), and all steps
    with the decoder in one CUDA graph for each batch size, captured at the first call of its kind; calls with a callback or a trace go
    step by step. What depends on the description alone is computed once a call, in float32; R, distances and the update are float32. A
    weight that is changed later takes effect at the next call.

    Args:
        pipe: a pipeline on a CPU or a CUDA device.
        backend: "auto", or "cpu" or "cuda", which is where the pipeline must be.
        dtype: "auto", "float32", "bfloat16" or, on a CUDA device, "float16", or the torch.dtype.

    Returns: ``pipe`` itself, whose ``runtime`` is now set; `restore` undoes it.

    Raises: ValueError, in one sentence, for a backend or dtype that does not exist or cannot run here.
    """
    from .ops import library
    from .runtime.cpu import CpuRuntime, native_bfloat16

    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; use one of {', '.join(BACKENDS)}")
    where = pipe.device.type
    if where not in ("cpu", "cuda"):
        raise ValueError(f"the pipeline is on {where}, and is accelerated on CPUs and CUDA devices only: move it with pipe.to('cpu') first")
    if backend not in ("auto", where):
        lacks = backend == "cuda" and not torch.cuda.is_available()
        mend = "there is no CUDA device" if lacks else f"move it with pipe.to({backend!r}) first"
        raise ValueError(f"backend {backend!r} cannot run where the pipeline is, on {pipe.device}: {mend}")
    if where == "cuda":
        from .runtime import cuda

        pipe.runtime = cuda.CudaRuntime(pipe, "auto", cuda.chosen_dtype(dtype, pipe.device))
        return pipe
    chosen = DTYPES.get(str(dtype).removeprefix("torch."))
    if dtype == "auto":
        chosen = torch.bfloat16 if native_bfloat16() else torch.float32
    if chosen is None:
        raise ValueError(f"dtype is {dtype!r}; use one of auto, {', '.join(DTYPES)}")
    reason = library.unavailable()
    if reason and backend == "cpu":
        raise ValueError(f"backend 'cpu' cannot run: {reason}")
    pipe.runtime = CpuRuntime(pipe, "reference" if reason else "cpu", chosen)
    return pipe


def restore(pipe: CoalescerPipeline) -> CoalescerPipeline:
    """Undo `accelerate`: the next call is the reference's, to the bit. Returns ``pipe``."""
    pipe.runtime = None
    return pipe


def warmup(pipe: CoalescerPipeline, batch_sizes: Sequence[int] = (1,), **call: Any) -> None:
    """Do now what the first call would do once: pack the weights, choose a kernel for every call of these batch sizes, capture its graph.

    ``call``: what else the calls to come will be given, of that which is captured: num_inference_steps, height, width, output_type,
    guidance_scale (whether it is 1).

    Raises: ValueError if the pipeline is not accelerated.
    """
    accelerated(pipe)
    for n in batch_sizes:
        pipe("", num_images_per_prompt=n, generator=torch.Generator().manual_seed(0), **{"output_type": "pt", **call})


def explain(pipe: CoalescerPipeline) -> str:
    """A table of what runs each part of an accelerated pipeline, and why. Raises ValueError if it is not accelerated."""
    rows = accelerated(pipe).explain()
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def accelerated(pipe: CoalescerPipeline) -> Networks:
    if pipe.runtime is None:
        raise ValueError("the pipeline is not accelerated: call coalescer_fast.accelerate(pipe) first")
    return pipe.runtime
