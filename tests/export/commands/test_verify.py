from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from coalescer_fast.export.measure import accuracy


def test_pass(run, exported):
    status, out, _ = run("verify", exported, "--prompts", "3")
    assert status == 0
    ends = [line for line in out.splitlines() if line.startswith("PASS: ")]
    assert len(ends) == 3
    assert all(end.endswith("in fp32 against the float32 reference, 3 pictures") for end in ends)


def test_json_and_beyond_the_budget(run, exported, monkeypatch):
    monkeypatch.setattr(accuracy, "LARGEST_ERROR", 0.0)
    status, out, _ = run("verify", exported / "generator", "--prompts", "3", "--json")
    assert status == 1
    facts = json.loads(out)
    assert list(facts) == ["generator"]
    assert facts["generator"]["passed"] is False
    assert math.isfinite(facts["generator"]["rows"][-1]["value"])


def test_another_model(run, exported):
    status, out, error = run("verify", exported / "unet", "--model", "emoji-64")
    assert (status, out) == (1, "")
    assert error.startswith("coalescer-export: ")
    assert "was exported from other weights of the unet" in error


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_tampered(run, exported, tmp_path, command, name):
    shutil.copytree(exported / "decoder", tmp_path / "a")
    path = tmp_path / "a" / name
    content = bytearray(path.read_bytes())
    for changed in (
        content[: len(content) // 2],
        content[:-9] + (b"6" if content[-9] == ord("5") else b"5") + content[-8:],
    ):
        path.write_bytes(changed)
        status, out, error = run(command, "a")
        assert (status, out) == (1, "")
        assert error.startswith("coalescer-export: a/")
        assert "coalescer-export " in error.partition(": ")[2]
    assert torch.is_grad_enabled()
