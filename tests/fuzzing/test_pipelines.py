from __future__ import annotations

import pytest

from . import pipelines


@pytest.mark.parametrize("vouched", [True, False], ids=["checksums", "none"])
def test_damaged_folders_draw_the_same_or_are_refused(vouched):
    found = pipelines.run(count=100, seed=0, vouched=vouched)
    assert sum(found.values()) == 100
    assert found["refused"] > 50
    assert found["same"] > 0
