"""A model that is exported in seconds, and its artefacts, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import coalescer_fast as cf
from coalescer_fast.export import cli

from ..helpers.artefacts import (
    embedded_artefacts,
    small_artefacts,
    small_half_artefact,
    small_model,
    small_model_folder,
)


@pytest.fixture(scope="session")
def small() -> cf.CoalescerPipeline:
    return small_model()


@pytest.fixture(scope="session")
def model() -> Path:
    """Its folder."""
    return small_model_folder()


@pytest.fixture(scope="session")
def exported() -> Path:
    """The folder of its three artefacts in float32."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs the package {package}")
    return small_artefacts()


@pytest.fixture(scope="session")
def exported_half(exported) -> Path:
    """Its generator for TensorRT in float16."""
    return small_half_artefact()


@pytest.fixture(scope="session")
def embedded() -> Callable[[str, str], Path]:
    """(precision, target) -> the folder of the embedded model's three artefacts, made at the first use as users do."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs the package {package}")
    return embedded_artefacts


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a command line in an empty folder; returns (exit status, stdout, the last line of stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv) -> tuple[int, str, str]:
        try:
            status = cli.main([str(word) for word in argv])
        except SystemExit as exit:
            status = int(exit.code or 0)
        out, error = capsys.readouterr()
        assert "Traceback" not in error
        return status, out, (error.splitlines() or [""])[-1]

    return call
