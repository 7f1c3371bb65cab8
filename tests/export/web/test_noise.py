"""noise.js against PhiloxGenerator."""

from __future__ import annotations

import numpy as np
import pytest

from coalescer_fast.noise import normal

from ...helpers.pages import open_scripts


@pytest.mark.parametrize(
    ("seed", "picture", "count"), [(0, 0, 1024), (1, 7, 10_000), (2**40, 2**33 + 5, 1021), (2**64 - 1, 2**64 - 1, 4)]
)
def test_the_noise_is_that_of_python_to_the_bit(page, tmp_path, seed, picture, count):
    open_scripts(page, tmp_path, ("noise.js",))
    found = page.evaluate(f"[...new Uint32Array(normals({seed}n, {picture}n, {count}).buffer)]")
    assert found == normal(seed, picture, count).view(np.uint32).tolist()
