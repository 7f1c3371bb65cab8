"""The declarations of coalescer_fast.ops.abi are those of csrc/abi.h, field by field."""

from __future__ import annotations

import ctypes
import inspect
import os
import re
import shlex
import shutil
import subprocess
from enum import IntEnum
from pathlib import Path

import pytest
import torch

from coalescer_fast.ops import abi
from coalescer_fast.ops.kernels.bias_residual.native import cf_bias_residual_args
from coalescer_fast.ops.op import OPS
from coalescer_fast.runtime.native import steps

from ..helpers.examples import example

HEADER = Path(__file__).parents[2] / "csrc" / "abi.h"
for op in OPS.values():
    op.implementation("cpu")  # imports the module that declares the structure
STRUCTS = {struct.__name__: struct for struct in abi.Struct.__subclasses__()}
ENUMS = {
    name: each
    for name, each in inspect.getmembers(abi, inspect.isclass)
    if issubclass(each, IntEnum) and each is not IntEnum
}
CC = shlex.split(os.environ.get("CC", "")) or [next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")]

pytestmark = pytest.mark.skipif(not (HEADER.is_file() and shutil.which(CC[0])), reason="needs csrc and a C compiler")


def output(*command: str | Path, text: str = "") -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def header() -> str:
    """csrc/abi.h without comments and macros."""
    return output(*CC, "-E", "-P", HEADER)


@pytest.fixture(scope="module")
def structs(header) -> dict[str, dict[str, str]]:
    """For every structure of the header: its fields and their types, the length of an array included."""
    found = {}
    for body, name in re.findall(r"typedef struct \{([^}]*)\}\s*(cf_\w+);", header):
        fields = found[name] = {}
        for kind, names in re.findall(r"(?:const )?(\w+)\b([^;]*);", body):
            for stars, field, length in re.findall(r"(\*?)\s*(\w+)(\[\d+\])?(?:,|$)", names.strip()):
                fields[field] = ("pointer" if stars else kind) + length
    assert sorted(found) == sorted(re.findall(r"\}\s*(cf_\w+);", header))
    return found


@pytest.fixture(scope="module")
def enums(header) -> dict[str, list[str]]:
    found = re.findall(r"enum (cf_\w+) \{([^}]*)\}", header)
    return {name: re.findall(r"(\w+)\s*=", body) for name, body in found}


@pytest.fixture(scope="module")
def compiled(structs, enums, tmp_path_factory) -> dict[str, list[int]]:
    """What a C compiler makes of the header: every field's offset and size, every structure's size, every constant."""
    lines = ['printf("CF_ABI_VERSION %d\\n", CF_ABI_VERSION);']
    for name, fields in structs.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field in fields:
            place = f"offsetof({name}, {field}), sizeof((({name}*)0)->{field})"
            lines.append(f'printf("{name}.{field} %zu %zu\\n", {place});')
    for values in enums.values():
        lines += [f'printf("{value} %d\\n", (int){value});' for value in values]
    program = tmp_path_factory.mktemp("abi") / "layout"
    source = (
        f'#include <stdio.h>\n#include <stddef.h>\n#include "{HEADER}"\nint main(void) {{\n'
        + "\n".join(lines)
        + "\n}\n"
    )
    output(*CC, "-x", "c", "-", "-o", program, text=source)
    return {name: [*map(int, numbers)] for name, *numbers in map(str.split, output(program).splitlines())}


def kind(declared: type) -> str:
    """A field's type in the header's words."""
    if issubclass(declared, ctypes.Array):
        return f"{kind(declared._type_)}[{declared._length_}]"
    return {ctypes.c_void_p: "pointer", ctypes.c_int64: "int64_t", ctypes.c_double: "double"}.get(
        declared, declared.__name__
    )


def test_every_structure_has_the_headers_fields_at_their_places(structs, compiled):
    assert STRUCTS.keys() == structs.keys()
    for name, struct in STRUCTS.items():
        assert {field: kind(declared) for field, declared in struct._fields_} == structs[name], name
        assert compiled[name] == [ctypes.sizeof(struct)], name
        for field in structs[name]:
            place = getattr(struct, field)
            assert compiled[f"{name}.{field}"] == [place.offset, place.size], f"{name}.{field}"


def test_every_enum_has_the_headers_values(enums, compiled):
    # the kinds of steps are compared with the classes of steps in tests/runtime/native/test_steps.py
    expected = {name: values for name, values in enums.items() if name != "cf_step_kind"}
    assert {name: [value.name for value in enum] for name, enum in ENUMS.items()} == expected
    for enum in ENUMS.values():
        for value in enum:
            assert compiled[value.name] == [value], value.name
    assert compiled["CF_ABI_VERSION"] == [abi.ABI_VERSION]


def test_a_structure_that_two_exchanged_fields_make_another_is_found(structs, compiled):
    """Of the comparison above: offsets tell fields of one type apart."""
    first, second, *others = steps.cf_gate_args._fields_
    exchanged = type("cf_gate_args", (abi.Struct,), {"_fields_": [second, first, *others]})
    place = exchanged.value
    assert compiled["cf_gate_args.value"] != [place.offset, place.size]


def numbers(struct: abi.Struct, prefix: str = "") -> dict[str, float]:
    """Every number in the structure, by its joined name."""
    found = {}
    for name, *_ in struct._fields_:
        value, joined = getattr(struct, name), f"{prefix}{name}"
        parts = (
            {f"{joined}_{i}": part for i, part in enumerate(value)}
            if isinstance(value, ctypes.Array)
            else {joined: value}
        )
        for key, part in parts.items():
            found |= numbers(part, f"{key}_") if isinstance(part, abi.Struct) else {key: part}
    return found


@pytest.mark.parametrize("struct", STRUCTS.values(), ids=STRUCTS)
def test_numbers_are_packed_where_the_structure_has_them(struct):
    expected = {name: float(i) if code == "d" else i for i, (name, code) in enumerate(struct.leaves(), 1)}
    packed = struct.packing().pack(*expected.values())
    assert numbers(struct.from_buffer_copy(packed)) == expected


def test_fields_are_set_by_name():
    bias = abi.cf_vector(data=4, dtype=abi.cf_dtype.CF_BFLOAT16)
    sizes = {"dtype": 0, "channels_last": True, "n": 5, "c": 6, "spatial": 7}
    packed = cf_bias_residual_args.pack(x=1, residual=None, y=3, **sizes, bias=bias, threads=8)
    assert packed == cf_bias_residual_args.packing().pack(1, 0, 3, 0, 1, 5, 6, 7, 4, 2, 8)
    without = cf_bias_residual_args.pack(x=1, residual=None, y=3, **sizes, bias=None, threads=8)
    assert without == cf_bias_residual_args.packing().pack(1, 0, 3, 0, 1, 5, 6, 7, 0, 0, 8)
    tensor = abi.cf_tensor4.pack(data=9, dtype=1, strides=(2, 3, 4, 5))
    assert tensor == abi.cf_tensor4.packing().pack(9, 1, 2, 3, 4, 5)
    assert bytes(abi.cf_tensor4()) == bytes(48)


@pytest.mark.parametrize("op", [op for op in OPS if "cpu" in OPS[op].implementations])
def test_a_call_gives_its_tensors_under_their_names(op):
    """A field of an argument's name describes this argument."""
    given = example(op, torch.channels_last)
    kernel = OPS[op].implementation("cpu")
    packed = kernel.binding.struct.from_buffer_copy(kernel.packed(*(given.get(name) for name in OPS[op].names)))
    named = [name for name, *_ in packed._fields_ if isinstance(given.get(name), torch.Tensor)]
    assert len(named) == sum(isinstance(a, torch.Tensor) for a in given.values())
    for name in named:
        value, tensor = getattr(packed, name), given[name]
        if isinstance(value, abi.Struct):
            assert (value.data, value.dtype) == (tensor.data_ptr(), 0)
            if hasattr(value, "strides"):
                assert tuple(value.strides) == tensor.stride()
        else:
            assert value == tensor.data_ptr()
    assert packed.threads == torch.get_num_threads()


def test_wrong_names_are_refused():
    with pytest.raises(TypeError, match=r"cf_vector lacks these fields, or has none so called: dtpye, dtype"):
        abi.cf_vector(data=0, dtpye=1)
