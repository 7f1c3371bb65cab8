"""The declaration of an op: `declare` makes a public function an op, and says in one place all that there is of it.

A declared function checks its arguments and ends in `dispatch.run`, which chooses a backend. `declare` adds two things to it. It registers
the function as ``torch.ops.coalescer_fast.NAME``, with the schema that `torch.library.infer_schema` reads off its annotations: that is what
compilers, exporters and dispatch modes see. And it puts a fast path before the checks: when arguments of the same sizes, strides, dtypes
and numbers have been checked once, the call goes straight to what ran it then.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import linecache
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .layout import transforms_active

P = ParamSpec("P")
R = TypeVar("R")
# What an implementation of an op is: a function, or the module, beside that of the public function, which has one of the op's name.
Implementation = Callable[..., Any] | str

MOST_LAUNCHERS = 4096

_library = torch.library.Library("coalescer_fast", "DEF")
_thread = threading.local()
_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling, _is_dynamo_compiling = torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_dispatch_modes, _tracing_state = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state


class NoMemory(TypeError):
    """An argument of a launcher has no memory of its own, and the call must go through the checks."""


def missing(x: Tensor) -> int:
    """The address of a tensor whose ``data_ptr()`` is 0: a tensor without elements has none.

    Raises:
        NoMemory: the tensor has elements.
    """
    if x.numel():
        raise NoMemory(f"a tensor of shape {tuple(x.shape)} has no memory")
    return 0


@dataclass
class Op:
    """A declared op.

    Attributes:
        name: its name, in `coalescer_fast.ops` and in ``torch.ops.coalescer_fast``.
        function: the public function.
        overload: ``torch.ops.coalescer_fast.NAME.default``.
        names: its arguments but ``backend``, in the schema's order, which is also the order in which implementations take them.
        implementations: by backend.
        example: from a function that draws a tensor of a shape, all arguments but ``backend`` of a small call, for tests and benchmarks.
        key: from the arguments in order and the backend, what a launcher may depend on, but addresses; None if there may be none.
        launchers: by key, what runs a call that was checked once, given the arguments in order.
    """

    name: str
    function: Callable[..., Any]
    overload: Any
    names: tuple[str, ...]
    implementations: dict[str, Implementation]
    example: Callable[[Callable[..., Tensor]], dict[str, Any]]
    key: Callable[..., Any]
    launchers: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def implementation(self, backend: str) -> Callable[..., Any]:
        """The backend's function, imported when it is first asked for.

        Raises:
            KeyError: the op has none for this backend.
        """
        found = self.implementations[backend]
        if isinstance(found, str):
            found = getattr(importlib.import_module(found, self.function.__module__), self.name)
            self.implementations[backend] = found
        return found

    def remember(self, key: Any, launcher: Callable[..., Any]) -> None:
        """Run calls of this key by the launcher from now on."""
        if len(self.launchers) >= MOST_LAUNCHERS:
            self.launchers.clear()
        with contextlib.suppress(TypeError):  # a number of a class without a hash
            self.launchers[key] = launcher


# All ops by name; those of `coalescer_fast.ops` are here once it is imported.
OPS: dict[str, Op] = {}


def declare(
    *,
    fake: Callable[..., Any],
    example: Callable[[Callable[..., Tensor]], dict[str, Any]],
    **implementations: Implementation,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a public function an op.

    The function's first argument is a tensor, and its last one is ``backend``. It raises for arguments that are not allowed, and returns
    ``dispatch.run(NAME, backend, *others)``, the others in the order of its signature.

    Args:
        fake: from the function's arguments, results of the right shapes, dtypes and strides, for tracing.
        example: see `Op`.
        implementations: by backend, functions of all arguments but ``backend``, in order, or the names of modules that have one, such as
            ``".triton"``: these are imported when they are first used.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        # a SymInt is an int that a compiler knows by its symbol, and no backend takes one
        schema = torch.library.infer_schema(function, mutates_args=(), op_name=name).replace("SymInt", "int")
        _library.define(schema)
        overload = getattr(torch.ops.coalescer_fast, name).default
        launchers: dict[Any, Callable[..., Any]] = {}
        public, key = _with_fast_path(function, overload._schema, launchers)

        def kernel(*args: Any, **kwargs: Any) -> Any:
            _thread.in_kernel = True
            try:
                return public(*args, **kwargs)
            finally:
                _thread.in_kernel = False

        _library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"coalescer_fast::{name}", fake, lib=_library)
        names = tuple(argument.name for argument in overload._schema.arguments)[:-1]
        OPS[name] = Op(name, public, overload, names, implementations, example, key, launchers)
        return public

    return decorate


def in_kernel() -> bool:
    """Whether torch's dispatcher has called the op, in this thread."""
    return getattr(_thread, "in_kernel", False)


