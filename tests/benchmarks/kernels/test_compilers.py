"""A brief run of the comparison of compilers, of a library with its own copy and with one that computes otherwise."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.harness import results
from benchmarks.kernels import compilers, products
from coalescer_fast.bench import timing
from coalescer_fast.ops import native_library
from coalescer_fast.runtime.native.module import no_programs

pytestmark = pytest.mark.skipif(
    bool(no_programs(torch.float32)), reason=no_programs(torch.float32) or "programs run here"
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(products, "CALLS", {"emoji-64": [partial(products.Convolution, 6, 8, 16)]})
    monkeypatch.setattr(timing, "ROUNDS", (2, 3))


def run(folder, *argv: str) -> tuple[int, list[dict[str, str]]]:
    copy = folder / "copy.so"
    shutil.copy(compilers.HERE, copy)
    common = ["--shapes", "emoji-64", "--budget", "0.001", "--threads", "1", "--allocator", "system"]
    status = compilers.main([str(copy), *common, "--csv", str(folder / "compilers.csv"), *argv])
    return status, results.read(folder / "compilers.csv")


def test_a_copy_is_the_same(tmp_path):
    isa = native_library.isa()
    status, rows = run(tmp_path, "--isa", f"{isa},portable")
    assert status == 0
    assert {(row["isa"], row["same_bits"]) for row in rows} == {(isa, "1"), ("portable", "1")}
    assert all(float(row["y_value_50"]) > 0 for row in rows)
    assert native_library.isa() == isa
    assert native_library._library()._name == str(compilers.HERE)


def test_other_bits_are_said(tmp_path, monkeypatch, capsys):
    made, ours = [], products.ours

    def another_each_time(*arguments):
        for provider in ours(*arguments):
            made.append(provider)
            noise = len(made)
            yield replace(provider, result=lambda noise=noise, result=provider.result: result() + noise)

    monkeypatch.setattr(products, "ours", another_each_time)
    status, rows = run(tmp_path)
    assert status == 1
    assert {row["same_bits"] for row in rows} == {"0"}
    assert "DIFFER" in capsys.readouterr().out
