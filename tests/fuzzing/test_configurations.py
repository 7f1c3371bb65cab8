from __future__ import annotations

import pytest
import torch

from coalescer_fast.ops import native_library

from . import batches, configurations

pytestmark = pytest.mark.skipif(
    bool(native_library.unavailable()), reason=native_library.unavailable() or "the library is there"
)


def test_random_configurations_are_within_the_budget_in_every_call():
    rows = configurations.run(count=15, seed=0)
    assert len({row["configuration"] for row in rows}) == 15


def test_a_configuration_beyond_the_budget_is_named(monkeypatch):
    monkeypatch.setitem(configurations.BUDGET, "float32", 1e-9)
    with pytest.raises(AssertionError, match=r"^seed 0, configuration 0, float32, .*: off by \d"):
        configurations.run(count=1, seed=0)


def test_random_batches_have_the_bits_of_pictures_alone():
    threads = torch.get_num_threads()
    try:
        rows = batches.run(count=8, seed=0, pictures=2, dtypes=("int8" if batches.able("int8") else "float32",))
    finally:
        torch.set_num_threads(threads)
    assert {row["threads"] for row in rows} == {1, 2, 3}
