from __future__ import annotations

import pytest

from coalescer_fast.ops import native_library

from . import configurations

pytestmark = pytest.mark.skipif(
    bool(native_library.unavailable()), reason=native_library.unavailable() or "the library is there"
)


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_random_configurations_are_within_the_budget_in_every_call(count):
    rows = configurations.run(count, seed=0)
    assert len({row["configuration"] for row in rows}) == count


def test_a_configuration_beyond_the_budget_is_named(monkeypatch):
    monkeypatch.setitem(configurations.BUDGET, "float32", 1e-9)
    with pytest.raises(AssertionError, match=r"^seed 0, configuration 0, float32, .*: off by \d"):
        configurations.run(count=1, seed=0)
