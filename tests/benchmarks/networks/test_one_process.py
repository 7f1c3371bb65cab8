"""`benchmarks.networks --device cuda`, on a CPU but for its graphs."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch

from benchmarks.harness import results
from benchmarks.networks import benchmark, models, one_process
from coalescer_fast.bench.peers import OK
from coalescer_fast.runtime.native.module import no_programs, runtime_of

BRIEF = ["--model", "tiny-vae", "--scale", "0.1", "--size", "8", "--rounds", "2"]
CPU = torch.device("cpu")
needs_programs = pytest.mark.skipif(bool(no_programs(torch.float32)), reason="needs the native library")


def run(folder, *argv: str, peers=("eager",)) -> tuple[int, list[dict[str, str]]]:
    path = folder / "results" / "networks.csv"
    args = benchmark.parser().parse_args([*BRIEF, *argv, "--csv", str(path)])
    args.dtypes, args.peers = ["fp32"], list(peers)
    return one_process.run(args, CPU), results.read(path)


@needs_programs
def test_rows_in_order_and_their_table(tmp_path, capsys):
    status, rows = run(tmp_path, "--profile", "--seconds", "300")
    assert status == 0
    assert "kernels" in capsys.readouterr().out
    assert list(rows[0]) == list(one_process.COLUMNS)
    assert [row["provider"] for row in rows] == ["coalescer_fast", "eager_channels_last", "eager_graph"]
    assert [row["status"] for row in rows] == [OK, OK, "skipped: it needs a CUDA device"]
    for row in rows[:2]:
        low, median, high = (float(row[f"y_value_{percent}"]) for percent in (20, 50, 80))
        assert 0 < low <= median <= high
        assert float(row["latency_ms"]) > 0
        assert float(row["error"]) <= 1e-4
        share = 100 * float(row["gflop_per_s"]) / float(row["peak_gflop_per_s"])
        assert float(row["percent_of_peak"]) == pytest.approx(share, rel=1e-4)
    assert rows[2]["y_value_50"] == ""
    assert benchmark.main(["--summary", str(tmp_path / "results" / "networks.csv")]) == 0
    shown = capsys.readouterr().out
    assert f"| coalescer_fast | {rows[0]['y_value_50']} | {rows[0]['latency_ms']} |" in shown
    assert "| eager_graph | skipped: it needs a CUDA device |" in shown


@needs_programs
def test_a_wrong_result_has_no_time(tmp_path, monkeypatch):
    def wrong(args, module, given):
        return lambda: 2 * models.evaluate(module, given)

    monkeypatch.setitem(one_process.PROVIDERS, "eager_channels_last", wrong)
    status, rows = run(tmp_path)
    assert status == 1
    assert rows[1]["status"].startswith("FAIL: error 1 is above 0.01")
    assert rows[1]["y_value_50"] == rows[1]["latency_ms"] == ""
    assert float(rows[1]["error"]) == pytest.approx(1, rel=1e-3)


@needs_programs
def test_ours_that_runs_in_torch_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "coalescer_fast.runtime.native.module.ModuleRuntime._is_for_torch", lambda *args: "of this test"
    )
    status, rows = run(tmp_path, peers=())
    assert status == 1
    assert rows[0]["status"] == "FAIL: the module runs in torch: of this test"


@needs_programs
def test_what_takes_too_long_is_stopped_and_the_rest_left_out(tmp_path, monkeypatch):
    made = []

    def slow(args, module, given):
        made.append(module)
        with contextlib.suppress(Exception):  # as compilers do
            time.sleep(60)

    monkeypatch.setitem(one_process.PROVIDERS, "eager_channels_last", slow)
    start = time.monotonic()
    status, rows = run(tmp_path, "--seconds", "6")
    assert time.monotonic() - start < 30
    assert status == 0
    assert rows[0]["status"] == OK
    assert rows[1]["status"] == "skipped: the time was over before it was measured"
    assert rows[2]["status"] == "skipped: the time is over"
    assert runtime_of(made[0]) is None


def test_arguments(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--device", "cuda"]) == 1
    assert "there is no CUDA device: leave --device out" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for words in (["--peers", "openvino"], ["--dtypes", "int8"]):
        assert benchmark.main(["--device", "cuda", *words]) == 1
        assert f"{words[1]} is for a CPU: use some of" in capsys.readouterr().err
    seen = []
    monkeypatch.setattr(one_process, "run", lambda *given: seen.append(given) or 0)
    assert benchmark.main(["--device", "cuda", "--model", "sd-turbo", "--peers", "eager,compile"]) == 0
    assert benchmark.main(["--device", "cuda"]) == 0
    for args, device in seen:
        assert (args.peers, args.dtypes, device) == (["eager", "compile"], ["bf16"], torch.device("cuda", 0))


@pytest.mark.gpu
def test_gpu(tmp_path):
    path = tmp_path / "networks.csv"
    argv = ["--device", "cuda", "--model", "sd-turbo", "--scale", "0.1", "--size", "16", "--rounds", "2"]
    assert benchmark.main([*argv, "--peers", "eager", "--profile", "--csv", str(path)]) == 0
    rows = results.read(path)
    assert [row["status"] for row in rows] == [OK, OK, OK]
    assert all(float(row["peak_gpu_mb"]) > 0 for row in rows)
