"""A test of an op that asks for ``backend`` runs once for every backend of its module's ``OP``."""

from __future__ import annotations

import pytest

from coalescer_fast import ops


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", list(ops.backends(metafunc.module.OP)))
