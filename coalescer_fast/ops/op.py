"""The declaration of an op, and the fast path of its calls.

`declare` makes a public function an op. The function checks its arguments and ends in `dispatch.run`, which chooses a
backend; `declare` adds two things:

- It registers the function as ``torch.ops.coalescer_fast.NAME``, which is what compilers, exporters and dispatch modes
  see. `torch.library.infer_schema` reads the schema off the function's annotations.
- It puts a fast path in front of the function. Once arguments of certain sizes, strides, dtypes and numbers have passed
  the checks, a call with arguments of the same kind goes straight to the launcher that ran the first one.

To add an op NAME with a reference, a CPU and a Triton implementation, six files are enough:

1. ``csrc/abi.h``: the structure ``cf_NAME_args``, and ``OP(NAME)`` in ``CF_OPS``, from which the function
   ``cf_cpu_NAME`` and its declaration come.
2. ``csrc/cpu/``: the functions ``valid(args)`` and ``NAME(args, threads)``, in the header of a kernel that is close to
   it. In a header of its own, that is one more line, in ``kernels.h``.
3. ``ops/kernels/NAME/__init__.py``: the public function with its formula, the structure by field name, and under
   ``@op.declare`` the fake, the example, the reference and the binding to the native library. What is long gets a file
   of its own: ``reference.py``, ``native.py``, ``cuda.py``.
4. ``ops/kernels/NAME/triton.py``: the Triton kernel and its launch. Triton is imported only when this is used.
5. ``ops/__init__.py``: the function's name.
6. ``tests/ops/test_NAME.py``: ``OP = "NAME"``, and the formula against float64. ``tests/ops/test_every_op.py`` and its
   neighbours test what holds for every op, by the example: structures against the header, errors against the reference
   in float64, fakes, ``opcheck``, ``torch.compile``, export, gradients, transforms and unusual tensors.
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
# A function, or the name of the module, relative to the public function's, that has one by the op's name.
Implementation = Callable[..., Any] | str

MOST_LAUNCHERS = 4096

_library = torch.library.Library("coalescer_fast", "DEF")
_thread = threading.local()
_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling, _is_dynamo_compiling = torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_dispatch_modes, _tracing_state = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state


class NoMemory(TypeError):
    """An argument of a launcher has no memory of its own. The call has to go through the checks."""


def missing(x: Tensor) -> int:
    """The address of a tensor whose ``data_ptr()`` is 0, which is right for a tensor without elements.

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
        names: its arguments without ``backend``, in the schema's order. Implementations take them in this order.
        implementations: by backend.
        example: returns the arguments of a small call without ``backend``, by name, for tests and benchmarks. It is
            given a function that draws a tensor of a shape.
        key: returns the key of a call in ``launchers``, or None if it must go through the checks. It is given the
            arguments in order, then the backend.
        launchers: by key, the function that runs such calls, given the arguments in order.
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
        """The backend's implementation, imported when it is first asked for.

        Raises:
            KeyError: the op has none for this backend.
        """
        found = self.implementations[backend]
        if isinstance(found, str):
            found = getattr(importlib.import_module(found, self.function.__module__), self.name)
            self.implementations[backend] = found
        return found

    def remember(self, key: Any, launcher: Callable[..., Any]) -> None:
        """Let the launcher run the calls with this key from now on."""
        if len(self.launchers) >= MOST_LAUNCHERS:
            self.launchers.clear()
        with contextlib.suppress(TypeError):  # a number of a class without a hash
            self.launchers[key] = launcher


# All ops by name. Importing `coalescer_fast.ops` declares its ops.
OPS: dict[str, Op] = {}


def declare(
    *,
    fake: Callable[..., Any],
    example: Callable[[Callable[..., Tensor]], dict[str, Any]],
    **implementations: Implementation,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a public function to make it an op.

    The function's first argument is a tensor, its last one is ``backend``. It raises an error for arguments that are
    not allowed, and returns ``dispatch.run(NAME, backend, *others)`` with the others in the order of its signature.

    Args:
        fake: returns empty results with the right shapes, dtypes and strides, for tracing. It is given the function's
            arguments.
        example: see `Op`.
        implementations: by backend, a function that is given all arguments without ``backend``, in order; or the name
            of a module that has one, such as ``".triton"``, which is imported when it is first used.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        # infer_schema lets a compiler keep an int symbolic; no kernel takes one that is not a number
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
        OPS[name].implementation("reference")  # now: a compiler that looks into the op cannot look into an import
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
            except (KeyError, TypeError):  # the first call of its kind; an argument without a hash
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
    """The function with a look into ``launchers`` in front of it, and the function that computes keys.

    Both are generated for the function's arguments: collecting these in a tuple and a dict would cost more than the
    rest of the fast path.
    """
    arguments = [argument for argument in schema.arguments if argument.name != "backend"]
    kinds = {argument.name: str(argument.type) for argument in arguments}
    positional = [argument.name for argument in arguments if not argument.kwarg_only]
    keywords = [argument.name for argument in schema.arguments if argument.kwarg_only]
    signatures = {
        "Tensor": "signature({0})",
        "Optional[Tensor]": "None if {0} is None else signature({0})",
    }
    key = ["backend", *(signatures.get(kind, "{0}").format(name) for name, kind in kinds.items())]
    # 2.0 and True have the hashes of 2 and 1, but the checks refuse them
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
    public.__defaults__, public.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return functools.update_wrapper(public, function), find_key


def signature(t: Tensor | None) -> Any:
    """What a launcher may depend on of a tensor: everything but its address and its values.

    Contiguous tensors of one shape count as alike. Their strides may differ only in dimensions of size 1, where no
    kernel takes a step.
    """
    if t is None:
        return None
    try:
        return t.shape, t.is_contiguous() or t.stride(), t.dtype, t.device, t.is_neg()
    except (AttributeError, RuntimeError):  # not a dense tensor: like no other, so that the checks see it
        return object()


def _signature_with_grad(t: Tensor | None) -> Any:
    return (signature(t), t.requires_grad, t.is_inference()) if isinstance(t, Tensor) else signature(t)


def signing(x: Tensor) -> Callable[[Tensor | None], Any] | None:
    """The function that describes tensors in the key of a call whose first argument is x.

    None if the call is not `plain`, or has tangents or transforms of torch.func to carry on: it must then go through
    the checks. This is most of what a small call costs, so it looks at no more than it must. (An export that does not
    use Dynamo has dispatch modes.)
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
    """Whether a call on x is an ordinary one, which nobody traces, compiles or watches."""
    return type(x) in _PLAIN and not (_is_compiling() or _dispatch_modes() or _tracing_state())


def dispatches(a: Any) -> bool:
    """Whether the argument's class handles ops itself. It then has to see the op, and may have no memory of its own."""
    return (
        type(a) not in _PLAIN and isinstance(a, Tensor) and type(a).__torch_dispatch__ is not Tensor.__torch_dispatch__
    )


def differentiated(names: tuple[str, ...], args: tuple[Any, ...]) -> str:
    """Why only the reference can run the call: a gradient, tangent or transform has to be carried on. Else ""."""
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
