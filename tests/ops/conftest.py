"""A test of an op that asks for ``backend`` runs once for every backend of its module's ``OP``, with the dtypes that the backend takes.

Triton's kernels run in its interpreter and CUDA's in the emulation of tests/csrc where there is no GPU, and on the GPU, marked `gpu`, where
there is one.
"""

from __future__ import annotations

import pytest
import torch

from coalescer_fast import ops

from ..helpers.numerics import ON_GPU, takes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames and hasattr(metafunc.module, "OP"):
        states = ops.backends(metafunc.module.OP)
        marks = {name: [pytest.mark.gpu] if name in ON_GPU else [] for name in states}
        marks["cuda"] += [] if states["cuda"][0] else [pytest.mark.skip(reason=states["cuda"][1])]  # no compiler
        metafunc.parametrize("backend", [pytest.param(name, marks=marks[name]) for name in states])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not _refused(item)]


def _refused(item: pytest.Item) -> bool:
    """Whether the test is for a backend and a dtype that do not go together; test_dispatch shows that those are refused."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    dtypes = [value for value in parameters.values() if isinstance(value, torch.dtype)]
    return hasattr(item.module, "OP") and "backend" in parameters and not takes(parameters["backend"], *dtypes)
