"""A small model and its exported artefacts, made once a process for all tests that read them."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from coalescer_fast import CoalescerPipeline

from .pipelines import small_pipeline


@cache
def scratch() -> Path:
    """A folder that is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="coalescer_fast-tests-")
    scratch.kept = folder  # type: ignore[attr-defined]
    return Path(folder.name)


@cache
def small_model() -> CoalescerPipeline:
    return small_pipeline(anchor="mlp", anchor_hidden_dim=16)


@cache
def small_model_folder() -> Path:
    folder = scratch() / "model"
    small_model().save_pretrained(folder)
    return folder


@cache
def small_artefacts() -> Path:
    """The folder of the small model's three artefacts in float32, unet, decoder and generator, for at most 8 images."""
    from coalescer_fast.export import cli

    folder = scratch() / "fp32"
    assert cli.main(["onnx", "--model", str(small_model_folder()), "-o", str(folder), "--max-batch", "8"]) == 0
    return folder
