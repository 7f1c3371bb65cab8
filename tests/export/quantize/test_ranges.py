from __future__ import annotations

import dataclasses
import json

import pytest

from coalescer_fast.export.quantize import ranges
from coalescer_fast.export.quantize.ranges import Ranges, read_ranges
from coalescer_fast.runtime.engines import artefact

KNOWN = Ranges(
    "0" * 64, "percentile 99.99", 3, ("octopus", "piñata"), {"conv": {"input": (-0.25, 3.5), "output": (-1.0, 1.0)}}
)


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "ranges.json"
    path.write_text(KNOWN.to_json(), "utf-8")
    assert read_ranges(path) == KNOWN
    assert json.loads(path.read_text("utf-8"))["sha256"] == KNOWN.sha256


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("3.5", "3.4"), "was changed after it was written"),
        (lambda text: text.replace('"octopus"', '"pizza"'), "was changed after it was written"),
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "[]", "holds no ranges in format 1"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "holds no ranges in format 1"),
    ],
)
def test_a_tampered_file_is_refused(tmp_path, change, said):
    path = tmp_path / "ranges.json"
    path.write_text(change(KNOWN.to_json()), "utf-8")
    with pytest.raises(ValueError, match=said):
        read_ranges(path)


def test_another_graph(exported, tmp_path):
    found = artefact.read(exported / "decoder")
    dataclasses.replace(KNOWN, graph=ranges.graph_sha256(found.manifest)).check_graph(found, "some.json")
    with pytest.raises(
        ValueError, match=r"some.json holds the ranges of another graph \(000000000000\) than that of .*decoder"
    ):
        KNOWN.check_graph(found, "some.json")
