"""Exported artefacts, made once for these sources, for all tests that read them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock

import coalescer_fast
from coalescer_fast import CoalescerPipeline

from .pipelines import small_pipeline

KEPT_SECONDS = 3 * 24 * 3600


@cache
def root() -> Path:
    """A folder that is used as long as the sources of the package and the exporter's versions stay as they are."""
    from coalescer_fast import export

    digest = hashlib.sha256(f"{torch.__version__} {version('onnx')} {version('onnxscript')}".encode())
    for package in (coalescer_fast, export):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    found = Path(tempfile.gettempdir()) / f"coalescer_fast-tests-{os.getuid()}" / digest.hexdigest()[:16]
    found.parent.mkdir(mode=0o700, exist_ok=True)
    found.mkdir(exist_ok=True)
    for other in found.parent.glob("[0-9a-f]" * 16):  # of other sources, not used for days
        if other.is_dir() and time.time() - other.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(other, ignore_errors=True)
    return found


def built(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name in `root`; the first process that asks for it makes it."""
    folder, done = root() / name, root() / f"{name}.done"
    with FileLock(root() / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a process left that was killed
            make(folder)
            done.touch()
    return folder


def export(*words: object) -> None:
    """Run coalescer-export."""
    from coalescer_fast.export import cli

    assert cli.main([str(word) for word in words]) == 0


@cache
def small_model() -> CoalescerPipeline:
    return small_pipeline(anchor="mlp", anchor_hidden_dim=16)


def small_model_folder() -> Path:
    return built("model", small_model().save_pretrained)


def small_artefacts() -> Path:
    """The small model's three artefacts in float32, unet, decoder and generator, for at most 8 images."""
    words = ("onnx", "--model", small_model_folder(), "--max-batch", 8)
    return built("fp32", lambda folder: export(*words, "-o", folder))


def small_half_artefact() -> Path:
    """The small model's generator for TensorRT in float16."""
    words = ("onnx", "--model", small_model_folder(), "--what", "generator", "--precision", "fp16")
    return built("fp16", lambda folder: export(*words, "--target", "tensorrt", "--guidance", 2, "-o", folder))


def embedded_artefacts(precision: str, target: str) -> Path:
    """The embedded model's three artefacts, made as users make them."""
    if precision == "int8":
        # by force, for how fast it is depends on what else runs here
        source = embedded_artefacts("fp16" if target == "tensorrt" else "fp32", target)
        words: tuple[object, ...] = ("quantize", source, "--force")
    else:
        words = ("onnx", "--precision", precision, "--target", target)
    return built(f"embedded-{precision}-{target}", lambda folder: export(*words, "-o", folder))
