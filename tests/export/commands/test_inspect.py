from __future__ import annotations

import json


def test_a_table(run, exported, exported_half):
    status, out, _ = run("inspect", exported)
    assert status == 0
    heads = [" ".join(line.split()) for line in out.splitlines() if line.startswith(("unet", "decoder", "generator"))]
    assert heads == [f"{kind} onnx for cpu, fp32, opset 18" for kind in ("unet", "decoder", "generator")]
    out = run("inspect", exported_half)[1]
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert "generator onnx for tensorrt, fp16, opset 21" in lines
    assert "input noise float32 (batch, 4, 4, 4)" in lines
    assert "batch 1 to 16, best 4" in lines
    assert "schedule 2 steps (0.5 raw, 1 unit) with guidance 2 in 1 of them" in lines


def test_json(run, exported_half):
    status, out, _ = run("inspect", exported_half, "--json")
    assert status == 0
    facts = json.loads(out)["generator"]
    assert facts["manifest"] == json.loads((exported_half / "manifest.json").read_text())
    assert facts["layers"]["Conv"]["float"] == 3  # the direction head, once an evaluation
    assert facts["layers"]["Conv"]["float16"] + 3 == facts["operators"]["Conv"]
    assert facts["stored"]["float16"]["bytes"] > facts["stored"]["float"]["bytes"]
