from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import coalescer_fast
from coalescer_fast import CoalescerPipeline, nvtx_ranges
from coalescer_fast.nvtx_ranges import span

MICROSECONDS = 0.3  # a use of span while off, with its name made and its block entered


@pytest.fixture
def ranges(monkeypatch) -> Iterator[list[str]]:
    """Names of the ranges in the order in which they open, each again with a / where it closes."""
    log: list[str] = []

    @contextmanager
    def annotate(message, domain):
        assert domain == "coalescer_fast"
        log.append(message)
        yield
        log.append(f"/{message}")

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    nvtx_ranges.enable()
    yield log
    nvtx_ranges.disable()


def python(code: str, folder: Path, **variables: str) -> str:
    """What ``code`` writes to stderr in a fresh interpreter that imports no nvtx."""
    (folder / "nvtx.py").write_text("raise ModuleNotFoundError(\"No module named 'nvtx'\", name='nvtx')\n")
    path = os.pathsep.join([str(folder), str(Path(coalescer_fast.__file__).parents[1])])
    env = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=True
    ).stderr


def test_a_call_has_a_range_for_every_stage(ranges):
    pipe = CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = pipe("octopus", latents=latents, guidance_scale=1.5, output_type="pt").images
    names = ["encode", "condition", "evaluate[0]", "evaluate[1]", "evaluate_empty[1]", "decode"]
    assert ranges == [each for name in names for each in (name, f"/{name}")]
    nvtx_ranges.disable()
    ranges.clear()
    assert torch.equal(pipe("octopus", latents=latents, guidance_scale=1.5, output_type="pt").images, drawn)
    assert ranges == []


def test_free_when_off():
    assert span("a") is span("b")

    def once(n: int = 20_000) -> float:
        start = time.perf_counter()
        for i in range(n):
            with span(f"evaluate[{i}]"):
                pass
        return (time.perf_counter() - start) / n * 1e6

    assert min(once() for _ in range(10)) < MICROSECONDS


def test_enabled_without_the_package(tmp_path):
    (line,) = python("import coalescer_fast.nvtx_ranges", tmp_path, COALESCER_FAST_NVTX="1").splitlines()
    assert line.startswith("COALESCER_FAST_NVTX=1 has no effect: ")
    assert line.endswith("run pip install nvtx")
    assert python("import coalescer_fast.nvtx_ranges", tmp_path, COALESCER_FAST_NVTX="0") == ""


def test_enable_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ImportError, match="pip install nvtx") as caught:
        nvtx_ranges.enable()
    assert "\n" not in str(caught.value)
    assert span("a") is span("b")
