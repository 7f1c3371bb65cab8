"""How a call of an op becomes a call of a native library.

An op's C++ and CUDA kernels take the same structure of csrc/abi.h. A `Binding` says once how an op's arguments fill it.
A `NativeKernel` is an implementation of the op by one of the libraries. It brings arguments into the memory layout that
the kernels read, allocates the results, packs the structure and calls the library's function.
"""

from __future__ import annotations

import functools
import linecache
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import layout
from .abi import Struct, cf_tensor4, cf_vector
from .native_library import DTYPE_CODES, Call
from .op import missing

# From an argument of an op and the op's first argument, the former in the memory layout that the kernels read. An
# argument that has this layout is returned as it is.
Layout = Callable[[Tensor, Tensor], Tensor]


def dense(a: Tensor, first: Tensor) -> Tensor:
    """Dense: channels innermost if the op's first argument has them so, else contiguous."""
    return layout.arrange(a, layout.is_channels_last(first))


def channels_innermost(a: Tensor, first: Tensor) -> Tensor:
    """(N, C, H, W) with channels innermost."""
    return a.contiguous(memory_format=torch.channels_last)


def contiguous(a: Tensor, first: Tensor) -> Tensor:
    """Contiguous."""
    return a.contiguous()


def contiguous_rows(a: Tensor, first: Tensor) -> Tensor:
    """(N, C) with contiguous rows, whatever is between the rows."""
    return a if a.stride(1) == 1 else a.contiguous()


def like(model: Tensor) -> Tensor:
    """The tensor without its memory: a model for results."""
    model.untyped_storage().resize_(0)
    return model


