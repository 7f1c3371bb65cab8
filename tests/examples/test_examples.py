"""Every script in examples/ runs, and draws what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
# What a script needs beside the package, and what it writes.
SCRIPTS = {
    "accelerate_diffusers": ([], []),
    "accelerate_pipeline": ([], []),
    "batch": ([], []),
    "custom_runtime": ([], []),
    "diffusers_pipeline": (["transformers"], ["cat.png"]),
    "draw": ([], [f"draw-{i}.png" for i in range(4)]),
    "export_onnx": (["onnx", "onnxscript", "onnxruntime"], ["exported.png"]),
    "own_module": ([], []),
    "serving": (["fastapi", "uvicorn", "prometheus_client"], ["served.png"]),
    "train_squares": (["accelerate", "scipy"], []),
    "verify_and_receipt": ([], ["receipt.json"]),
}
SLOW = ("export_onnx",)


def test_every_example_is_tested():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(SCRIPTS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SCRIPTS])
def test_example(name, tmp_path, monkeypatch):
    packages, written = SCRIPTS[name]
    for package in packages:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    if name == "diffusers_pipeline":  # the name of a folder, instead of one on the Hub
        from ..helpers.diffusers_pipelines import pipeline

        pipeline("StableDiffusionPipeline").save_pretrained("model", safe_serialization=True)
        monkeypatch.setattr("sys.argv", ["diffusers_pipeline.py", "model"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    for file in written:
        assert (tmp_path / file).is_file()
        if file.endswith(".png"):
            assert Image.open(tmp_path / file).size == (64, 64)
