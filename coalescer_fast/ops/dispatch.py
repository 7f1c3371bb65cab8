"""Which backend runs an op, and why not a faster one.

"auto" takes the first backend of `PREFERENCE` that can run the call, and logs its choice once. A backend that was asked
for by name runs the call or raises an error. With ``COALESCER_FAST_STRICT=1``, "auto" raises an error where it would
otherwise pass over a backend that is made for the device. Only the reference supports gradients, forward-mode tangents
and the transforms of ``torch.func``.

Every op is also ``torch.ops.coalescer_fast.NAME``, with the same arguments. Compilers, exporters and dispatch modes see
this one. Plain eager calls go to the backend directly, because torch's dispatcher costs as much as a small kernel.
"""

from __future__ import annotations

import inspect
import logging
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import checks, cuda_library, native_library, triton_launch
from .binding import NativeKernel
from .op import MOST_LAUNCHERS, OPS, Op, differentiated, dispatches, in_kernel, plain

logger = logging.getLogger(__name__)

FLOAT_AT_MOST_32 = (torch.float32, torch.float16, torch.bfloat16)

_is_compiling = torch.compiler.is_compiling


class Support(Protocol):
    """A module that runs a backend's kernels.

    Attributes:
        INTERPRETED: whether kernels for GPUs run on CPU tensors, as in Triton's interpreter and the tests' emulation of
            CUDA.
    """

    INTERPRETED: bool

    def unavailable(self) -> str:
        """Why the kernels cannot run here at all, or ""."""
        ...

    def refusal(self, tensor: Tensor) -> str:
        """Why they cannot take this tensor, whose dtype and type of device are right, or ""."""
        ...


@dataclass(frozen=True)
class Backend:
    """A way to run ops.

    Attributes:
        device: the type of device that it is made for, or None for any.
        dtypes: those that it takes, or None for all.
        support: the module that runs its kernels, or None if that is torch.
    """

    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    support: Support | None = None

    def refusal(self, tensors: dict[str, Tensor]) -> str:
        """Why it cannot run on these arguments, or ""."""
        if self.support is None:
            return ""
        for name, tensor in tensors.items():
            if self.device not in (None, tensor.device.type) and not self.support.INTERPRETED:
                return f"{name} is on {tensor.device}; expected a {self.device} device"
        if reason := self.support.unavailable():
            return reason
        for name, tensor in tensors.items():
            if self.dtypes is not None and tensor.dtype not in self.dtypes:
                return f"{name} has dtype {tensor.dtype}; expected {', '.join(map(str, self.dtypes))}"
        for name, tensor in tensors.items():
            if reason := self.support.refusal(tensor):
                return f"{name} {reason}"
        return differentiated(tuple(tensors), tuple(tensors.values()))


BACKENDS = {
    "reference": Backend(),
    "cpu": Backend("cpu", FLOAT_AT_MOST_32, native_library),
    "triton": Backend("cuda", FLOAT_AT_MOST_32, triton_launch),
    "cuda": Backend("cuda", FLOAT_AT_MOST_32, cuda_library),
}
# What "auto" tries, fastest first. A native kernel may yield a call to the next backend made for the device.
PREFERENCE = ("cuda", "triton", "cpu", "reference")

_chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}
_logged: set[str] = set()


def run(name: str, backend: str, *args: Any) -> Any:
    """Run an op on a backend, or through ``torch.ops`` if torch's dispatcher has to see it.

    Where the fast path can run further calls of this kind, it is given a launcher for them.

    Args:
        name: the op's.
        backend: a name in `BACKENDS`, or "auto".
        args: the op's other arguments, checked and in the schema's order.

    Raises:
        ValueError: there is no such backend, or it cannot run the call.
    """
    known(name, backend)
    op = OPS[name]
    reason = differentiated(op.names, args)
    key = op.key(*args, backend)
    if (key is not None or plain(args[0])) and not any(map(dispatches, args)):
        function = _choose(op, backend, args, reason)
        if function is not op.implementation("reference"):
            resolved = tuple(map(_resolved, args))
        else:
            resolved = tuple(map(_tracked, args)) if reason else args
        if key is not None and all(map(operator.is_, args, resolved)):
            function = function.launcher(*args) if isinstance(function, NativeKernel) else function
            op.remember(key, function)
        return function(*resolved)
    if backend == "reference" or (backend == "auto" and reason):
        return op.implementation("reference")(*args)  # a compiler looks into it
    if reason:
        raise ValueError(f"backend {backend!r} cannot run this {name}: {reason}")
    if not _is_compiling() and in_kernel():
        return _choose(op, backend, args, reason)(*args)
    return op.overload(**dict(zip(op.names, args)), backend=backend)


