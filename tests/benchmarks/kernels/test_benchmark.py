from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import benchmarks
from benchmarks.harness import results as common
from benchmarks.kernels import benchmark as kernels
from benchmarks.kernels import grid, peers, providers, report, shapes
from coalescer_fast import ops
from coalescer_fast.bench import timing
from coalescer_fast.ops import dispatch, native_library

SMALL: dict[str, dict[shapes.Call, int]] = {
    "m": {
        shapes.GroupNorm(8, size=4, groups=2, film=True, pre_bias=True): 2,
        shapes.GroupNorm(6, skip=6, size=4, groups=4, activation=None): 1,
        shapes.BiasResidual(8, size=4): 3,
        shapes.DualHead(8, latent=3, size=4, anchored=True): 1,
        shapes.CoalesceStep(3, size=4, mode="unit"): 1,
    }
}
COMMON = ["--backends", "reference", "--shapes", "m", "--budget", "0.001", "--allocator", "system"]


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "CALLS", SMALL)
        patch.setattr(timing, "ROUNDS", (2, 3))
        patch.setattr(timing, "last_level_cache", lambda: 2**16)
        yield


def wrong(x, bias, residual):
    return peers.bias_residual(x, bias, residual) + 1e-3


@pytest.fixture(scope="module")
def measured(small, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "results" / "kernels.csv"
    argv = [*COMMON, "--peers", "eager,eager_contiguous", "--batch", "1,3", "--dtypes", "fp32,bf16", "--csv", path]
    assert kernels.main([str(part) for part in argv]) == 0
    return path


@pytest.fixture
def table(measured, tmp_path) -> Path:
    path = tmp_path / "kernels.csv"
    common.write(path, [{**row, "quiet": "1"} for row in common.read(measured)])
    return path


def test_a_row_for_every_measurement(table, capsys):
    rows = common.read(table)
    assert len(rows) == 5 * 2 * 2 * 2 * 4  # calls, batches, dtypes, states of the caches, providers
    assert list(rows[0]) == list(kernels.COLUMNS)
    assert {row["kernel_provider"] for row in rows} == {"copy", "eager", "eager_contiguous", "reference"}
    for row in rows:
        median, low, high = (float(row[f"y_value_{percent}"]) for percent in (50, 20, 80))
        assert 0 < low <= median <= high < 1e6
        assert row["status"] == "ok"
        assert row["torch"] == torch.__version__
        assert row["backend"] == ("reference" if row["kernel_provider"] == "reference" else "")
        assert row["gpu_name"] == row["driver"] == row["compile_s"] == ""
        if row["kernel_provider"] == "copy":
            assert float(row["percent_of_copy"]) == 100
        else:
            assert float(row["max_abs_err"]) < (1e-5 if row["dtype"] == "fp32" else 0.1)
    film = [
        row
        for row in rows
        if json.loads(row["extra_benchmark_config_str"]).get("film") and row["kernel_provider"] == "eager"
    ]
    assert len(film) == 8
    assert {row["calls_per_evaluation"] for row in film} == {"2"}
    assert {row["speedup_over_eager"] for row in film} == {"1"}


def test_rates_are_those_of_the_times(table):
    cell = [row for row in common.read(table) if row["kernel_name"] == "bias_residual"][:4]
    rows = {row["kernel_provider"]: row for row in cell}
    eager, copy, reference = (rows[name] for name in ("eager", "copy", "reference"))
    size = 8 * 4 * 4 * 4
    assert eager["x_value"] == str(size)
    assert float(eager["gb_per_s"]) == pytest.approx(3 * size / float(eager["y_value_50"]) / 1e3, rel=1e-4)
    share = 100 * 1.5 * float(copy["y_value_50"]) / float(eager["y_value_50"])
    assert float(eager["percent_of_copy"]) == pytest.approx(share, rel=1e-4)
    assert float(reference["speedup_over_eager"]) == pytest.approx(
        float(eager["y_value_50"]) / float(reference["y_value_50"]), rel=1e-4
    )


def test_summary_of_a_csv_file(table, capsys):
    assert kernels.main(["--summary", str(table)]) == 0
    out = capsys.readouterr().out
    assert "reference is slower than the fastest peer in" in out
    assert "target" not in out  # the reference promises nothing
    assert sum(line.split()[:2] == ["dual_head", "bf16"] for line in out.splitlines()) == 2


def as_backend(path: Path, name: str, factor: float, **changes: str) -> None:
    """A backend in the place of the reference, so many times as fast as eager, the only peer."""
    rows: list[common.Row] = []
    eager = math.nan
    for row in common.read(path):
        if row["kernel_provider"] == "eager":
            eager = float(row["y_value_50"])
        if row["kernel_provider"] not in ("copy", "eager", "eager_contiguous"):
            row |= {"kernel_provider": name, **{f"y_value_{percent}": str(eager / factor) for percent in (50, 20, 80)}}
        if row["kernel_provider"] != "eager_contiguous":
            rows.append({**row, **changes})
    common.write(path, rows)


def test_targets_and_where_they_are_missed(table, capsys):
    as_backend(table, "cpu", 4.0)
    kernels.main(["--summary", str(table)])
    met = capsys.readouterr().out
    assert (
        "target, group_norm_silu on cpu, fp32 warm: met: 3x over eager at the median call; met: never slower than eager"
        in met
    )
    assert "cpu is slower than the fastest peer in 0 of 40 calls" in met
    table_row = next(
        line.split() for line in met.splitlines() if line.split()[:3] == ["group_norm_silu", "fp32", "warm"]
    )
    assert table_row[3:8] == ["cpu", "4", "4.00", "4.00", "4.00"]


@pytest.mark.skipif(bool(native_library.unavailable()), reason="needs the native library")
def test_a_quick_run_has_no_targets_and_no_bar_in_a_pipe(tmp_path):
    # beside the benchmarks alone, so that the package is the one that is installed
    (tmp_path / "benchmarks").symlink_to(Path(benchmarks.__file__).parent)
    argv = ["--backends", "cpu", "--quick", "--op", "bias_residual", "--peers", "eager", "--budget", "0.001"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", *argv], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "cpu is slower than the fastest peer in" in done.stdout
    assert "target" not in done.stdout
    assert done.stderr == ""


def test_share_of_the_copy_counts_beyond_the_cache(table, capsys):
    for llc_bytes, percent, words in (
        ("1", "61", "; met: 60 % of copy"),
        ("1", "59", "; MISSED: 60 % of copy"),
        ("9999999", "61", ""),
    ):
        as_backend(table, "cpu", 4.0, llc_bytes=llc_bytes, percent_of_copy=percent)
        kernels.main(["--summary", str(table)])
        out = capsys.readouterr().out
        assert words in out
        assert ("% of copy beyond the cache" in out) == bool(words)
        assert (
            next(line for line in out.splitlines() if line.split()[:1] == ["bias_residual"]).split()[-1]
            == f"{percent}.00"
            or not words
        )


def test_slower_calls_are_listed(table, capsys):
    as_backend(table, "cpu", 0.25)
    kernels.main(["--summary", str(table)])
    out = capsys.readouterr().out
    assert "MISSED: 3x over eager at the median call; MISSED: never slower than eager" in out
    assert "cpu is slower than the fastest peer in 40 of 40 calls:" in out
    assert "group_norm_silu bf16 cold, m 8x4x4 g2 film pre_bias batch 3: " in out


def test_of_two_runs_the_later_counts(table):
    rows = common.read(table)
    later = [{**row, "timestamp": "9" + row["timestamp"], "y_value_50": "7"} for row in rows]
    both = report.groups(later + rows)
    assert len(both) == len(report.groups(rows)) == 40
    assert all(group.time("eager") == 7 for group in both)
    elsewhere = [{**row, "threads": "99"} for row in rows]
    assert len(report.groups(rows + elsewhere)) == 80


def test_disturbed_times_are_left_out_and_measured_again(table, capsys):
    rows = common.read(table)
    first = next(row for row in rows if row["kernel_provider"] == "eager" and row["kernel_name"] == "bias_residual")
    common.write(table, [{**row, "quiet": "0"} if row == first else dict(row) for row in rows])
    kernels.main(["--summary", str(table)])
    assert "1 of 160 times were disturbed" in capsys.readouterr().out
    groups = report.groups(common.read(table))
    assert sum(math.isnan(group.time("eager")) for group in groups) == 1
    assert sum(math.isnan(group.of_copy("eager")) for group in groups) == 1
    argv = [
        *COMMON,
        "--peers",
        "eager,eager_contiguous",
        "--batch",
        "1,3",
        "--dtypes",
        "fp32,bf16",
        "--again",
        "--csv",
        str(table),
    ]
    assert kernels.main(argv) == 0
    added = common.read(table)[len(rows) :]
    assert len(added) == 8  # one call, warm and cold
    assert {row["kernel_name"] for row in added} == {"bias_residual"}
    common.write(table, [{**row, "quiet": "1"} for row in common.read(table)])
    capsys.readouterr()
    assert kernels.main(argv) == 0
    assert "Nothing is left to measure" in capsys.readouterr().out
    rows = common.read(table)
    without = [dict(row) for row in rows if row["kernel_name"] != "dual_head" or row["kernel_provider"] != "eager"]
    common.write(table, without)
    assert kernels.main([*argv, "--op", "dual_head", "coalesce_step"]) == 0
    assert len(common.read(table)) - len(without) == 2 * 2 * 2 * 4  # batches, dtypes, states of the caches, providers


def test_rows_are_added_to_a_file_of_the_same_columns(table, tmp_path, capsys):
    before = len(common.read(table))
    argv = [*COMMON, "--op", "bias_residual", "--peers", "none", "--batch", "1", "--dtypes", "fp32", "--cache", "warm"]
    assert kernels.main([*argv, "--csv", str(table)]) == 0
    rows = common.read(table)
    assert len(rows) == before + 2
    assert rows[-1]["speedup_over_eager"] == ""
    other = tmp_path / "other.csv"
    other.write_text("sampler,steps\n")
    assert kernels.main([*argv, "--csv", str(other)]) == 1
    assert "other columns" in capsys.readouterr().err
    assert other.read_text() == "sampler,steps\n"


def test_a_wrong_provider_has_no_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(peers.EAGER, "bias_residual", wrong)
    path = tmp_path / "kernels.csv"
    argv = [
        *COMMON,
        "--op",
        "bias_residual",
        "--peers",
        "eager",
        "--batch",
        "2",
        "--dtypes",
        "fp32",
        "--cache",
        "warm",
        "--csv",
        str(path),
    ]
    assert kernels.main(argv) == 1
    rows = {row["kernel_provider"]: row for row in common.read(path)}
    assert rows["eager"]["status"].startswith("FAIL: error 0.001 is above")
    assert rows["eager"]["y_value_50"] == rows["eager"]["gb_per_s"] == ""
    assert float(rows["eager"]["max_abs_err"]) == pytest.approx(1e-3, rel=0.01)
    assert rows["reference"]["status"] == "ok"
    assert float(rows["reference"]["y_value_50"]) > 0
    assert "FAIL" in capsys.readouterr().out
    assert kernels.main([*argv, "--no-refcheck"]) == 0
    last = next(row for row in reversed(common.read(path)) if row["kernel_provider"] == "eager")
    assert float(last["y_value_50"]) > 0
    assert float(last["max_abs_err"]) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("broken", ["nan", "one_sample", "shape", "raises"])
def test_whatever_is_wrong_is_caught(broken, monkeypatch, capsys):
    def function(x, bias, residual):
        y = peers.bias_residual(x, bias, residual)
        if broken == "raises":
            raise RuntimeError("no such kernel")
        if broken == "shape":
            return y[:, 1:]
        y[-1, 0] += math.nan if broken == "nan" else 1e-3
        return y

    monkeypatch.setitem(peers.EAGER, "bias_residual", function)
    argv = [*COMMON, "--op", "bias_residual", "--peers", "eager", "--batch", "3", "--dtypes", "fp32", "--cache", "warm"]
    assert kernels.main(argv) == 1


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("call", SMALL["m"], ids=str)
def test_the_peers_are_right(call, dtype):
    cell = grid.Cell("m", call, 1, 3, dtype)
    inputs = call.inputs(3, grid.DTYPES[dtype], torch.device("cpu"))
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    for arguments in (inputs, {name: providers.contiguous(x) for name, x in inputs.items()}):
        assert providers.Check(cell, inputs)(peers.EAGER[call.op](**arguments))[1] == ""
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


def test_compile_is_a_peer_with_seconds_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # the compiler takes seconds
    path = tmp_path / "kernels.csv"
    argv = [
        *COMMON,
        "--op",
        "coalesce_step",
        "--peers",
        "compile",
        "--batch",
        "1",
        "--dtypes",
        "fp32",
        "--cache",
        "warm",
        "--csv",
        str(path),
    ]
    assert kernels.main(argv) == 0
    row = next(row for row in common.read(path) if row["kernel_provider"] == "compile")
    assert float(row["compile_s"]) > 0
    assert row["resolved_backend"] == "inductor"


def test_overhead(tmp_path, capsys):
    path = tmp_path / "overhead.csv"
    argv = [*COMMON, "--overhead", "--peers", "eager", "--dtypes", "fp32", "--csv", str(path)]
    assert kernels.main(argv) == 0
    rows = common.read(path)
    assert {row["metric_name"] for row in rows} == {"overhead"}
    assert {row["kernel_name"] for row in rows} == {"group_norm_silu", "bias_residual", "dual_head", "coalesce_step"}
    assert "microseconds per call on 1x8x2x2" in capsys.readouterr().out
    assert kernels.main(["--plot", str(tmp_path / "out.png"), "--from", str(path)]) == 1


def test_plot_is_drawn_from_the_csv_alone(table, tmp_path):
    pictures = []
    for factor in (4.0, 0.5):
        as_backend(table, "cpu", factor)
        target = tmp_path / "kernels.png"
        assert kernels.main(["--plot", str(target), "--from", str(table)]) == 0
        pictures.append(np.asarray(Image.open(target)))
    assert pictures[0].shape[0] > 500
    assert pictures[0].std() > 5
    assert pictures[0].shape != pictures[1].shape or not np.array_equal(*pictures)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--op", "conv"], "invalid choice: 'conv'"),
        (["--shapes", "xl"], "'xl' is unknown: use some of m, all"),
        (["--batch", "0"], "'0' is not a whole number from 1 up"),
        (["--dtypes", "fp8"], "'fp8' is unknown"),
        (["--peers", "jax"], "'jax' is unknown"),
        (["--plot", "out.png"], "--plot and --from go together"),
        (["--from", "in.csv"], "--plot and --from go together"),
        (["--again"], "--again needs --csv"),
        (
            ["--calls", "9x9x9"],
            "--calls '9x9x9' is no call of group_norm_silu, bias_residual, dual_head, coalesce_step in m",
        ),
        (["--summary", "missing.csv"], "missing.csv"),
        (["--backends", "triton"], "--backends triton cannot run group_norm_silu here"),
        (["--csv", "/dev/null/kernels.csv"], "/dev/null"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(argv, words, capsys):
    try:
        status = kernels.main(argv)
    except SystemExit as stop:
        status = stop.code
    assert status not in (0, None)
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(capsys):
    assert kernels.main(["--device", "cuda"]) == 1
    assert "there is none: use --device cpu" in capsys.readouterr().err


def test_a_file_without_results(tmp_path, capsys):
    for text, words in (("sampler,steps\n1,2\n", "column kernel_name is missing"), ("", "there is no row")):
        (tmp_path / "f.csv").write_text(text)
        assert kernels.main(["--summary", str(tmp_path / "f.csv")]) == 1
        assert words in capsys.readouterr().err


def test_chosen_calls_alone(tmp_path):
    path = tmp_path / "kernels.csv"
    argv = [
        *COMMON,
        "--calls",
        "8x4x4",
        "3x4x4 unit",
        "--peers",
        "none",
        "--batch",
        "1",
        "--dtypes",
        "fp32",
        "--cache",
        "warm",
    ]
    assert kernels.main([*argv, "--csv", str(path)]) == 0
    assert [row["kernel_name"] for row in common.read(path)[::2]] == ["bias_residual", "coalesce_step"]


def test_time_that_is_over(tmp_path, capsys, monkeypatch):
    """One call of every op comes before a second one of any."""
    path, clock = tmp_path / "kernels.csv", iter(range(100))
    monkeypatch.setattr(kernels, "providers_of", lambda *args: {"copy": providers.Provider(lambda: None)})
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(timing.CpuTimer, "warm", lambda self, function: function)
    monkeypatch.setattr(
        timing, "interleave", lambda samples, budget: {name: [timing.Measurement(1.0)] for name in samples}
    )
    argv = [*COMMON, "--peers", "none", "--batch", "1,3", "--dtypes", "fp32", "--cache", "warm", "--seconds", "5"]
    assert kernels.main([*argv, "--csv", str(path)]) == 0
    rows = common.read(path)
    assert len(rows) == 5
    assert {row["kernel_name"] for row in rows[:4]} == set(peers.EAGER)
    assert "5 of 10 calls are left out, the first of them bias_residual " in capsys.readouterr().out


def test_a_provider_that_cannot_be_captured(tmp_path, monkeypatch):
    def warm(self, function):
        if getattr(function, "keywords", {}).get("backend"):
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: timing.Measurement(1.0)

    monkeypatch.setattr(timing.CpuTimer, "warm", warm)
    path = tmp_path / "kernels.csv"
    argv = [*COMMON, "--op", "bias_residual", "--peers", "eager", "--batch", "1", "--dtypes", "fp32", "--cache", "warm"]
    assert kernels.main([*argv, "--csv", str(path)]) == 1
    status = {row["kernel_provider"]: row["status"] for row in common.read(path)}
    assert status == {
        "copy": "ok",
        "eager": "ok",
        "reference": "FAIL: operation not permitted when stream is capturing",
    }


def test_a_call_that_needs_too_much_memory_is_left_out(tmp_path, monkeypatch, capsys):
    def bias_residual(x, bias, residual):
        if x.shape[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return peers.bias_residual(x, bias, residual)

    monkeypatch.setitem(peers.EAGER, "bias_residual", bias_residual)
    path = tmp_path / "kernels.csv"
    argv = [
        *COMMON,
        "--op",
        "bias_residual",
        "--peers",
        "eager",
        "--batch",
        "3,1",
        "--dtypes",
        "fp32",
        "--cache",
        "warm",
    ]
    assert kernels.main([*argv, "--csv", str(path)]) == 0
    assert {row["batch"] for row in common.read(path)} == {"1"}
    assert "LEFT OUT bias_residual" in capsys.readouterr().err


def test_needs_no_diffusers():
    code = "import sys, benchmarks.kernels.benchmark; names = {'diffusers', 'transformers', 'matplotlib', 'triton'}; "
    code += "print(sorted(names & set(sys.modules)))"
    folders = [str(Path(module.__file__).parents[1]) for module in (benchmarks, sys.modules["coalescer_fast"])]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {folders}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_every_runnable_backend_is_measured():
    cell = grid.Cell("m", next(iter(SMALL["m"])), 1, 1, "fp32")
    args = kernels.parser().parse_args(["--peers", "none"])
    found = providers.providers_of(cell, torch.device("cpu"), args)
    able = [
        name
        for name, (can, _) in ops.backends("group_norm_silu").items()
        if can and dispatch.BACKENDS[name].device != "cuda"
    ]
    assert list(found) == ["copy", *able]
