from __future__ import annotations

import pytest
import torch

from coalescer_fast.ops import native_library

from . import batches

pytestmark = pytest.mark.skipif(
    bool(native_library.unavailable()), reason=native_library.unavailable() or "the library is there"
)


FEW = ("int8" if batches.able("int8") else "float32",)


@pytest.mark.parametrize(
    ("count", "pictures", "dtypes"),
    [(6, 2, FEW), pytest.param(20, 6, batches.DTYPES, marks=pytest.mark.slow)],
    ids=["few", "many"],
)
def test_random_batches_have_the_bits_of_pictures_alone(count, pictures, dtypes):
    threads = torch.get_num_threads()
    try:
        rows = batches.run(count, seed=0, pictures=pictures, dtypes=dtypes)
    finally:
        torch.set_num_threads(threads)
    assert {row["threads"] for row in rows} == {1, 2, 3}
