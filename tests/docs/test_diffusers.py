"""docs/diffusers.md: each row of its table is run."""

from __future__ import annotations

import builtins
import re
from pathlib import Path

import pytest
import torch

from ..helpers.pipelines import noise, tiny_pipeline

PAGE = Path(__file__).parents[2] / "docs" / "diffusers.md"
ROWS = re.findall(r"^\| `(.+)` \| (\w+)(?:: (.+))? \|$", PAGE.read_text("utf-8"), re.MULTILINE)


def test_every_row_is_read():
    table = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert len(ROWS) == len(table) > 30


@pytest.mark.parametrize(("call", "what", "words"), ROWS, ids=[call for call, _, _ in ROWS])
def test_what_happens(call, what, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pipe = tiny_pipeline()
    before = pipe("octopus", latents=noise(1), output_type="pt").images
    if what == "nothing":
        eval(call, {"pipe": pipe})
    else:
        with pytest.raises(getattr(builtins, what), match=re.escape(words) or None) as caught:
            eval(call, {"pipe": pipe})
        assert "\n" not in str(caught.value)
    assert torch.equal(pipe("octopus", latents=noise(1), output_type="pt").images, before)
    assert not list(tmp_path.iterdir())
