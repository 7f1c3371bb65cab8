"""Which backend runs an op, and why not a faster one.

"auto" takes the first of `PREFERENCE` that can run the call and says so in the log, once for every kind of call; a backend that was asked
for by name runs or raises. With ``COALESCER_FAST_STRICT=1`` "auto" raises where it would have to pass over a backend made for the device.
Only the reference carries gradients, forward-mode tangents and the transforms of ``torch.func``.

Every op is also ``torch.ops.coalescer_fast.NAME`` with the same arguments: that is what compilers, exporters and dispatch modes see. Plain
eager calls go to the backend directly, for torch's dispatcher would cost as much as a small kernel.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import operator
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import checks

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
        return "" if self.runtime is None else _differentiated(tensors, tensors.values())


BACKENDS = {
    "reference": Backend("reference"),
    "cpu": Backend("native", "cpu", FLOAT_AT_MOST_32, "native_library"),
    "triton": Backend("triton", "cuda", FLOAT_AT_MOST_32, "triton_launch", UNTRIED),
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
# By op, backend, scalars and signatures: what runs a call that was checked once, given the same arguments but the backend.
launchers: dict[Any, Callable[..., Any]] = {}
MOST_LAUNCHERS = 4096
_thread = threading.local()
_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling, _is_dynamo_compiling = torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling
_is_grad_enabled, _transforms_active = torch.is_grad_enabled, torch._C._are_functorch_transforms_active
_dispatch_modes, _tracing_state = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state


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
    _ops[name] = Op(
        function, _implementation(function.__module__, name, "reference"), overload, names, function.__module__
    )


def signature(t: Tensor | None) -> Any:
    """All that a launcher may depend on of a tensor, but its address. Contiguous tensors of one shape are alike: of strides, theirs may
    differ where there is but one element, and nothing steps there."""
    if t is None:
        return None
    try:
        return t.shape, t.is_contiguous() or t.stride(), t.dtype, t.device, t.is_neg()
    except (AttributeError, RuntimeError):  # not a tensor, or not a dense one, which the op's checks say
        return object()


def plain(x: Tensor) -> bool:
    """Whether a call on x is an ordinary one: nobody traces, compiles or watches it."""
    return type(x) in _PLAIN and not (_is_compiling() or _dispatch_modes() or _tracing_state())


def _signature_with_grad(t: Tensor | None) -> Any:
    return (signature(t), t.requires_grad, t.is_inference()) if isinstance(t, Tensor) else signature(t)


def signing(x: Tensor) -> Callable[[Tensor | None], Any] | None:
    """The function whose results of all tensors, with the scalars, are the key to `launchers`; None if a call on x is not `plain`, or has
    tangents or transforms to carry on, and must go through `run`.

    It asks as little as it can, for it is most of what a small call costs: an export that is not Dynamo's has modes of its own.
    """
    if (
        type(x) not in _PLAIN
        or forward_ad._current_level >= 0
        or _transforms_active()
        or _is_dynamo_compiling()
        or _dispatch_modes()
        or _tracing_state()
    ):
        return None
    return _signature_with_grad if _is_grad_enabled() else signature


def run(name: str, backend: str, *args: Any, key: Any = None) -> Any:
    """Run the op on the backend; ``args`` are checked, and in the schema's order. If there is a ``key``, what runs the call is left in
    `launchers` for the next calls of this key: a launcher, if the backend can prepare one, or the backend's function."""
    known(name, backend)
    op = _ops[name]
    reason = _differentiated(op.names, args)
    if (key is not None or plain(args[0])) and not any(map(_dispatches, args)):
        function = _choose(name, backend, args, reason)
        if function is not op.reference:
            resolved = tuple(map(_resolved, args))
        else:
            resolved = tuple(map(_tracked, args)) if reason else args
        if key is not None and all(map(operator.is_, args, resolved)):
            if len(launchers) >= MOST_LAUNCHERS:
                launchers.clear()
            prepare = getattr(function, "prepare", None)
            launchers[key] = (prepare and prepare(*args)) or function
        return function(*resolved)
    if backend == "reference" or (backend == "auto" and reason):
        return op.reference(*args)  # a compiler looks into it
    if reason:
        raise ValueError(f"backend {backend!r} cannot run this {name}: {reason}")
    if not _is_compiling() and getattr(_thread, "in_kernel", False):
        return _choose(name, backend, args, reason)(*args)
    return op.overload(**dict(zip(op.names, args)), backend=backend)


