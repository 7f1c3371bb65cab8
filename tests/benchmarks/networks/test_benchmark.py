from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.harness import results
from benchmarks.kernels import forms
from benchmarks.networks import benchmark, isa, models, providers, report
from benchmarks.networks.task import INPUTS, Task
from coalescer_fast.bench.peers import OK, Missing
from coalescer_fast.ops import native_library
from coalescer_fast.runtime.native.module import no_programs

BRIEF = ["--model", "tiny-vae", "--scale", "0.1", "--size", "8", "--threads", "1", "--rounds", "2"]
NATIVE = [dtype for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)) if not no_programs(kind)]
needs_programs = pytest.mark.skipif("fp32" not in NATIVE, reason="needs the native library, and AVX2 or AVX-512")


def run(folder, *argv: str) -> tuple[int, list[dict[str, str]]]:
    path = folder / "results" / "networks.csv"
    status = benchmark.main([*BRIEF, *argv, "--csv", str(path)])
    return status, results.read(path)


def task(folder, **changes) -> Task:
    made = Task("run", "eager", "fp32", "tiny-vae", 0.1, 8, 1, 1, "", str(folder))
    for timestep in models.TIMESTEPS:
        given = models.flat(models.inputs("tiny-vae", 1, 8, 0.1, timestep))
        np.savez(made.path(INPUTS.format(timestep)), **{name: x.numpy() for name, x in given.items()})
    return replace(made, **changes)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    status, rows = run(
        tmp_path_factory.mktemp("networks"), "--dtypes", ",".join(NATIVE), "--peers", "eager", "--cached"
    )
    assert status == 0
    return rows


@needs_programs
def test_a_row_for_every_provider(measured):
    assert list(measured[0]) == list(benchmark.COLUMNS)
    found = [(row["provider"], row["dtype"]) for row in measured]
    ours = [("coalescer_fast", dtype) for dtype in NATIVE]
    assert found == [("eager", "fp32"), *ours, *[("eager", dtype) for dtype in NATIVE if dtype != "fp32"]]
    count = models.parameters(models.on_meta("tiny-vae", 0.1))
    for row in measured:
        low, median, high = (float(row[f"y_value_{percent}"]) for percent in (20, 50, 80))
        assert 0 < low <= median <= high
        assert row["status"] == OK
        assert [row["samples"], row["threads"], row["order"]] == ["2", "1", "in turn"]
        assert int(row["parameters"]) == count
        assert float(row["gflop"]) == pytest.approx(models.gflop("tiny-vae", 1, 8, 0.1), rel=1e-5)
        assert float(row["gflop_per_s"]) == pytest.approx(1e3 * float(row["gflop"]) / median, rel=1e-4)
        share = 100 * float(row["gflop_per_s"]) / float(row["peak_gflop_per_s"])
        assert float(row["percent_of_peak"]) == pytest.approx(share, rel=1e-4)
        assert float(row["error"]) <= (1e-4 if row["dtype"] == "fp32" else 0.05)
        assert 0 < float(row["prepare_s"]) < float(row["cold_s"])
        assert 50 < float(row["peak_rss_mb"]) < 5000  # torch itself takes some hundreds
        assert (row["cached_cold_s"] != "") == (row["provider"] == "coalescer_fast")
    assert float(measured[0]["error"]) == 0
    assert float(measured[0]["speedup_over_eager"]) == 1


@needs_programs
def test_table(measured):
    text = "\n".join(report.tables(measured))
    assert text.startswith("**tiny-vae**, widths times 0.1, latents 8×8, batch 1: ")
    assert "1 thread\n" in text
    [line] = [line for line in text.splitlines() if line.startswith("| coalescer_fast | fp32")]
    [row] = [row for row in measured if (row["provider"], row["dtype"]) == ("coalescer_fast", "fp32")]
    assert f"| {float(row['y_value_50']):.4g}" in line
    assert line.count("|") == len(report.HEAD) + 1
    without = "\n".join(report.tables([{**row, "cached_cold_s": ""} for row in measured]))
    assert "cold start, s |\n" in without
    assert line.rpartition(" | ")[0] + " |" in without.splitlines()


