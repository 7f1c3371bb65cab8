"""Which backend runs an op, and why not a faster one.

"auto" takes the first of `PREFERENCE` that can run the call and says so in the log, once for every kind of call; a backend that was asked
for by name runs or raises. With ``COALESCER_FAST_STRICT=1`` "auto" raises where it would have to pass over a backend made for the device.

Every op is also ``torch.ops.coalescer_fast.NAME`` with the same arguments: that is what compilers, exporters and dispatch modes see. Plain
eager calls go to the backend directly, for torch's dispatcher would cost as much as a small kernel.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

FLOAT_AT_MOST_32 = (torch.float32, torch.float16, torch.bfloat16)
UNTRIED = "not yet run on a GPU"


@dataclass(frozen=True)
class Backend:
    """module: the file of an op's folder that implements it; device: the device type it is made for (None: any); dtypes: what every tensor
    may be (None: anything); runtime: the module beside this one whose ``unavailable()`` says why it cannot run here at all, and whose
    ``refusal(tensor)``, if it has one, why it cannot take a tensor all the same; note: what its users should know."""

    module: str
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    runtime: str | None = None
    note: str = ""

    def refusal(self, tensors: dict[str, Tensor]) -> str:
        """Why it cannot run on these arguments, or ""."""
        runtime = None if self.runtime is None else importlib.import_module(f".{self.runtime}", __package__)
        for name, tensor in tensors.items():
            # Triton's interpreter, and the tests' emulation of CUDA, run GPU kernels on CPU tensors
            if self.device not in (None, tensor.device.type) and not getattr(runtime, "INTERPRETED", False):
                return f"{name} is on {tensor.device}; expected a {self.device} device"
        if runtime is not None and (reason := runtime.unavailable()):
            return reason
        for name, tensor in tensors.items():
            if self.dtypes is not None and tensor.dtype not in self.dtypes:
                return f"{name} has dtype {tensor.dtype}; expected {', '.join(map(str, self.dtypes))}"
        if (refusal := getattr(runtime, "refusal", None)) is not None:
            for name, tensor in tensors.items():
                if reason := refusal(tensor):
                    return f"{name} {reason}"
        if self.runtime is not None and torch.is_grad_enabled():
            for name, tensor in tensors.items():
                if tensor.requires_grad:
                    return f"{name} needs a gradient, which only reference has; expected a call under torch.no_grad()"
        return ""


BACKENDS = {
    "reference": Backend("reference"),
    "cpu": Backend("native", "cpu", FLOAT_AT_MOST_32, "library"),
    "triton": Backend("triton", "cuda", FLOAT_AT_MOST_32, "triton_runtime", UNTRIED),
    "cuda": Backend("cuda", "cuda", FLOAT_AT_MOST_32, "cuda_library", UNTRIED),
}
# what "auto" tries, fastest first; a backend whose function has ``yields(*args)``, and gives a reason there, comes after the next that is
# made for the device
PREFERENCE = ("cuda", "triton", "cpu", "reference")


@dataclass
class Op:
    """A registered op: its public function, its reference implementation, its overload in torch.ops, the names of its arguments but the
    backend, and its folder."""

    function: Callable[..., Any]
    reference: Callable[..., Any]
    overload: Any
    names: tuple[str, ...]
    package: str


_ops: dict[str, Op] = {}
_library = torch.library.Library("coalescer_fast", "DEF")
_chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}
_logged: set[str] = set()
# By op, backend, signature and scalars: what runs a call that was checked once, given the same arguments but the backend.
launchers: dict[Any, Callable[..., Any]] = {}
MOST_LAUNCHERS = 4096
_thread = threading.local()
_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_dispatch_modes, _tracing_state = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_SCALARS = frozenset({type(None), bool, int, float, str})


def register(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make the public ``function`` an op, ``torch.ops.coalescer_fast.NAME``.

    ``schema`` has the function's arguments and defaults; ``fake`` gives the outputs' shapes, dtypes and strides from them. The
    implementations are the functions called NAME in the modules `Backend.module` beside ``function``, imported when first used; they take
    the arguments in the schema's order, without the backend.
    """
    name = _library.define(schema)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        _thread.in_kernel = True
        try:
            return function(*args, **kwargs)
        finally:
            _thread.in_kernel = False

    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"coalescer_fast::{name}", fake, lib=_library)
    overload = getattr(torch.ops.coalescer_fast, name).default
    names = tuple(argument.name for argument in overload._schema.arguments if argument.name != "backend")
    _ops[name] = Op(function, _implementation(function.__module__, name, "reference"), overload, names, function.__module__)


def signature(t: Tensor | None) -> tuple[Any, ...] | None:
    """All that a launcher may depend on of a tensor, but its address."""
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)