def _choose(name: str, backend: str, args: Sequence[Any], differentiated: str) -> Callable[..., Any]:
    """The function that runs this call, remembered by op, backend, device, shape, dtypes, and what is differentiated."""
    dtypes = [a.dtype for a in args if isinstance(a, Tensor)]
    key = (name, backend, args[0].device, args[0].shape, differentiated, *dtypes)
    function = _chosen.get(key)
    if function is None:
        if len(_chosen) >= MOST_LAUNCHERS:
            _chosen.clear()
        function = _chosen[key] = _implementation(_ops[name].package, name, _resolve(name, backend, args))
    return function


def _resolve(name: str, backend: str, args: Sequence[Any]) -> str:
    """The backend's name for this call. Raises ValueError if the backend asked for cannot run it."""
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


def _dispatches(a: Any) -> bool:
    """Whether the argument is of a class that must see the op, for it may have no memory of its own."""
    return (
        type(a) not in _PLAIN and isinstance(a, Tensor) and type(a).__torch_dispatch__ is not Tensor.__torch_dispatch__
    )


def _resolved(a: Any) -> Any:
    """The argument with memory that holds its values: torch leaves out a negation, and the zeros of forward-mode differentiation."""
    if not isinstance(a, Tensor):
        return a
    return torch.zeros_like(a) if a._is_zerotensor() else a.resolve_neg()


def _tracked(a: Any) -> Any:
    """The argument as autograd takes it, which saves no tensor that was made in inference mode."""
    return a.clone() if isinstance(a, Tensor) and a.is_inference() and not torch.is_inference_mode_enabled() else a


def _differentiated(names: Iterable[str], args: Iterable[Any]) -> str:
    """What the result must carry on beside its values, as only the reference can, or ""."""
    if _transforms_active():
        return "a transform of torch.func is at work, which only reference supports; expected a call outside it"
    for name, a in zip(names, args):
        if isinstance(a, Tensor):
            if _is_grad_enabled() and a.requires_grad:
                return f"{name} needs a gradient, which only reference has; expected a call under torch.no_grad()"
            if forward_ad._current_level >= 0 and forward_ad.unpack_dual(a).tangent is not None:
                return f"{name} has a forward-mode tangent, which only reference has; expected forward_ad.unpack_dual({name}).primal"
    return ""


def _implementation(package: str, name: str, backend: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"{package}.{BACKENDS[backend].module}"), name)


def known(name: str, backend: str) -> None:
    """Raise ValueError unless there is such a backend."""
    if not isinstance(backend, str) or (backend != "auto" and backend not in BACKENDS):
        raise ValueError(
            f"backend {checks.shown(backend)} is unknown to {name}; use one of auto, {', '.join(BACKENDS)}"
        )


def backends(op: str, *args: Any, **kwargs: Any) -> dict[str, tuple[bool, str]]:
    """For every backend of ``op``: whether it can run the call with these arguments, and if not, why.

    Args: the op's name and arguments that it would be called with, or the first of them; without any, whether the backend can run here
    at all.

    Raises: ValueError for an op that does not exist; TypeError for arguments that the op does not take.
    """
    if not isinstance(op, str) or op not in _ops:
        raise ValueError(f"op {checks.shown(op)} is unknown: use {', '.join(_ops)}")
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