@needs_programs
def test_of_what_was_measured_twice_the_table_shows_the_latest(measured):
    later = [{**row, "timestamp": "9", "y_value_50": "12345"} for row in measured[:1]]
    lines = [line for line in report.tables([*later, *measured]) if line.startswith("| eager | fp32")]
    assert len(lines) == 1
    assert "12345" not in next(report.tables(measured))
    assert "| 1.234e+04" in lines[0]


def test_a_table_of_nothing_is_refused(tmp_path, capsys):
    empty = tmp_path / "empty.csv"
    empty.write_text("model,isa\nsdxs,\n", "utf-8")
    assert benchmark.main(["--summary", str(empty)]) == 1
    assert "the column cpu is missing" in capsys.readouterr().err


@needs_programs
def test_one_after_the_other(tmp_path):
    status, rows = run(tmp_path, "--dtypes", "fp32", "--peers", "none", "--order", "alone")
    assert status == 0
    assert [(row["provider"], row["order"]) for row in rows] == [("eager", "alone"), ("coalescer_fast", "alone")]
    assert all(row["y_value_50"] for row in rows)


def test_processes_are_there_at_once_only_if_they_fit_in_memory(monkeypatch):
    monkeypatch.setattr(benchmark, "available", lambda: 20e9)
    assert benchmark.fit(8, 1_000_000)
    assert not benchmark.fit(8, 866_000_000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openvino", "onnxruntime"])
def test_exported(tmp_path, kind):
    for package in ("onnx", "onnxscript") if kind == "onnxruntime" else ():
        pytest.importorskip(package, reason=f"needs the package {package}")
    pytest.importorskip(kind, reason=f"needs the package {kind}")
    _, rows = run(tmp_path, "--dtypes", "fp32", "--peers", kind)
    [row] = [row for row in rows if row["provider"] == kind]
    assert row["status"] == OK
    assert float(row["error"]) < 1e-4
    assert float(row["convert_s"]) > 0
    assert float(row["convert_rss_mb"]) > 0


@pytest.mark.slow
def test_quantized(tmp_path):
    for package in ("openvino", "nncf"):
        pytest.importorskip(package, reason=f"needs the package {package}")
    _, rows = run(tmp_path, "--dtypes", "int8", "--peers", "openvino_int8")
    [row] = [row for row in rows if row["provider"] == "openvino_int8"]
    assert row["status"] == OK
    assert 1e-3 < float(row["error"]) < 0.1  # of 8 bits


@pytest.mark.slow
def test_compiled(tmp_path):
    _, rows = run(tmp_path, "--dtypes", "fp32", "--peers", "compile")
    [row] = [row for row in rows if row["provider"] == "compile"]
    assert row["status"] == OK
    assert float(row["error"]) < 1e-4


def test_a_result_that_is_wrong_is_marked(tmp_path):
    base = task(tmp_path)
    other = benchmark.Running(replace(base, name="openvino"), {"status": OK})
    expected = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    np.save(base.result, expected)
    for result, wrong in [
        (expected * 1.001, ""),
        (expected * 1.1, "error 0.1 is above 0.01"),
        (expected * np.nan, "error nan is above 0.01"),
        (expected[:, :2], "result has shape (1, 2, 8, 8), expected (1, 3, 8, 8)"),
    ]:
        np.save(other.task.result, result)
        assert benchmark.check(other, base) == wrong


def test_a_process_that_ends_says_why(tmp_path):
    process = benchmark.Process(task(tmp_path, name="openvino_int9"))
    with pytest.raises(RuntimeError, match="openvino_int9"):
        process.answer()
    process = benchmark.Process(task(tmp_path))
    assert process.answer()["cold_s"] > 0
    process.process.kill()
    with pytest.raises(RuntimeError, match="killed by signal 9"):
        process.answer("measure")


def test_a_package_that_is_missing_is_named():
    with pytest.raises(Missing, match="it needs the package nowhere: pip install nowhere"):
        providers.missing(("sys", "nowhere"))


def test_what_no_cap_holds_for_is_left_out(tmp_path):
    each = benchmark.Running(task(tmp_path, name="onnxruntime", isa="avx2"), {"status": OK})
    benchmark.start(each, {}, each.task)
    assert str(each.row["status"]).startswith("skipped: its kernels (MLAS) ask the processor itself")
    assert each.process is None


def avx512() -> bool:
    try:
        isa.last_use()
    except (OSError, IndexError, ValueError):
        return False
    return native_library.unavailable() == "" and native_library.isa().startswith("avx512")


@pytest.mark.skipif(not avx512(), reason="needs AVX-512, and Linux to say when it is in use")
@pytest.mark.parametrize("capped", ["C library", *isa.CAPS])
def test_avx512_is_seen_where_it_is_used_and_only_there(capped):
    """Convolutions of torch, where the C library alone is capped, and where torch is."""
    code = """if True:
        import torch
        from benchmarks.networks.isa import avx512_percent
        x, weight = torch.randn(1, 64, 32, 32), torch.randn(64, 64, 3, 3)
        print(avx512_percent(lambda: torch.conv2d(x, weight, padding=1), 1.0))
    """
    caps = isa.CAPS.get(capped) or {"GLIBC_TUNABLES": isa.AVX2["GLIBC_TUNABLES"]}
    root = os.path.dirname(os.path.dirname(benchmark.__file__))
    env = {**os.environ, **caps, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    percent = float(done.stdout)
    assert percent == 0 if capped in isa.CAPS else percent > 10


@pytest.mark.parametrize("argv", [[], ["--isa", "avx2"]], ids=["best", "avx2"])
def test_a_checkout_without_a_library_is_one_sentence(monkeypatch, tmp_path, capsys, argv):
    monkeypatch.setattr(native_library, "FOLDER", tmp_path / "package" / "lib")
    monkeypatch.setattr(native_library, "_load", native_library._load.__wrapped__)
    assert benchmark.main([*BRIEF, *argv, "--profile"]) == 1
    assert forms.main(["--isa", "avx2"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    for line in (first, second):
        assert ": there is nothing to measure: the library of CPU kernels is not there: " in line
        assert line.endswith(f"run `python setup.py build_native` or `pip install -e .` in {tmp_path}")


def test_a_profile_of_no_dtype_fails(monkeypatch, capsys):
    def missing(task, module):
        raise Missing("none of that")

    monkeypatch.setattr(native_library, "_load", lambda: (None, ""))
    monkeypatch.setattr(benchmark, "coalescer_fast_call", missing)
    assert benchmark.main([*BRIEF, "--dtypes", "fp32", "--profile"]) == 1
    assert capsys.readouterr().out == "tiny-vae fp32 skipped: none of that\n"


def test_forms_of_an_unknown_instruction_set(capsys):
    with pytest.raises(SystemExit) as stop:
        forms.main(["--isa", "foo"])
    assert stop.value.code == 2
    assert "argument --isa: invalid choice: 'foo'" in capsys.readouterr().err


@needs_programs
def test_a_profile_by_kind_and_by_shape(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "highest", lambda task, peaks: 100.0)
    assert benchmark.main([*BRIEF, "--dtypes", "fp32", "--profile"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("tiny-vae fp32, batch 1, 1 threads: ")
    kinds, shapes = "\n".join(lines).split("by shape")
    rows = [line.split() for line in kinds.splitlines()[2:] if line.strip()]
    products = [row for row in rows if row[:2] == ["convolution", "3x3"]]
    assert {row[2] for row in products} <= {"direct", "winograd"}
    gflop = sum(float(row[-4]) for row in products)
    assert gflop == pytest.approx(models.gflop("tiny-vae", 1, 8, 0.1), abs=2e-3)
    assert sum(float(row[row.index("float32") + 3]) for row in rows) == pytest.approx(100, abs=1)
    assert all(float(row[-2]) == pytest.approx(float(row[-3]), abs=1) for row in products)  # of a peak of 100
    assert "convolution 3x3 1x8x8, 4 -> 32" in shapes