def _choose(op: Op, backend: str, args: Sequence[Any], differentiated: str) -> Callable[..., Any]:
    """The implementation for this call, remembered by op, backend, device, shape, dtypes and ``differentiated``."""
    dtypes = [a.dtype for a in args if isinstance(a, Tensor)]
    key = (op.name, backend, args[0].device, args[0].shape, differentiated, *dtypes)
    function = _chosen.get(key)
    if function is None:
        if len(_chosen) >= MOST_LAUNCHERS:
            _chosen.clear()
        function = _chosen[key] = op.implementation(_resolve(op, backend, args))
    return function


def _refusal(op: Op, backend: str, tensors: dict[str, Tensor]) -> str:
    """Why the backend cannot run the op on these arguments, or ""."""
    if backend not in op.implementations:
        return f"{op.name} has no kernel for it"
    return BACKENDS[backend].refusal(tensors)


def _resolve(op: Op, backend: str, args: Sequence[Any]) -> str:
    """The backend's name for this call.

    Raises:
        ValueError: the backend asked for cannot run it.
    """
    tensors = {name: a for name, a in zip(op.names, args) if isinstance(a, Tensor)}
    if backend != "auto":
        if reason := _refusal(op, backend, tensors):
            raise ValueError(f"backend {backend!r} cannot run this {op.name}: {reason}")
        return backend
    chosen, unable, reason = preferred(op, *args)
    if unable and os.environ.get("COALESCER_FAST_STRICT") == "1":
        raise ValueError(f"COALESCER_FAST_STRICT=1 forbids {op.name} to fall back to {chosen}; {unable}")
    _log_once(
        "; ".join(filter(None, [f"{op.name} runs on {chosen}", unable, reason])),
        logging.WARNING if unable else logging.INFO,
    )
    return chosen


def preferred(op: Op, *args: Any) -> tuple[str, str, str]:
    """What "auto" takes for a call.

    Args:
        op: the op.
        args: the call's arguments in the schema's order, or the first of them.

    Returns:
        The backend's name, why faster ones cannot run the call, and why a faster one that can leaves it to this one.
        The reasons are "" where there is none.
    """
    tensors = {name: a for name, a in zip(op.names, args) if isinstance(a, Tensor)}
    unable: list[str] = []
    able: list[str] = []
    for candidate in PREFERENCE:
        if candidate not in op.implementations or BACKENDS[candidate].device not in (None, args[0].device.type):
            continue
        if reason := BACKENDS[candidate].refusal(tensors):
            unable += [] if able else [f"not on {candidate}: {reason}"]
        else:
            able.append(candidate)
    chosen, *others = able
    kernel, left = op.implementation(chosen), ""
    is_choice = others and BACKENDS[others[0]].device is not None
    if is_choice and isinstance(kernel, NativeKernel) and (reason := kernel.yields(*args)):
        left, chosen = f"not on {chosen}: {reason}", others[0]
    return chosen, "; ".join(unable), left


def _resolved(a: Any) -> Any:
    """The argument with its values in memory: torch may keep a negation, or the zeros of a tangent, as a flag."""
    if not isinstance(a, Tensor):
        return a
    return torch.zeros_like(a) if a._is_zerotensor() else a.resolve_neg()


def _tracked(a: Any) -> Any:
    """The argument, copied if it was made in inference mode: autograd saves no such tensor."""
    return a.clone() if isinstance(a, Tensor) and a.is_inference() and not torch.is_inference_mode_enabled() else a


def known(name: str, backend: str) -> None:
    """Raise ValueError unless there is such a backend."""
    if not isinstance(backend, str) or (backend != "auto" and backend not in BACKENDS):
        raise ValueError(
            f"backend {checks.shown(backend)} is unknown to {name}; use one of auto, {', '.join(BACKENDS)}"
        )


def backends(op: str, *args: Any, **kwargs: Any) -> dict[str, tuple[bool, str]]:
    """Which backends of an op can run a call, and why the others cannot.

    Args:
        op: the op's name.
        args: the arguments of the call, or the first of them. Without any, the answer is whether a backend can run here
            at all.
        kwargs: likewise.

    Returns:
        By backend: whether it can run the call, and the reason if it cannot, else "".

    Raises:
        ValueError: the op does not exist.
        TypeError: the op does not take these arguments.
    """
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"op {checks.shown(op)} is unknown: use {', '.join(OPS)}")
    given = inspect.signature(OPS[op].function).bind_partial(*args, **kwargs).arguments
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    reasons = {name: _refusal(OPS[op], name, tensors) for name in BACKENDS}
    return {name: (not reason, reason) for name, reason in reasons.items()}


def _log_once(message: str, level: int) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.log(level, message)


def forget() -> None:
    """Choose and log again from the next calls on, after a change of the environment."""
    _chosen.clear()
    _logged.clear()
    for op in OPS.values():
        op.launchers.clear()