FAST_PATH = """
def make(function, launchers, signing, NoMemory):
    def key({arguments}, backend):
        if (signature := signing({first})) is None{integers_or}:
            return None
        return {key}

    def {name}({parameters}):
        if (signature := signing({first})) is not None{integers_and}:
            try:
                launch = launchers[{key}]
            except (KeyError, TypeError):  # the first call of its kind; arguments without a hash, which the checks refuse
                pass
            else:
                try:
                    return launch({arguments})
                except NoMemory:
                    pass
        return function({call})

    return {name}, key
"""


def _with_fast_path(
    function: Callable[P, R], schema: Any, launchers: dict[Any, Callable[..., Any]]
) -> tuple[Callable[P, R], Callable[..., Any]]:
    """The function behind a look at ``launchers``, and what gives their keys; compiled, so that no argument is packed or unpacked."""
    arguments = [argument for argument in schema.arguments if argument.name != "backend"]
    kinds = {argument.name: str(argument.type) for argument in arguments}
    positional = [argument.name for argument in arguments if not argument.kwarg_only]
    keywords = [argument.name for argument in schema.arguments if argument.kwarg_only]
    signatures = {
        "Tensor": "signature({0})",
        "Optional[Tensor]": "None if {0} is None else signature({0})",
    }
    key = ["backend", *(signatures.get(kind, "{0}").format(name) for name, kind in kinds.items())]
    # 2.0 and True are keys like 2 and 1, and the checks refuse them
    integers = [name for name, kind in kinds.items() if kind == "int"]
    source = FAST_PATH.format(
        name=function.__name__,
        first=arguments[0].name,
        arguments=", ".join(kinds),
        parameters=", ".join([*positional, "*", *keywords]),
        call=", ".join([*positional, *(f"{name}={name}" for name in keywords)]),
        key=f"({', '.join(key)})",
        integers_and="".join(f" and type({name}) is int" for name in integers),
        integers_or="".join(f" or type({name}) is not int" for name in integers),
    )
    file = f"<fast path of {function.__name__}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(compile(source, file, "exec"), namespace)
    public, find_key = namespace["make"](function, launchers, signing, NoMemory)
    public.__defaults__, public.__kwdefaults__ = function.__defaults__, function.__kwdefaults__  # type: ignore[attr-defined]
    return functools.update_wrapper(public, function), find_key


def signature(t: Tensor | None) -> Any:
    """All that a launcher may depend on of a tensor, but its address.

    Contiguous tensors of one shape are alike: of strides, theirs may differ where there is but one element, and nothing steps there.
    """
    if t is None:
        return None
    try:
        return t.shape, t.is_contiguous() or t.stride(), t.dtype, t.device, t.is_neg()
    except (AttributeError, RuntimeError):  # not a tensor, or not a dense one, which the op's checks say
        return object()


def _signature_with_grad(t: Tensor | None) -> Any:
    return (signature(t), t.requires_grad, t.is_inference()) if isinstance(t, Tensor) else signature(t)


def signing(x: Tensor) -> Callable[[Tensor | None], Any] | None:
    """The function whose results of all tensors, with the other arguments, are the key of a call on x.

    None if a call on x is not `plain`, or has tangents or transforms to carry on, and must go through the checks. It asks as little as it
    can, for it is most of what a small call costs: an export that is not Dynamo's has modes of its own.
    """
    if (
        type(x) not in _PLAIN
        or forward_ad._current_level >= 0
        or transforms_active()
        or _is_dynamo_compiling()
        or _dispatch_modes()
        or _tracing_state()
    ):
        return None
    return _signature_with_grad if _is_grad_enabled() else signature


def plain(x: Tensor) -> bool:
    """Whether a call on x is an ordinary one: nobody traces, compiles or watches it."""
    return type(x) in _PLAIN and not (_is_compiling() or _dispatch_modes() or _tracing_state())


def dispatches(a: Any) -> bool:
    """Whether the argument is of a class that must see the op, for it may have no memory of its own."""
    return (
        type(a) not in _PLAIN and isinstance(a, Tensor) and type(a).__torch_dispatch__ is not Tensor.__torch_dispatch__
    )


def differentiated(names: tuple[str, ...], args: tuple[Any, ...]) -> str:
    """What the result must carry on beside its values, as only the reference can, or ""."""
    if transforms_active():
        return "a transform of torch.func is at work, which only reference supports; expected a call outside it"
    for name, a in zip(names, args):
        if isinstance(a, Tensor):
            if _is_grad_enabled() and a.requires_grad:
                return f"{name} needs a gradient, which only reference has; expected a call under torch.no_grad()"
            if forward_ad._current_level >= 0 and forward_ad.unpack_dual(a).tangent is not None:
                return (
                    f"{name} has a forward-mode tangent, which only reference has; "
                    f"expected forward_ad.unpack_dual({name}).primal"
                )
    return ""
