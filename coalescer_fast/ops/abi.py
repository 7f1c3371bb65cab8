"""The structures and enums of csrc/abi.h, declared by field name and under the names that they have there.

Those of an op's arguments are in the op's folder, those of a step's in runtime/native/steps.py.

What a field means is said in csrc/abi.h. Both files must be changed together: tests/ops/test_abi.py compiles the header
and compares every field's type, offset and size, and every enum's value, with the declarations here.

Arguments are packed in one of two ways::

    abi.cf_gate_args.pack(value=..., gate=..., y=..., ...)       # bytes, for calls that are rare

    pack = abi.cf_gate_args.packer(dtype=0, rows=8, ...)         # what is the same in many calls, once
    pack(value=..., gate=..., y=...)                             # bytes: the other fields, in every call

`Struct.packer` knows a nested structure's fields by joined names: ``bias_data`` and ``bias_dtype`` of a ``cf_vector``
called ``bias``.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from ctypes import c_double, c_int64, c_void_p
from enum import IntEnum
from typing import Any, ClassVar

# CF_ABI_VERSION: a library of another version is refused.
ABI_VERSION = 3

_FORMATS = {c_void_p: "P", c_int64: "q", c_double: "d"}


class Struct(ctypes.Structure):
    """A structure of csrc/abi.h, whose ``_fields_`` are of 64 bits each, nested structures, or arrays of either."""

    def __init__(self, **fields: Any):
        """Set every field, or none: then all are zero. None is a null pointer, and a nested structure of zeros.

        Raises:
            TypeError: a field is missing, or there is none of this name.
        """
        wrong = fields.keys() ^ {name for name, *_ in self._fields_} if fields else ()
        if wrong:
            raise TypeError(
                f"{type(self).__name__} lacks these fields, or has none so called: {', '.join(sorted(wrong))}"
            )
        for name, value in fields.items():
            if value is not None:
                setattr(self, name, value)

    @classmethod
    def pack(cls, **fields: Any) -> bytes:
        """The structure's bytes; arguments as of the constructor."""
        return bytes(cls(**fields))

    @classmethod
    def packer(cls, **constants: float | tuple[float, ...]) -> Callable[..., bytes]:
        """A function from the fields that are not among ``constants``, given by keyword, to the structure's bytes.

        All numbers must be given as such: 0 for a null pointer. An array in ``constants`` is a tuple.

        Raises:
            TypeError: a constant is no field.
        """
        values: dict[str, float] = {}
        for name, value in constants.items():
            if isinstance(value, tuple):
                values |= {f"{name}_{i}": each for i, each in enumerate(value)}
            else:
                values[name] = value
        return _packer_of(cls, tuple(values))(*values.values())

    @classmethod
    @functools.cache
    def packing(cls) -> struct.Struct:
        """The structure as `struct` has it, its numbers in the order of `leaves`."""
        result = struct.Struct("".join(code for _, code in cls.leaves()))
        if result.size != ctypes.sizeof(cls):
            raise TypeError(f"{cls.__name__} has padding: all its numbers have to have 64 bits")
        return result

    @classmethod
    def leaves(cls) -> list[tuple[str, str]]:
        """The joined name of every number in the structure, and its format in `struct`."""
        found: list[tuple[str, str]] = []
        for name, kind, *_ in cls._fields_:
            found += [("_".join([name, *path]), code) for path, code in _flat(kind)]
        return found


def _flat(kind: Any) -> list[tuple[list[str], str]]:
    """The paths, below a field of this type, to the numbers in it."""
    if issubclass(kind, ctypes.Array):
        return [([str(i), *path], code) for i in range(kind._length_) for path, code in _flat(kind._type_)]
    if issubclass(kind, Struct):
        return [([name, *path], code) for name, each, *_ in kind._fields_ for path, code in _flat(each)]
    return [([], _FORMATS[kind])]


@functools.cache
def _packer_of(cls: type[Struct], constants: tuple[str, ...]) -> Callable[..., Callable[..., bytes]]:
    """A function from the constants' values, in this order, to the packer.

    It is compiled, so that a call takes as little time as one with all arguments written out by hand.
    """
    names = [name for name, _ in cls.leaves()]
    if unknown := sorted(set(constants) - set(names)):
        raise TypeError(f"{cls.__name__} has no such fields: {', '.join(unknown)}")
    given = [name for name in names if name not in constants]
    keywords = f"*, {', '.join(given)}" if given else ""
    code = f"lambda {', '.join(constants)}: lambda {keywords}: pack({', '.join(names)})"
    make: Callable[..., Callable[..., bytes]] = eval(code, {"pack": cls.packing().pack})
    return make


class cf_dtype(IntEnum):
    CF_FLOAT32 = 0
    CF_FLOAT16 = 1
    CF_BFLOAT16 = 2
    CF_UINT8 = 3


class cf_status(IntEnum):
    CF_OK = 0
    CF_INVALID_ARGUMENT = 1
    CF_OUT_OF_MEMORY = 2
    CF_CUDA_ERROR = 1000


class cf_function(IntEnum):
    CF_IDENTITY = 0
    CF_SILU = 1
    CF_TANH = 2


class cf_vector(Struct):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("dtype", c_int64),
    ]


class cf_tensor4(Struct):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("dtype", c_int64),
        ("strides", c_int64 * 4),
    ]


class cf_image(Struct):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("dtype", c_int64),
        ("row", c_int64),
        ("sample", c_int64),
        ("border", c_int64),
    ]


class cf_quantisation(Struct):
    _fields_: ClassVar = [
        ("inverse", c_void_p),
        ("zero", c_void_p),
    ]


class cf_heads(Struct):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("sample", c_int64),
        ("head_stride", c_int64),
        ("row", c_int64),
    ]


# Programs; the arguments of their steps are declared in runtime/native/steps.py.


class cf_step(Struct):
    _fields_: ClassVar = [
        ("kind", c_int64),
        ("args", c_void_p),
    ]


class cf_program_args(Struct):
    _fields_: ClassVar = [
        ("steps", c_void_p),
        ("count", c_int64),
        ("threads", c_int64),
    ]


class cf_span(Struct):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("bytes", c_int64),
    ]


class cf_fingerprint_args(Struct):
    _fields_: ClassVar = [
        ("spans", c_void_p),
        ("count", c_int64),
        ("whole", c_int64),
        ("samples", c_int64),
        ("hash", c_void_p),
    ]


class cf_cuda_device(Struct):
    _fields_: ClassVar = [
        ("ordinal", c_int64),
        ("capability", c_int64),
        ("multiprocessors", c_int64),
        ("shared_memory", c_int64),
    ]


class cf_cuda_plan(Struct):
    _fields_: ClassVar = [
        ("launches", c_int64),
        ("blocks", c_int64),
        ("threads", c_int64),
        ("shared_memory", c_int64),
        ("cluster", c_int64),
        ("vector", c_int64),
        ("workspace", c_int64),
    ]
