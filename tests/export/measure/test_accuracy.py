from __future__ import annotations

import pytest
import torch

from coalescer_fast.export.measure import accuracy
from coalescer_fast.parity import Budget
from coalescer_fast.runtime.engines import artefact
from coalescer_fast.runtime.engines.manifest import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_fails(small, exported, kind):
    from coalescer_fast.runtime.engines.onnxruntime import open_artefact

    found = artefact.read(exported / kind)
    run = open_artefact(found)
    good = accuracy.compare(found, run, small, 3)
    assert good.passed, str(good)
    assert good.pictures == 3

    def off(inputs):
        return tuple(1.05 * y + 0.01 for y in run(inputs))

    bad = accuracy.compare(found, off, small, 3)
    assert not any(row.ok for row in bad.rows if row.limit is not None), str(bad)
    loose = Budget(psnr_median=1, psnr_minimum=1, direction_cosine=0.9, distance_error=1)
    failed = [row.what for row in accuracy.compare(found, off, small, 3, budget=loose).rows if not row.ok]
    assert failed == ["largest error"]

    def nan(inputs):
        return tuple(torch.full_like(y, torch.nan) for y in run(inputs))

    assert not accuracy.compare(found, nan, small, 3).passed
