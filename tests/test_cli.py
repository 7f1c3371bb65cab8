from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from coalescer_fast import __version__, acceleration, cli
from coalescer_fast.parity import Verification, at_least


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a command line in an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> tuple[int, str, str]:
        try:
            status = cli.main(argv)
        except SystemExit as exit:
            status = int(exit.code or 0)
        return (status, *capsys.readouterr())

    return call


def assert_one_sentence(error: str, *words: str) -> None:
    assert error.startswith("coalescer-fast: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error


# what a user can get wrong


def test_no_command(run):
    status, _, error = run()
    assert status == 2
    assert_one_sentence(error, "COMMAND", "--help")


@pytest.mark.parametrize(
    "argv",
    [("--steps", "0"), ("--steps", "two"), ("--steps", "1.5"), ("-n", "0"), ("-n", "-1"), ("--seed", "-1"), ("--seed", str(2**63))],
)
def test_bad_number(run, argv):
    status, _, error = run("sample", "octopus", *argv)
    assert status == 2
    assert_one_sentence(error, argv[0], repr(argv[1]), "whole number")


def test_output_is_checked_before_the_model_is_loaded(run, tmp_path):
    (tmp_path / "folder.png").mkdir()
    for out in ("no/such/folder/octopus.png", "folder.png"):
        status, _, error = run("sample", "octopus", "-o", out, "--model", "no-such-model")
        assert status == 1
        assert_one_sentence(error, out, "cannot be written", "name a file")


def test_output_of_no_picture_format(run, tmp_path):
    status, _, error = run("sample", "octopus", "-o", "octopus.txt")
    assert status == 1
    assert_one_sentence(error, "octopus.txt", ".png")
    assert not list(tmp_path.iterdir())


def test_unknown_model(run, tmp_path):
    status, _, error = run("sample", "octopus", "--model", "no-such-model")
    assert status == 1
    assert_one_sentence(error, "no-such-model")
    assert not list(tmp_path.iterdir())


def test_missing_data_is_found_before_the_model_is_loaded(run):
    status, _, error = run("evaluate", "--data", "missing.npz", "--model", "no-such-model")
    assert status == 1
    assert_one_sentence(error, "missing.npz", "build-data")


def test_unwritable_csv_is_found_before_the_data(run):
    status, _, error = run("evaluate", "--data", "missing.npz", "--csv", "no/folder/rows.csv")
    assert status == 1
    assert_one_sentence(error, "rows.csv", "cannot be written")


def test_unknown_config(run, tmp_path):
    status, _, error = run("train", "coalescer", "--config", "no-such-config", "--data", "digits", "--out", str(tmp_path / "out"))
    assert status == 1
    assert_one_sentence(error, "no-such-config")


def test_unknown_style(run):
    status, _, error = run("build-data", "--out", "data", "--styles", "cubist")
    assert status == 1
    assert_one_sentence(error, "cubist", "noto")


def test_missing_package(run, monkeypatch):
    monkeypatch.setattr(cli, "info", lambda args: __import__("coalescer_fast_no_such_package"))
    status, _, error = run("info")
    assert status == 1
    assert_one_sentence(error, "coalescer_fast_no_such_package", "pip install")


def test_long_message_becomes_one_line(run, monkeypatch):
    def fail(args):
        raise ValueError("first\n  second")

    monkeypatch.setattr(cli, "info", fail)
    assert run("info") == (1, "", "coalescer-fast: first second\n")
    with pytest.raises(ValueError, match="first"):
        run("--debug", "info")


def test_interrupt(run, monkeypatch):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "info", stop)
    assert run("info")[0] == 130


# what works


def test_version(run):
    assert run("--version") == (0, __version__ + "\n", "")


def test_info(run):
    status, out, _ = run("info", "--json")
    assert status == 0
    facts = json.loads(out)
    assert facts["coalescer_fast"] == __version__
    assert facts["threads"] >= 1
    assert facts["models"]["emoji-64"] > 1e5
    assert list(facts["backends"]) == ["reference", "cpu", "triton", "cuda"]
    assert facts["backends"]["reference"] == {"able": True, "reason": "", "note": ""}
    assert list(facts["accelerate"]) == list(acceleration.BACKENDS)
    assert facts["accelerate"]["compile"] == {"able": True, "reason": ""}
    status, out, _ = run("info")
    assert status == 0
    assert "emoji-64" in out
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert {"backend reference can run", "accelerate compile can run"} <= lines
    for name in ("triton", "cuda"):
        (line,) = (line for line in out.splitlines() if line.startswith(f"backend {name}"))
        assert line.endswith("(not yet run on a GPU)")


def test_sample_accelerated(run, tmp_path):
    assert run("sample", "octopus", "--seed", "1", "-o", "reference.png")[0] == 0
    assert run("sample", "octopus", "--seed", "1", "--backend", "auto", "--dtype", "float32", "-o", "accelerated.png")[0] == 0
    reference, accelerated = (np.asarray(Image.open(tmp_path / f"{name}.png"), np.float32) for name in ("reference", "accelerated"))
    assert np.abs(reference - accelerated).max() <= 2
    status, _, error = run("sample", "octopus", "--backend", "magic")
    assert status == 1
    assert error.splitlines()[-1] == "coalescer-fast: backend is 'magic'; use one of auto, " + ", ".join(acceleration.BACKENDS)


