from __future__ import annotations

import pytest

from . import pipelines


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("vouched", [True, False], ids=["checksums", "none"])
def test_damaged_folders_draw_the_same_or_are_refused(vouched, count):
    found = pipelines.run(count, seed=0, vouched=vouched)
    assert sum(found.values()) == count
    assert found["refused"] > count / 2
    assert found["same"] > 0