def plain(x: Tensor) -> bool:
    """Whether a call on x is an ordinary one: nobody traces, compiles or watches it."""
    return type(x) in _PLAIN and not (_is_compiling() or _dispatch_modes() or _tracing_state())


def eager(x: Tensor) -> bool:
    """Whether a call on x is `plain`, on a CPU or a GPU, and needs no gradient. Only then may `launchers` be used."""
    return (x.is_cpu or x.is_cuda) and not _is_grad_enabled() and plain(x)


def run(name: str, backend: str, *args: Any, key: Any = None) -> Any:
    """Run the op on the backend; ``args`` are checked, and in the schema's order. If ``key`` is given, the call is `eager`, and a backend
    that can prepare a launcher for calls of this key leaves it in `launchers`."""
    if key is not None or plain(args[0]):
        function = _choose(name, backend, args)
        prepare = getattr(function, "prepare", None)
        if key is not None and prepare is not None and (launcher := prepare(*args)) is not None:
            if len(launchers) >= MOST_LAUNCHERS:
                launchers.clear()
            launchers[key] = launcher
        return function(*args)
    known(name, backend)
    if backend == "reference" or (backend == "auto" and _needs_grad(args)):
        return _ops[name].reference(*args)  # a compiler looks into it
    if not _is_compiling() and getattr(_thread, "in_kernel", False):
        return _choose(name, backend, args)(*args)
    return _ops[name].overload(**dict(zip(_ops[name].names, args)), backend=backend)


def _choose(name: str, backend: str, args: Sequence[Any]) -> Callable[..., Any]:
    """The function that runs this call, remembered by op, backend, device, shape, dtypes, and whether a gradient is needed."""
    dtypes = [a.dtype for a in args if type(a) not in _SCALARS]
    key = (name, backend, args[0].device, args[0].shape, _is_grad_enabled() and _needs_grad(args), *dtypes)
    function = _chosen.get(key)
    if function is None:
        if len(_chosen) >= MOST_LAUNCHERS:
            _chosen.clear()
        function = _chosen[key] = _implementation(_ops[name].package, name, _resolve(name, backend, args))
    return function


def _resolve(name: str, backend: str, args: Sequence[Any]) -> str:
    """The backend's name for this call. Raises ValueError if the backend asked for cannot run it."""
    known(name, backend)
    tensors = {n: a for n, a in zip(_ops[name].names, args) if isinstance(a, Tensor)}
    if backend != "auto":
        if reason := BACKENDS[backend].refusal(tensors):
            raise ValueError(f"backend {backend!r} cannot run this {name}: {reason}")
        return backend
    passed_over: list[str] = []
    able: list[str] = []
    for candidate in PREFERENCE:
        if BACKENDS[candidate].device not in (None, args[0].device.type):
            continue
        if reason := BACKENDS[candidate].refusal(tensors):
            passed_over += [] if able else [f"not on {candidate}: {reason}"]
        else:
            able.append(candidate)
    chosen, *others = able
    if passed_over and os.environ.get("COALESCER_FAST_STRICT") == "1":
        raise ValueError(f"COALESCER_FAST_STRICT=1 forbids {name} to fall back to {chosen}; {'; '.join(passed_over)}")
    yields = getattr(_implementation(_ops[name].package, name, chosen), "yields", None)
    level = logging.WARNING if passed_over else logging.INFO
    if yields is not None and others and BACKENDS[others[0]].device is not None and (reason := yields(*args)):
        passed_over.append(f"not on {chosen}: {reason}")
        chosen = others[0]
    _log_once("; ".join([f"{name} runs on {chosen}", *passed_over]), level)
    return chosen


def _needs_grad(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any([isinstance(a, Tensor) and a.requires_grad for a in args])


def _implementation(package: str, name: str, backend: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"{package}.{BACKENDS[backend].module}"), name)


def known(name: str, backend: str) -> None:
    """Raise ValueError unless there is such a backend."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown to {name}; use one of auto, {', '.join(BACKENDS)}")


def backends(op: str, *args: Any, **kwargs: Any) -> dict[str, tuple[bool, str]]:
    """For every backend of ``op``: whether it can run the call with these arguments, and if not, why.

    Args: the op's name and arguments that it would be called with, or the first of them; without any, whether the backend can run here
    at all.

    Raises: ValueError for an op that does not exist; TypeError for arguments that the op does not take.
    """
    if op not in _ops:
        raise ValueError(f"op {op!r} is unknown: use {', '.join(_ops)}")
    given = inspect.signature(_ops[op].function).bind_partial(*args, **kwargs).arguments
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    reasons = {name: backend.refusal(tensors) for name, backend in BACKENDS.items()}
    return {name: (not reason, reason) for name, reason in reasons.items()}


def _log_once(message: str, level: int) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.log(level, message)


def forget() -> None:
    """Choose anew, and log anew, from the next calls on: after a change of the environment."""
    _chosen.clear()
    _logged.clear()
    launchers.clear()