def test_sample_one(run, tmp_path):
    status, out, error = run("sample", "octopus", "--seed", "1", "-o", "one.png")
    assert (status, out) == (0, "one.png\n")
    assert "1 picture in " in error
    assert "seed 1" in error
    with Image.open(tmp_path / "one.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))


def test_sample_repeats_and_names_its_file(run, tmp_path):
    status, out, error = run("sample", "Red octopus!")
    assert (status, out) == (0, "red-octopus.png\n")
    seed = error.rpartition("seed ")[2].strip()
    assert run("sample", "Red octopus!", "--seed", seed, "-o", "again.png")[0] == 0
    first, second = (np.asarray(Image.open(tmp_path / name)) for name in ("red-octopus.png", "again.png"))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("argv", "cells"), [(("-n", "4"), (4, 1)), (("cat", "frog", "-n", "2"), (2, 3)), (("cat", "--guidance", "1", "--steps", "1"), (2, 1))]
)
def test_sample_several(run, tmp_path, argv, cells):
    assert run("sample", "octopus", *argv, "-o", "many.png")[0] == 0
    with Image.open(tmp_path / "many.png") as picture:
        assert picture.width == cells[0] * (96 + 4) + 4
        assert picture.height == cells[1] * (96 + 4 + 38) + 4


def test_evaluate_prints_a_table_and_writes_it(run, monkeypatch, tmp_path):
    rows = [{"steps": 1, "distance": 12.34567, "name": "a"}, {"steps": 2, "distance": 1.0, "name": "bc"}]
    asked = []

    def evaluate(pipe, data, steps):
        asked.append((pipe, data, steps))
        return rows

    pipeline = SimpleNamespace(CoalescerPipeline=SimpleNamespace(from_pretrained=lambda name: f"pipe of {name}"))
    monkeypatch.setitem(sys.modules, "coalescer_fast.pipeline", pipeline)
    monkeypatch.setitem(sys.modules, "coalescer_fast.training.evaluation", SimpleNamespace(evaluate=evaluate))
    monkeypatch.setattr("coalescer_fast.training.data.load", lambda path: f"data of {path}")
    status, out, _ = run("evaluate", "--data", "some.npz", "--steps", "1,2", "--csv", "rows.csv")
    assert status == 0
    assert asked == [("pipe of emoji-64", "data of some.npz", (1, 2))]
    assert out.splitlines() == ["steps         1   2", "distance  12.35   1", "name          a  bc"]
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [row["distance"] for row in csv.DictReader(file)] == ["12.34567", "1.0"]


@pytest.mark.parametrize("passed", [True, False])
def test_verify_prints_the_table_and_fails_with_it(run, monkeypatch, passed):
    result = Verification("cpu", "bfloat16", 3, (at_least("pictures: PSNR, median", 50.0 if passed else math.nan, 35.0, " dB"),))
    asked = []

    def accelerate(pipe, backend, dtype, artefact):
        return (pipe, backend, dtype, artefact)

    def verify(pipe, prompts):
        asked.append((*pipe, prompts))
        return result

    pipeline = SimpleNamespace(CoalescerPipeline=SimpleNamespace(from_pretrained=lambda name: f"pipe of {name}"))
    monkeypatch.setitem(sys.modules, "coalescer_fast.pipeline", pipeline)
    monkeypatch.setitem(sys.modules, "coalescer_fast.acceleration", SimpleNamespace(accelerate=accelerate))
    monkeypatch.setattr("coalescer_fast.parity.verify", verify)
    assert run("verify", "--backend", "cpu", "--dtype", "bfloat16", "--prompts", "3") == (int(not passed), f"{result}\n", "")
    status, out, _ = run("verify", "--json", "--model", "some/folder", "--artefact", "exported")
    assert status == int(not passed)
    facts = json.loads(out)
    assert facts["passed"] is passed
    assert facts["rows"][0]["value"] == (50.0 if passed else "nan")
    assert asked == [("pipe of emoji-64", "cpu", "bfloat16", None, 3), ("pipe of some/folder", "auto", "auto", Path("exported"), 16)]


def test_verify_of_an_unknown_model(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "coalescer_fast.acceleration", SimpleNamespace(accelerate=None))
    status, _, error = run("verify", "--model", "no-such-model")
    assert status == 1
    assert_one_sentence(error, "no-such-model")
    assert_one_sentence(run("verify", "--prompts", "0")[2], "--prompts", "whole number")


def test_verify(run):
    status, out, _ = run("verify", "--prompts", "1", "--dtype", "float32")
    assert status == 0
    assert out.splitlines()[-1].startswith("PASS: ")
    status, _, error = run("verify", "--backend", "abacus")
    assert status == 1
    assert_one_sentence(error.splitlines()[-1] + "\n", "abacus", "auto")  # below a progress bar


def test_warmup(run):
    status, out, _ = run("warmup", "--dtype", "float32", "--batch-sizes", "1,2")
    assert status == 0
    head, *lines = out.splitlines()
    assert head.startswith("cpu, float32, ")
    assert lines[0].split() == ["pictures", "1", "2"]
    for line in lines[1:]:
        assert all(float(cell) > 0 for cell in line.split()[-2:])
    assert [line.split()[0] for line in lines[1:]] == ["warm-up,", "call,"]
    assert_one_sentence(run("warmup", "--batch-sizes", "0")[2], "--batch-sizes", "whole number")