@dataclass(frozen=True, eq=False)
class Binding:
    """How an op's arguments fill the structure that its native kernels take.

    A field of the structure has its value from ``fields``, or from the op's argument of the same name: a pointer gets
    the address of the tensor (0 for None), a ``cf_vector`` or ``cf_tensor4`` describes the tensor, a number is copied.
    The field ``threads`` is torch's number of threads.

    Attributes:
        struct: the structure.
        fields: returns the other fields by name. It is given the op's arguments without ``backend``, in their layouts.
            Numbers must depend on the sizes, strides and dtypes of tensors and on arguments that are no tensors. A
            tensor is the model of a result: a new tensor of its sizes, strides, dtype and device, which the field
            points to or describes. The op returns its results in this order.
        layouts: by argument, the memory layout that the kernels read. Other arguments may have any.
        restore: returns the results in the layout that the op promises. It is given the results, and the op's first
            argument in the layout that the caller gave it.
    """

    struct: type[Struct]
    fields: Callable[..., dict[str, Any]]
    layouts: dict[str, Layout]
    restore: Callable[[Any, Tensor], Any] = field(default=lambda results, first: results)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The op's arguments without ``backend``, in order."""
        code = self.fields.__code__
        return code.co_varnames[: code.co_argcount]

    def arranged(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments in their memory layouts."""
        result = list(args)
        for i, in_layout in self._by_position:
            if (a := args[i]) is not None:
                result[i] = in_layout(a, args[0])
        return tuple(result)

    @functools.cached_property
    def _by_position(self) -> list[tuple[int, Layout]]:
        return [(self.names.index(name), in_layout) for name, in_layout in self.layouts.items()]

    def launcher(self, call: Call, args: tuple[Any, ...]) -> Callable[..., Any]:
        """A function that runs calls of the same kind as one with ``args``, given all arguments in order.

        It is generated, with everything that is the same in such calls as a constant: a call costs little more than
        the allocation of its results and the library's function.

        Args:
            call: the library's function.
            args: the op's arguments in their memory layouts. Those of other calls must have the same sizes, strides and
                dtypes, and be None where these are.
        """
        given, fields = dict(zip(self.names, args)), self.fields(*args)
        models = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        same = {id(a): name for name, a in given.items()}
        results = tuple((name, same.get(id(model), f"like_{name}")) for name, model in models.items())
        make, constants = _generated(self, tuple(map(_code, args)), tuple(fields), results)
        for name, kind, *_ in self.struct._fields_:
            if kind in DESCRIPTIONS:
                fields |= _description(name, kind, models.get(name, given.get(name)))
        common = call, self.struct.packing().pack, torch.empty_like, torch.get_num_threads, missing
        launch: Callable[..., Any] = make(*common, *models.values(), *map(fields.__getitem__, constants))
        return launch


DESCRIPTIONS = (cf_vector, cf_tensor4)
LAUNCHER = """
def make(call, pack, empty_like, get_num_threads, missing, {models}, {constants}):
    def launch({arguments}):
        {allocations}
        call(pack({numbers}))
        return {results}

    return launch
"""


def _code(a: Any) -> str:
    """What a launcher writes for an argument like this one, called {0}."""
    return "{0}.data_ptr() or missing({0})" if isinstance(a, Tensor) else "0" if a is None else "{0}"


@functools.cache
def _generated(
    binding: Binding, arguments: tuple[str, ...], fields: tuple[str, ...], results: tuple[tuple[str, str], ...]
) -> tuple[Callable[..., Any], list[str]]:
    """What makes launchers.

    Args:
        binding: of the op.
        arguments: the `_code` of each.
        fields: the names of those that `Binding.fields` gives.
        results: the name of each, and of the tensor that it is like: an argument, or like_NAME for its model.

    Returns:
        The function ``make`` of `LAUNCHER`, and the names of the constants that it takes.
    """
    names, given = dict(results), dict(zip(binding.names, arguments))
    code = {"threads": "get_num_threads()"}  # of the numbers that differ from call to call
    for name, kind, *_ in binding.struct._fields_:
        place = f"{name}_data" if kind in DESCRIPTIONS else name
        if name in names:
            code[place] = f"{name}.data_ptr()"
        elif name not in fields and name in given:
            code[place] = given[name].format(name)
    leaves = [name for name, _ in binding.struct.leaves()]
    constants = [name for name in leaves if name not in code]
    source = LAUNCHER.format(
        models=", ".join(f"like_{name}" for name in names),
        constants=", ".join(f"_{name}" for name in constants),
        arguments=", ".join(binding.names),
        allocations="; ".join(f"{name} = empty_like({model})" for name, model in results),
        numbers=", ".join(code.get(name, f"_{name}") for name in leaves),
        results=", ".join(names),
    )
    file = f"<launcher of {binding.struct.__name__}, {len(linecache.cache)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(compile(source, file, "exec"), namespace)
    return namespace["make"], constants


def _description(name: str, kind: type[Struct], tensor: Tensor | None) -> dict[str, int]:
    """The numbers in a ``cf_vector`` or ``cf_tensor4`` but the address, by their joined names."""
    if tensor is None:
        return {f"{name}_{each}": 0 for each, _ in kind.leaves()}
    numbers = {f"{name}_dtype": DTYPE_CODES[tensor.dtype]}
    if kind is cf_tensor4:
        numbers |= {f"{name}_strides_{i}": stride for i, stride in enumerate(tensor.stride())}
    return numbers


class NativeKernel:
    """An implementation of an op by a native library.

    Args:
        binding: how the op's arguments fill the structure.
        function: returns the library's function. It is given the op's first argument.
        layouts: by argument, layouts that differ from the binding's.
        aligned: arguments that the kernels need at a multiple of 16 bytes. Others are copied to one.
        yields: returns why "auto" should leave a call to the next backend, or "". It is given the op's arguments.
    """

    def __init__(
        self,
        binding: Binding,
        function: Callable[[Tensor], Call],
        layouts: dict[str, Layout] | None = None,
        aligned: Sequence[str] = (),
        yields: Callable[..., str] = lambda *args: "",
    ):
        self.binding = replace(binding, layouts=binding.layouts | (layouts or {}))
        self.function, self.yields = function, yields
        self.aligned = tuple(binding.names.index(name) for name in aligned)

    def __call__(self, *args: Any) -> Any:
        arranged = self._at_16_bytes(self.binding.arranged(args))
        return self.binding.restore(self.binding.launcher(self.function(args[0]), arranged)(*arranged), args[0])

    def launcher(self, *args: Any) -> Callable[..., Any]:
        """A function that runs calls of the same kind as one with ``args``, given all arguments in order.

        It may be given any arguments with the same sizes, strides and dtypes, None where these are, and the same
        numbers.
        """
        arranged = self.binding.arranged(args)
        launch, aligned = self.binding.launcher(self.function(args[0]), arranged), self.aligned
        if any(map(operator.is_not, args, arranged)):
            return lambda *args: self.binding.restore(launch(*self._at_16_bytes(self.binding.arranged(args))), args[0])
        if not aligned:
            return launch

        def launch_aligned(*args: Any) -> Any:  # addresses differ between calls of one kind
            for i in aligned:
                if args[i] is not None and args[i].data_ptr() % 16:
                    return launch(*self._at_16_bytes(args))
            return launch(*args)

        return launch_aligned

    def _at_16_bytes(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            a.clone() if i in self.aligned and a is not None and a.data_ptr() % 16 else a for i, a in enumerate(args)
        )

    def packed(self, *args: Any) -> bytes:
        """The structure that the library would be given. The call itself is not made."""
        taken: list[bytes] = []
        arranged = self.binding.arranged(args)
        self.binding.launcher(taken.append, arranged)(*arranged)
        return taken[0]
