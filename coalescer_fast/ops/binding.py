"""How a call of an op becomes a call of a native library.

An op's kernels in C++ and CUDA take the same structure of csrc/abi.h. A `Binding` says once how it is filled, and `NativeKernel` is the
implementation that one of the libraries gives of it: arguments are given the memory layout that the kernels read, results are allocated,
and the structure is packed by code that is generated for calls of one kind, with all that such calls have in common as constants.
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

# An argument of an op, and the op's first argument, to the former in the memory layout that kernels read: itself if it has it.
Layout = Callable[[Tensor, Tensor], Tensor]


def dense(a: Tensor, first: Tensor) -> Tensor:
    """Dense, with channels innermost if the op's first argument has them so, else contiguous."""
    return layout.arrange(a, layout.is_channels_last(first))


def channels_innermost(a: Tensor, first: Tensor) -> Tensor:
    """(N, C, H, W) with channels innermost."""
    return a.contiguous(memory_format=torch.channels_last)


def contiguous(a: Tensor, first: Tensor) -> Tensor:
    """Contiguous."""
    return a.contiguous()


def contiguous_rows(a: Tensor, first: Tensor) -> Tensor:
    """(N, C), each row contiguous, whatever is between the rows."""
    return a if a.stride(1) == 1 else a.contiguous()


def like(model: Tensor) -> Tensor:
    """The tensor without its memory, for results that are to be like it."""
    model.untyped_storage().resize_(0)
    return model


@dataclass(frozen=True)
class Binding:
    """How an op's arguments fill the structure that its native kernels take.

    A field of the structure has its value from ``fields`` or from the argument of its name: a pointer is the address of a tensor, 0 for
    None; a ``cf_vector`` or ``cf_tensor4`` describes the tensor; a number is that. The field ``threads`` is torch's number of threads.

    Attributes:
        struct: the structure.
        fields: from the op's arguments but ``backend``, in their memory layout, the other fields by name. They must be the same for
            arguments of the same sizes, strides, dtypes and numbers, unless a tensor: this stands for a result. A result is a new tensor
            like it; the field of its name gets its address or its description. The op returns its results in this order.
        layouts: by argument, the memory layout that the kernels read; others may have any.
        restore: from results and the op's first argument as it was given, the results in the layout that this asks for.
    """

    struct: type[Struct]
    fields: Callable[..., dict[str, Any]]
    layouts: dict[str, Layout]
    restore: Callable[[Any, Tensor], Any] = field(default=lambda results, first: results)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The op's arguments but ``backend``, in order."""
        code = self.fields.__code__
        return code.co_varnames[: code.co_argcount]

    def arranged(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments in their memory layout."""
        return tuple(
            self.layouts[name](a, args[0]) if name in self.layouts and a is not None else a
            for name, a in zip(self.names, args)
        )

    def launcher(self, call: Call, args: tuple[Any, ...]) -> Callable[..., Any]:
        """What runs calls like one with ``args``, given all arguments in order; they have their memory layout, as ``args`` have."""
        given, fields = dict(zip(self.names, args)), self.fields(*args)
        models = {name: fields.pop(name) for name, value in list(fields.items()) if isinstance(value, Tensor)}
        constants: dict[str, Any] = {f"_{name}": value for name, value in fields.items()}
        code = {name: f"_{name}" for name in fields}  # what each number of the structure is, by its joined name
        for name, kind, *_ in self.struct._fields_:
            tensor = models.get(name, given.get(name))
            place = name
            if issubclass(kind, (cf_vector, cf_tensor4)):
                place = f"{name}_data"
                for each, value in _described(kind, tensor).items():
                    code[f"{name}_{each}"] = f"_{name}_{each}"
                    constants[f"_{name}_{each}"] = value
            if name in models:
                code[place] = f"{name}.data_ptr()"
            elif isinstance(tensor, Tensor):
                code[place] = f"{name}.data_ptr() or missing({name})"
            elif name in given:
                code[place] = "0" if tensor is None else name
        code.setdefault("threads", "get_num_threads()")
        arguments = {id(a): name for name, a in given.items()}
        allocations = [f"{name} = empty_like({arguments.get(id(a), f'like_{name}')})" for name, a in models.items()]
        constants |= {f"like_{name}": a for name, a in models.items() if id(a) not in arguments}
        source = LAUNCHER.format(
            constants=", ".join(constants),
            arguments=", ".join(self.names),
            allocations="; ".join(allocations),
            fields=", ".join(code[name] for name, _ in self.struct.leaves()),
            results=", ".join(models),
        )
        make = _compiled(source, self.struct.__name__)
        common = call, self.struct.packing().pack, torch.empty_like, torch.get_num_threads, missing
        launch: Callable[..., Any] = make(*common, *constants.values())
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
def _compiled(source: str, struct: str) -> Callable[..., Any]:
    """The function ``make`` of the source."""
    file = f"<launcher of {struct} {len(linecache.cache)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(compile(source, file, "exec"), namespace)
    make: Callable[..., Any] = namespace["make"]
    return make


def _described(kind: type[Struct], tensor: Tensor | None) -> dict[str, int]:
    """The fields of a ``cf_vector`` or ``cf_tensor4`` but its address, by their joined names."""
    names = [name for name, _ in kind.leaves() if name != "data"]
    if tensor is None:
        return dict.fromkeys(names, 0)
    return dict(zip(names, (DTYPE_CODES[tensor.dtype], *tensor.stride())))


class NativeKernel:
    """The implementation of an op that a native library gives of a `Binding`.

    Args:
        binding: of the op.
        function: from the op's first argument, the library's function for calls on its device.
        layouts: by argument, a layout in place of the binding's.
        aligned: arguments that the kernels need at a multiple of 16 bytes; others are copied there.
        yields: from the op's arguments, why "auto" leaves the call to the next backend, or "".
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
        """What runs calls like this one, given all arguments in order; None if some have to get another memory layout first."""
        if not all(map(operator.is_, args, self.binding.arranged(args))):
            return None
        launch, aligned = self.binding.launcher(self.function(args[0]), args), self.aligned
        if not aligned:
            return launch

        def launch_aligned(*args: Any) -> Any:  # what calls are alike in says nothing of addresses
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
        """The structure that the library would get, for a call that is not made."""
        taken: list[bytes] = []
        arranged = self.binding.arranged(args)
        self.binding.launcher(taken.append, arranged)(*arranged)
        return taken[0]
