"""The classes of steps are those of csrc/abi.h, and know modules and ops, not our pipeline and its networks."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coalescer_fast.runtime.native.pack import Packer, Weight, Weights
from coalescer_fast.runtime.native.steps import FUNCTIONS, HANDLERS, Convolution, Gather, Modulate, Pointwise, Step
from coalescer_fast.runtime.native.value import Value

ROOT = Path(__file__).parents[3]
STEPS = Step.__subclasses__()


def test_every_step_of_the_header_has_its_class():
    """Name, number and struct; tests/ops/test_abi.py compares the structs field by field."""
    header = (ROOT / "csrc" / "abi.h").read_text()
    table = re.search(r"#define CF_STEPS\(STEP\)((?:.*\\\n)*.*\n)", header)
    assert table is not None
    declared = re.findall(r"STEP\((\w+), (\d+), (\w+), \w+\)", table.group(1))
    assert len(declared) == table.group(1).count("STEP(")
    assert sorted((step.name, str(step.number), step.struct.__name__) for step in STEPS) == sorted(declared)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_declares_all_that_a_program_asks_of_it(step):
    fields = {field.name for field in dataclasses.fields(step)}
    assert "y" in fields
    assert {"reads", "arguments"} <= vars(step).keys()
    handlers = [*HANDLERS.values(), *FUNCTIONS.values()]
    own = {each.__func__ for each in vars(step).values() if isinstance(each, staticmethod)}
    # `Modulate` is recorded where the operand of a sum or a product is a number a channel
    assert step is Modulate or own.intersection(handlers), f"no torch op is recorded as {step.__name__}"


def test_values_know_their_steps():
    x, y, z = (Value(1, 2, 2, 4) for _ in range(3))
    first, second = Gather(x, y), Pointwise(y, z, 0, residual=x)
    assert (x.step, y.step, z.step) == (None, first, second)
    assert (x.readers, y.readers, z.readers) == ([first, second], [second], [])
    assert second.values == [z, y, x]


def test_a_struct_points_to_what_its_packer_keeps():
    packer = Packer(Weights(torch.float32), threads=1)
    x, y = Value(1, 2, 2, 4, torch.float32, address=64), Value(1, 2, 2, 8, torch.float32, address=256)
    bias = torch.arange(8, dtype=torch.bfloat16)
    weight = Weight("w", (8, 4, 1, 1), (4, 1, 1, 1), 0, lambda name: torch.ones(8, 4, 1, 1))
    packed = Convolution(x, y, weight, bias).arguments(packer)
    assert (packed.x.data, packed.y.data, packed.residual.data, packed.scale) == (64, 256, None, None)
    assert (packed.channels, packed.outputs, packed.taps) == (4, 8, 1)
    kept = {each.data_ptr(): each for each in packer.kept if isinstance(each, torch.Tensor)}
    assert torch.equal(kept[packed.bias], bias.float())
    assert kept[packed.weight].numel() % 4 == 0


def test_only_the_runtime_knows_our_pipeline():
    """The other modules import ops and each other."""
    code = """
import sys
from coalescer_fast.runtime.native import pack, packed_file, program, record, steps, value
print(*(name for name in sys.modules if name.startswith(("coalescer_fast.", "diffusers"))))
"""
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    allowed = re.compile(r"coalescer_fast\.(dtypes|files|ops(\..*)?|runtime|runtime\.native(\..*)?)")
    assert [name for name in imported if not allowed.fullmatch(name)] == []
