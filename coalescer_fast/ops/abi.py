"""Structures and enums of csrc/abi.h, declared by field name and under the names that they have there.

The structure of an op's arguments is in the op's folder, that of a step's in runtime/native/steps.py. What a field
means is said in csrc/abi.h. A declaration must be changed together with the header: tests/ops/test_abi.py compiles the
header and compares the type, offset and size of every field, and the value of every enum.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from ctypes import c_double, c_int64, c_void_p
from enum import IntEnum
from typing import Any, ClassVar

# CF_ABI_VERSION: a library of another version is refused.
ABI_VERSION = 6

_FORMATS = {c_void_p: "P", c_int64: "q", c_double: "d"}


class Struct(ctypes.Structure):
    """A structure of csrc/abi.h. All numbers in it have 64 bits.

    Args:
        fields: all fields by name, or none for a structure of zeros. None stands for a null pointer and for a nested
            structure of zeros.

    Raises:
        TypeError: a field is missing, or the structure has none of this name.
    """

    def __init__(self, **fields: Any):
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
        """The structure's bytes. The arguments are those of the constructor."""
        return bytes(cls(**fields))

    @classmethod
    @functools.cache
    def packing(cls) -> struct.Struct:
        """Packs the numbers of the structure, in the order of `leaves`."""
        result = struct.Struct("".join(code for _, code in cls.leaves()))
        if result.size != ctypes.sizeof(cls):
            raise TypeError(f"{cls.__name__} has padding: all its numbers have to have 64 bits")
        return result

    @classmethod
    @functools.cache
    def leaves(cls) -> list[tuple[str, str]]:
        """The name of every number in the structure, and its format in `struct`.

        Names are joined by underscores: a ``cf_vector`` named bias has ``bias_data`` and ``bias_dtype``.
        """
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


class cf_form(IntEnum):
    CF_DIRECT = 0
    CF_WINOGRAD_2 = 2
    CF_WINOGRAD_4 = 4


class cf_function(IntEnum):
    CF_IDENTITY = 0
    CF_SILU = 1
    CF_TANH = 2
    CF_RELU = 3
    CF_GELU = 4
    CF_GELU_TANH = 5
    CF_SIGMOID = 6


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


class cf_pack_args(Struct):
    _fields_: ClassVar = [
        ("weight", cf_tensor4),
        ("packed", c_void_p),
        ("dtype", c_int64),
        ("outputs", c_int64),
        ("channels", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("step", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("sums", c_void_p),
        ("form", c_int64),
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


class cf_content_hash_args(Struct):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("bytes", c_int64),
        ("seed", c_int64),
        ("hash", c_void_p),
        ("threads", c_int64),
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
