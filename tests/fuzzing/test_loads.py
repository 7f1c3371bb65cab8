from __future__ import annotations

import csv
import json
import os
import random
import struct
import time
from collections import Counter
from pathlib import Path

import pytest

from . import loads
from .loads import RIGHT, SENTENCE, TARGETS, Case, check, main, mutate, run, seal_manifest

COUNTS = {"pipeline": 60, "artefact": 50, "checkpoint": 50}


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COUNTS)
def test_every_load_is_right_or_one_sentence(name, times):
    for package in TARGETS[name].needs:
        pytest.importorskip(package, reason=f"needs the package {package}")
    count = times * COUNTS[name]
    cases = list(run(name, count))
    assert [case.number for case in cases] == list(range(count))
    assert [case for case in cases if not case.passed] == []
    outcomes = Counter(case.outcome for case in cases)
    assert min(outcomes[RIGHT], outcomes[SENTENCE]) >= 5  # or nothing of note was damaged, or all of it


def folder_of(root: Path) -> Path:
    root.mkdir()
    (root / "manifest.json").write_text(json.dumps({"a": 1, "b": {"c": [1, 2, "x"]}}))
    (root / "model.onnx").write_bytes(bytes(range(256)))
    return root


def test_damage_is_a_function_of_its_seed(tmp_path):
    said = []
    for i in range(2):
        for seed in range(40):
            folder = folder_of(tmp_path / f"{i}-{seed}")
            damage = mutate(folder, random.Random(seed), seal_manifest)
            content = {
                path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and not path.is_symlink()
            }
            said.append((damage, sorted(content.items())))
    assert said[:40] == said[40:]
    assert len({damage for damage, _ in said}) > 25
    whole = folder_of(tmp_path / "whole")
    intact = sorted((path.name, path.read_bytes()) for path in whole.iterdir())
    assert sum(content == intact for _, content in said[:40]) < 5


def test_what_a_check_says():
    def fail(error: BaseException):
        def load() -> bytes:
            raise error

        return load

    assert check(lambda: b"1", b"1") == (RIGHT, "")
    assert check(lambda: b"2", b"1") == ("another result", "")
    near, far = (struct.pack("<2f", 1.0, x) for x in (1.00001, float("nan")))
    assert check(lambda: near, struct.pack("<2f", 1.0, 1.0), 1e-4) == (RIGHT, "")
    assert check(lambda: far, struct.pack("<2f", 1.0, 1.0), 1e-4)[0] == "another result"
    assert check(fail(ValueError("it is damaged")), b"1") == (SENTENCE, "it is damaged")
    for error in (ValueError(""), ValueError("a\nb"), ValueError("x" * 1000)):
        assert check(fail(error), b"1")[0] == "no sentence"
    for error in (KeyError("a"), RecursionError(), RuntimeError("a"), SystemExit(1), OSError("a")):
        assert check(fail(error), b"1")[0] == f"raises {type(error).__name__}"


def worker(name, seed, numbers, original, pipe) -> None:
    """Ends its process in case 1 and does not end in case 3."""
    pipe.send(None)
    for number in numbers:
        pipe.send((number, "damage"))
        if number == 1:
            os._exit(3)
        if number == 3:
            time.sleep(600)
        pipe.send(Case(name, number, "damage", RIGHT, ""))


def test_a_load_that_ends_the_process_and_one_that_hangs_are_counted(monkeypatch):
    monkeypatch.setattr(loads, "SECONDS", 2)
    monkeypatch.setitem(TARGETS, "checkpoint", loads.Target(lambda folder: None, lambda folder: b""))
    outcomes = [case.outcome for case in run("checkpoint", 5, worker=worker)]
    assert outcomes == [RIGHT, "ends the process with 3", RIGHT, "hangs", RIGHT]


def test_the_command(tmp_path, monkeypatch, capsys):
    cases = [Case("checkpoint", 0, "cut", SENTENCE, "x"), Case("checkpoint", 1, "flip", "hangs", "")]
    monkeypatch.setattr(loads, "run", lambda name, count, seed: iter(cases[: 2 - seed]))
    table = tmp_path / "loads.csv"
    assert main(["--target", "checkpoint", "--csv", str(table)]) == 1
    assert "checkpoint 1, flip: hangs" in capsys.readouterr().err
    assert [row["outcome"] for row in csv.DictReader(table.open(newline=""))] == [SENTENCE, "hangs"]
    assert main(["--target", "checkpoint", "--seed", "1"]) == 0
