from __future__ import annotations

import pytest
import torch

from coalescer_fast.export.quantize.prompts import held_out
from coalescer_fast.parity import descriptions


def test_held_out_names_were_never_calibrated_on(small):
    known = small.description_encoder.known_names
    seen = descriptions(small, 64, torch.Generator().manual_seed(0))
    for seed in (0, 1):  # even in the same order
        names = held_out(small, seen, 64, seed)
        assert len(set(names)) == 64
        assert not set(names) & set(seen)
        assert names == held_out(small, seen, 64, seed)
    assert len(held_out(small, seen, len(known) - 64, 0)) == len(known) - 64
    with pytest.raises(ValueError, match="calibrate on fewer"):
        held_out(small, seen, len(known) - 63, 0)
