from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import coalescer_fast
from coalescer_fast import __version__
from coalescer_fast.export import cli


def test_a_subcommand_is_a_module(run):
    status, out, _ = run("--help")
    assert status == 0
    for command in cli.COMMANDS:
        name = command.__name__.rpartition(".")[2]
        assert name in out
        assert run(name, "--help")[0] == 0


def test_version(run):
    assert run("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        ([], 2, ["COMMAND", "coalescer-export --help"]),
        (["onnx"], 2, ["--out", "coalescer-export onnx --help"]),
        (["onnx", "-o", "x", "--what", "encoder"], 2, ["encoder", "unet"]),
        (["onnx", "-o", "x", "--max-batch", "0"], 2, ["--max-batch", "whole number"]),
        (["onnx", "-o", "x", "--model", "no-such-model"], 1, ["no-such-model"]),
        (["onnx", "-o", "x", "--min-batch", "8", "--max-batch", "4"], 1, ["--min-batch 8", "--max-batch 4"]),
        (["verify", "x"], 1, ["x is no exported artefact", "coalescer-export onnx"]),
        (["inspect", "x"], 1, ["x is no exported artefact", "coalescer-export onnx"]),
    ],
)
def test_a_mistake_is_one_sentence(run, tmp_path, argv, status, words):
    found, out, error = run(*argv)
    assert (found, out) == (status, "")
    assert error.startswith("coalescer-export: ")
    for word in words:
        assert word in error
    assert not list(tmp_path.iterdir())


def test_the_runtime_does_not_import_it():
    code = """
import sys
import coalescer_fast.acceleration, coalescer_fast.pipeline, coalescer_fast.cli
print(sorted({"onnx", "onnxscript", "onnxruntime", "coalescer_fast.export"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(coalescer_fast.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
