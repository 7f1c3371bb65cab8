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


@dataclass(frozen=True)
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
        return tuple(
            self.layouts[name](a, args[0]) if name in self.layouts and a is not None else a
            for name, a in zip(self.names, args)
        )

    def launcher(self, call: Call, args: tuple[Any, ...]) -> Callable[..., Any]:
        """A function that runs calls of the same kind as one with ``args``, given all arguments in order.

        It is generated, with everything that is the same in such calls as a constant: a call costs little more than
        the allocation of its results and the library's function.

        Args:
            call: the library's function.
            args: the op's arguments in their memory layouts. Those of other calls must have the same sizes, strides and
                dtypes, and be None where these are.
        """
        given, constants = dict(zip(self.names, args)), self.fields(*args)
        models = {name: value for name, value in constants.items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in constants.items() if name not in models}
        addresses: dict[str, str] = {}  # and numbers, that are not constants, as code
        for name, kind, *_ in self.struct._fields_:
            tensor, place = models.get(name, given.get(name)), name
            if issubclass(kind, (cf_vector, cf_tensor4)):
                place = f"{name}_data"
                constants |= {f"{name}_{each}": value for each, value in _description(kind, tensor).items()}
            if name in models:
                addresses[place] = f"{name}.data_ptr()"
            elif isinstance(tensor, Tensor):
                addresses[place] = f"{name}.data_ptr() or missing({name})"
            elif name in given:
                addresses[place] = "0" if tensor is None else name
        code = {name: f"_{name}" for name in constants} | addresses | {"threads": "get_num_threads()"}
        as_given = {id(a): name for name, a in given.items()}
        results = {name: as_given.get(id(model), f"like_{name}") for name, model in models.items()}
        source = LAUNCHER.format(
            constants=", ".join([*(f"_{name}" for name in constants), *(f"like_{name}" for name in models)]),
            arguments=", ".join(self.names),
            allocations="; ".join(f"{name} = empty_like({model})" for name, model in results.items()),
            fields=", ".join(code[name] for name, _ in self.struct.leaves()),
            results=", ".join(models),
        )
        common = call, self.struct.packing().pack, torch.empty_like, torch.get_num_threads, missing
        launch: Callable[..., Any] = _compiled(source, self.struct)(*common, *constants.values(), *models.values())
        return launch


LAUNCHER = """
def make(call, pack, empty_like, get_num_threads, missing, {constants}):
    def launch({arguments}):
        {allocations}
        call(pack({fields}))
        return {results}

    return launch
"""


@functools.cache
def _compiled(source: str, struct: type[Struct]) -> Callable[..., Any]:
    """The source's function ``make``."""
    file = f"<launcher of {struct.__name__}, {len(linecache.cache)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(compile(source, file, "exec"), namespace)
    make: Callable[..., Any] = namespace["make"]
    return make


def _description(kind: type[Struct], tensor: Tensor | None) -> dict[str, int]:
    """The numbers in a ``cf_vector`` or ``cf_tensor4`` without the address."""
    names = [name for name, _ in kind.leaves() if name != "data"]
    if tensor is None:
        return dict.fromkeys(names, 0)
    return dict(zip(names, (DTYPE_CODES[tensor.dtype], *tensor.stride())))


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

    def launcher(self, *args: Any) -> Callable[..., Any] | None:
        """See `Binding.launcher`; None if an argument does not have its memory layout."""
        if not all(map(operator.is_, args, self.binding.arranged(args))):
            return None
        launch, aligned = self.binding.launcher(self.function(args[0]), args), self.aligned
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
