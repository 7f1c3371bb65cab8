from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.harness.results import read
from benchmarks.quality import int8
from coalescer_fast.runtime.native.module import no_programs

from ...helpers.training import squares


@pytest.mark.skipif(bool(no_programs(torch.uint8)), reason="the processor does not multiply int8 itself")
def test_a_row_for_every_kind_of_product(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "SCALE", 0.1)
    monkeypatch.setattr(int8, "BATCH", 2)
    monkeypatch.setattr(int8, "CALIBRATION", (2, (500,)))
    monkeypatch.setattr(int8, "MEASURED", (2, (500,)))
    monkeypatch.setattr(int8, "peer", lambda *_: [])
    data = squares()
    data = replace(data, held_out=np.arange(len(data)) % 2 == 0)
    rows = int8.compare(data, tmp_path, tmp_path / "int8.csv", steps=2, progress=False)
    found = {row["kind"]: row for row in rows}
    assert list(found) == [*int8.KINDS, "none: bfloat16", "all", "chosen"]
    assert all(row["products"] for row in rows if row["kind"] != "none: bfloat16")
    # every product is of one kind
    assert sum(found[kind]["products"] for kind in int8.KINDS) == found["all"]["products"]
    assert found["none: bfloat16"]["alone"] < found["chosen"]["alone"] < found["all"]["alone"] < 0.5
    assert found["conv_in"]["without"] < found["all"]["alone"]
    assert len(read(tmp_path / "int8.csv")) == len(rows)
