"""Which tests of ops are run.

A test that asks for ``backend`` runs once for every backend of its module's ``OP``, with the dtypes that the backend
takes; a test with parameters ``op`` and ``backend`` runs for the backends that the op has. Triton's kernels run in its
interpreter and CUDA's in the emulation of tests/csrc where there is no GPU, and on the GPU, marked `gpu`, where there
is one.
"""

from __future__ import annotations

import pytest
import torch

from coalescer_fast import ops
from coalescer_fast.ops.dispatch import BACKENDS
from coalescer_fast.ops.op import OPS

from ..helpers.numerics import ON_GPU, takes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames and hasattr(metafunc.module, "OP"):
        states = {name: ops.backends(metafunc.module.OP)[name] for name in OPS[metafunc.module.OP].implementations}
        marks = {name: [pytest.mark.gpu] if name in ON_GPU else [] for name in states}
        if "cuda" in states and not states["cuda"][0]:  # no compiler
            marks["cuda"].append(pytest.mark.skip(reason=states["cuda"][1]))
        metafunc.parametrize("backend", [pytest.param(name, marks=marks[name]) for name in states])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not _refused(item)]


def _refused(item: pytest.Item) -> bool:
    """Whether the test is for what does not go together, which test_dispatch and test_every_op show to be refused."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    op, backend = parameters.get("op"), parameters.get("backend")
    if op in OPS and backend in BACKENDS and backend not in OPS[op].implementations:
        return True
    dtypes = [value for value in parameters.values() if isinstance(value, torch.dtype)]
    return hasattr(item.module, "OP") and backend is not None and not takes(backend, *dtypes)
