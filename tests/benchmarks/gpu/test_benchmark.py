from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import benchmarks
from benchmarks.gpu import benchmark as gpu
from benchmarks.gpu import calls as gpu_calls
from benchmarks.gpu import picture as gpu_picture
from benchmarks.gpu import replay as gpu_replay
from benchmarks.gpu import report as gpu_report
from benchmarks.harness import refcheck
from benchmarks.harness import results as common
from benchmarks.kernels import benchmark as kernels
from benchmarks.kernels import shapes
from benchmarks.networks import benchmark as networks
from benchmarks.sampler import benchmark as sampler
from coalescer_fast import ops
from coalescer_fast.ops import cuda_library
from coalescer_fast.ops.dispatch import Backend

FACTS = {"GPU": "a GPU", "driver": "1.2"}
LARGE = shapes.GroupNorm(320, size=64, groups=32)
SMALL = shapes.GroupNorm(256, size=8, groups=32)


def python(code: str, **options) -> partial[tuple[str, str]]:
    return partial(gpu.command, [sys.executable, "-c", code], **options)


def run(parts: list[gpu.Part], out: Path, seconds: float = 60.0) -> tuple[int, dict, str]:
    status = gpu.run(parts, out, seconds, FACTS)
    return status, json.loads((out / "report.json").read_text()), (out / "summary.md").read_text()


def test_without_a_gpu_it_says_so_in_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert (
        capsys.readouterr().err
        == "python -m benchmarks.gpu: there is no CUDA device: run it on a machine that has one\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    def broken(limit):
        raise RuntimeError("no such thing")

    parts = [
        gpu.Part("good", 1, python("print('all is well')")),
        gpu.Part("broken", 1, broken),
        gpu.Part("wrong", 1, python("print('it is wrong'); raise SystemExit(3)")),
        gpu.Part("absent", 1, lambda limit: ("not installed", "the tool is not there")),
        gpu.Part("last", 1, python("print('still here')")),
    ]
    status, report, summary = run(parts, tmp_path)
    assert status == 1
    assert [part["status"] for part in report["parts"]] == ["ok", "failed", "failed", "not installed", "ok"]
    assert report["environment"] == FACTS
    assert "RuntimeError: no such thing" in report["parts"][1]["output"]
    assert "| GPU | a GPU |" in summary
    assert "| good | ok |" in summary
    assert "| all is well |" in summary
    assert "## wrong: failed\n\n```\nit is wrong\n```" in summary
    assert run([parts[0], parts[3]], tmp_path)[0] == 0


def test_a_part_that_takes_too_long_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.3)
    patient = "import time\nprint('begun', flush=True)\ntime.sleep(60)"
    deaf = f"import signal\nsignal.signal({signal.SIGINT:d}, signal.SIG_IGN)\n{patient}"
    parts = [
        gpu.Part("patient", 1, python(patient)),
        gpu.Part("deaf", 1, python(deaf)),
        gpu.Part("last", 1, python("print('in time')")),
    ]
    start = time.monotonic()
    status, report, _ = run(parts, tmp_path, seconds=6.0)
    assert time.monotonic() - start < 20
    assert status == 1
    assert [part["status"] for part in report["parts"]] == ["timed out", "timed out", "ok"]
    assert "begun" in report["parts"][1]["output"]


def test_time_that_is_left_goes_to_the_parts_to_come():
    limits = []

    def note(limit):
        limits.append(limit)
        return "ok", ""

    list(gpu.execute([gpu.Part("", share, note) for share in (1, 2, 1)], 100.0))
    assert limits == pytest.approx([25, 200 / 3, 100], rel=0.01)
    list(gpu.execute([gpu.Part("", 0, note)], 100.0))
    assert limits[-1] >= 1
    list(gpu.execute([gpu.Part("", 1, note, always=True), gpu.Part("", 9, note)], 50.0))
    assert limits[-2] == gpu.NEEDED  # all else needs it
    assert limits[-1] == pytest.approx(50, rel=0.01)


@pytest.fixture
def asked(monkeypatch):
    """The command lines that a plan runs, none of them in fact."""
    found = []
    monkeypatch.setattr(gpu, "command", lambda argv, limit, **variables: found.append([*argv]) or ("ok", ""))
    monkeypatch.setattr(gpu, "tool_path", lambda name: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda n: (9, 0))
    monkeypatch.setattr(ops, "backends", lambda op: dict.fromkeys(("cpu", "triton", "cuda"), (True, "")))
    return found


def of(asked: list[list[str]], module: str) -> list[list[str]]:
    return [argv[3:] for argv in asked if argv[1:3] == ["-m", module]]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("quick", [True, False])
def test_every_part_of_a_plan_asks_for_what_exists(quick, device, tmp_path, asked):
    plan = gpu.parts(tmp_path, quick, device)
    results = list(gpu.execute(plan, gpu.QUICK_SECONDS if quick else 2 * gpu.SECONDS))
    assert {result.status for result in results} <= {"ok", "failed", "left out"}
    # nothing was measured and built, of which the parts are judged
    assert {result.part for result in results if result.status == "failed"} <= {"build"}
    assert {result.stage for result in results} == set("abcde" if quick else gpu.STAGES)
    assert len({part.name for part in plan}) == len(plan)
    for argv in of(asked, "benchmarks.kernels"):
        args = kernels.parser().parse_args(argv)
        assert (args.device, args.again, args.seconds > 5) == (device, True, True)
        assert {cell.call.op for cell in kernels.cells(args)} >= {"group_norm_silu", "bias_residual", "coalesce_step"}
        assert args.budget * len(kernels.CACHES) < 1
    if device == "cuda" and not quick:
        large = [cell for cell in kernels.cells(args) if cell.batch * cell.call.elements * 2 >= gpu_report.LARGE]
        assert large
    drawn = [sampler.parser().parse_args(argv) for argv in of(asked, "benchmarks.sampler")]
    assert {args.device for args in drawn} == {device}
    if device == "cuda" and not quick:
        ours = [args for args in drawn if not {"compile", "compile_graphs"} & set(args.peers)]
        assert [args.model for args in ours] == [["emoji-64", "m", "l"]]
        assert drawn[: len(ours)] == ours  # ours first, so that it is measured whatever happens
        for args in ours:
            assert set(map(str, args.batch)) >= {"16", *gpu_report.OVER_COMPILE}
        for model in ("emoji-64", "m", "l"):
            assert any(args.model == [model] and "compile_graphs" in args.peers for args in drawn)
    for argv in of(asked, "benchmarks.gpu.picture"):
        assert argv[:2] == ["--device", device]
    assert len(of(asked, "benchmarks.networks")) == 1
    checked = [argv for argv in asked if "benchmarks.gpu.calls" in argv]
    assert len(checked) == (2 if quick else 3)
    assert all(("--emulated" in argv) == (device == "cpu") for argv in checked[:1])


def test_only_some_stages_and_parts(monkeypatch, tmp_path):
    plans = []
    monkeypatch.setattr(gpu, "run", lambda plan, out, seconds, facts: plans.append([part.name for part in plan]) or 0)
    monkeypatch.setattr(gpu, "environment", lambda device: {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.main(["--out", str(tmp_path), "--only", "build,sampler"]) == 0
    assert gpu.main(["--out", str(tmp_path), "--stages", "e,a"]) == 0
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--stages", "g"])
    assert plans == [
        ["build", "sampler"],
        ["build", "calls", "picture", "networks"],
    ]


PARTS = """
import sys, time
from pathlib import Path
from benchmarks.gpu import benchmark as gpu

out = Path(sys.argv[1])


def note(name, seconds=0.0):
    def work(limit):
        with (out / "log").open("a") as file:
            print(name, file=file)
        time.sleep(seconds)
        return "ok", f"{name} is done"

    return work


parts = [
    gpu.Part("build", 1, note("build"), "a", always=True),
    gpu.Part("calls", 1, note("calls"), "a"),
    gpu.Part("tests", 1, note("tests", float(sys.argv[2])), "b"),
    gpu.Part("kernels", 1, lambda limit: ("cut" if float(sys.argv[2]) else "ok", "3 times"), "c"),
]
sys.exit(gpu.run(parts, out, 60.0, {"GPU": "a GPU"}))
"""


def test_a_run_that_is_killed_goes_on(tmp_path):
    def start(seconds: float) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", PARTS, str(tmp_path), str(seconds)]
        return subprocess.Popen(argv, cwd=gpu.ROOT, stdout=subprocess.PIPE, text=True)

    log = tmp_path / "log"
    first = start(60)
    while not (log.exists() and "tests" in log.read_text()):
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.communicate()
    known = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert [(part["part"], part["status"]) for part in known] == [("build", "ok"), ("calls", "ok")]
    second = start(0)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    assert log.read_text().split() == ["build", "calls", "tests", "build", "tests"]
    assert "a calls                done before" in said
    known = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert [(part["part"], part["stage"]) for part in known] == [
        ("build", "a"),
        ("calls", "a"),
        ("tests", "b"),
        ("kernels", "c"),
    ]
    assert "calls is done" in said  # the screen has what was done before, too


def test_what_was_cut_or_failed_is_run_again(tmp_path):
    for status in ("cut", "failed", "timed out", "left out"):
        run([gpu.Part("part", 1, lambda limit: (status, ""))], tmp_path)  # noqa: B023 (it runs at once)
        ran = []
        run([gpu.Part("part", 1, lambda limit: ran.append(1) or ("ok", ""))], tmp_path)  # noqa: B023
        assert ran, status
        (tmp_path / "report.json").unlink()
    assert gpu.earlier(tmp_path) == {}
    (tmp_path / "report.json").write_text('{"parts": [{"part": "of another version"}]}')
    assert gpu.earlier(tmp_path) == {}


def test_a_part_without_enough_time_is_left_out():
    ran = []
    parts = [gpu.Part("long", 1, lambda limit: ran.append(limit) or ("ok", ""), least=30)]
    (result,) = gpu.execute(parts, 20.0)
    assert (result.status, result.output, ran) == ("left out", "20 s are too few, it needs 30", [])
    (result,) = gpu.execute(parts, 40.0)
    assert (result.status, len(ran)) == ("ok", 1)


def test_a_signal_ends_what_was_started(tmp_path):
    mark = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = f"""
import sys
from benchmarks.gpu import benchmark as gpu
with gpu.ended_by_signals():
    gpu.command([sys.executable, "-c", {child!r}], 60.0)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=gpu.ROOT)
    while not (mark.exists() and mark.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_the_partial_row_of_a_killed_process_is_dropped(tmp_path):
    csv = tmp_path / "kernels.csv"
    common.append(csv, [row("cuda", 1.0)], kernels.COLUMNS)
    with csv.open("a") as file:
        file.write("group_norm_silu,cuda")
    gpu.drop_partial_row(csv)
    common.append(csv, [row("triton", 1.0)], kernels.COLUMNS)
    assert [each["kernel_provider"] for each in gpu.whole(csv)] == ["cuda", "triton"]
    gpu.drop_partial_row(tmp_path / "none.csv")


def test_a_build_without_the_library_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "command", lambda argv, limit, **variables: ("ok", "no nvcc"))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.build("cpu", 1.0) == ("failed", "no nvcc\n0 libraries, 0 of them compiled before")
    (tmp_path / "coalescer_fast" / "lib").mkdir(parents=True)
    (tmp_path / "coalescer_fast" / "lib" / "libcoalescer_fast_cuda.so").touch()
    assert gpu.build("cpu", 1.0)[0] == "ok"


def test_sanitizer(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "tool_path", lambda name: None)
    assert gpu.sanitize("memcheck", [], 1.0)[0] == "not installed"
    tool = tmp_path / "tool"
    tool.write_text('#!/bin/sh\necho "$@"; echo "caching: $PYTORCH_NO_CUDA_MEMORY_CACHING"; exit 97\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu, "tool_path", lambda name: str(tool))
    status, output = gpu.sanitize("racecheck", ["--all"], 20.0)
    assert status == "failed"
    assert output.startswith("--tool racecheck --error-exitcode 97")
    assert "benchmarks.gpu.calls --backends cuda --all\ncaching: 1" in output


def test_tests_that_cannot_run_here(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "numpy" else object())
    assert gpu.tests(tmp_path / "pytest.xml", 1.0) == ("not installed", "the tests need numpy")


def test_counts_of_the_tests(tmp_path):
    path = tmp_path / "pytest.xml"
    assert "no results" in gpu.counts(path)
    path.write_text('<testsuites><testsuite errors="1" failures="2" skipped="3" tests="9"/></testsuites>')
    assert gpu.counts(path) == "\n9 tests, 2 failures, 1 errors, 3 skipped"


@pytest.mark.parametrize(
    ("provider", "output", "status"),
    [
        ("compile", "done", "cut"),
        ("eager", "Traceback (most recent call last)", "failed"),
        ("triton", "done", "failed"),
        ("", "", "failed"),
    ],
)
def test_a_peer_may_fail_and_a_backend_may_not(provider, output, status, tmp_path, monkeypatch):
    csv = tmp_path / "kernels.csv"
    common.append(csv, [row("triton", 1.0, status="FAIL: of an earlier part")], kernels.COLUMNS)

    def command(argv, limit, **variables):
        common.append(csv, [row(provider, 1.0, status="FAIL: error")] if provider else [], kernels.COLUMNS)
        return "failed", f"{output}\n3 of 9 calls are left out, the first of them this one"

    monkeypatch.setattr(gpu, "command", command)
    monkeypatch.setattr(gpu.ops, "backends", lambda op: {"triton": (True, "")})
    found, said = gpu.measure(csv, "cuda", [], 1.0, 30.0)
    assert found == status
    assert said.splitlines()[-1].endswith("3 of 9 calls are left out, the first of them this one")
    monkeypatch.setattr(gpu.ops, "backends", lambda op: {"triton": (False, "there is no CUDA device")})
    assert gpu.measure(csv, "cuda", [], 1.0, 30.0) == ("failed", "triton cannot run: there is no CUDA device")


@pytest.mark.parametrize(
    ("ended", "own", "status"),
    [
        ("ok", "ok", "cut"),
        ("failed", "ok", "cut"),
        ("failed", "FAIL: error", "failed"),
        ("timed out", "ok", "cut"),
        ("timed out", "", "timed out"),
    ],
)
def test_the_sampler_is_judged_by_our_own_times(ended, own, status, tmp_path, monkeypatch):
    csv = tmp_path / "sampler.csv"
    rows = [sampled("compile", 2.0, status="FAIL: error"), *([sampled("ours", 1.0, status=own)] if own else [])]

    def command(argv, limit, **variables):
        common.append(csv, rows, sampler.COLUMNS)
        return ended, "LEFT OUT m batch 64"

    monkeypatch.setattr(gpu, "command", command)
    found, said = gpu.sample(csv, "cuda", ["--model", "m"], 30.0)
    assert found == status
    assert said.splitlines()[-1].startswith(f"{len(rows)} times, ")
    assert "; LEFT OUT m batch 64" in said.splitlines()[-1]
    assert ("LEFT OUT what was not done in time" in said) == (ended == "timed out" and status == "cut")
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert gpu.sample(csv, "cuda", ["--model", "m"], 30.0) == ("not installed", "the sampler needs diffusers")


def test_networks_whose_time_was_over(tmp_path, monkeypatch):
    rows = [
        {"provider": "coalescer_fast", "status": "ok", "y_value_50": 1.0},
        {"provider": "compile", "status": "skipped: the time is over"},
    ]

    def command(argv, limit, **variables):
        common.append(tmp_path / "networks.csv", rows, ("provider", "status", "y_value_50"))
        return "ok", "done"

    monkeypatch.setattr(gpu, "command", command)
    status, said = gpu.networks(tmp_path / "networks.csv", "cuda", [], 30.0)
    assert status == "cut"
    assert said == "done\n2 times, 0 wrong results; compile skipped: the time is over"
    monkeypatch.setattr(gpu, "command", lambda argv, limit, **variables: ("failed", "no such option\n"))
    status, said = gpu.networks(tmp_path / "networks.csv", "cuda", [], 30.0)
    assert (status, said.splitlines()[-1]) == ("failed", "no such option; 0 times, 0 wrong results")


def sampled(provider: str, ms: float, batch: int = 1, part: str = "sampler", status: str = "ok") -> common.Row:
    """A row as benchmarks.sampler writes it."""
    found: common.Row = dict.fromkeys(sampler.COLUMNS, "")
    found |= {
        "model": "m",
        "part": part,
        "batch": batch,
        "provider": provider,
        "dtype": "bf16",
        "gpu": "a GPU",
        "threads": 1,
        "quiet": 1,
    }
    return found | {
        "timestamp": "1",
        "status": status,
        **({f"y_value_{p}": ms for p in (50, 20, 80)} if status == "ok" else {}),
    }


def test_goals_of_the_sampler(tmp_path):
    rows = [sampled("ours", 1.0), sampled("compile", 1.4), sampled("eager", 5.0), sampled("eager_channels_last", 3.0)]
    rows += [sampled("ours", 1.0, part="pipeline"), sampled("compile", 1.2, part="pipeline")]
    rows += [sampled("ours", 10.0, 16), sampled("eager", 9.0, 16), sampled("compile", 0.0, 16, status="FAIL: wrong")]
    csv = tmp_path / "sampler.csv"
    common.append(csv, rows, sampler.COLUMNS)
    first, large, every = gpu_report.goals(common.read(csv))
    assert first["target"] == "sampler: at least 1.3 x as fast as compile at batch 1"
    assert (first["status"], first["figures"]) == ("missed", "1 of 2 cases; from 1.2 to 1.4, median 1.3")
    assert (large["status"], large["figures"]) == ("not measured", "")
    assert (every["status"], every["figures"]) == ("missed", "2 of 3 cases; from 0.9 to 1.4, median 1.2")
    common.append(csv, [sampled("ours", 1.0, 64), sampled("compile", 1.15, 64)], sampler.COLUMNS)
    assert gpu_report.goals(common.read(csv))[1]["status"] == "met"
    _, report, summary = run([gpu.Part("sampler", 1, lambda limit: ("ok", ""))], tmp_path)
    assert [goal["status"] for goal in report["goals"]] == ["missed", "met", "missed"]
    assert "| sampler: at least 1.15 x as fast as compile at batch 64 | met | 1 of 1 cases" in summary
    assert "SLOWER, 1.11x the time: m sampler batch 16" in summary


def row(
    provider: str, us: float, call: shapes.Call = LARGE, batch: int = 64, cache: str = "warm", status: str = "ok"
) -> common.Row:
    """A row as benchmarks.kernels writes it, in bf16."""
    moved, size = (each * batch * 2 for each in (call.moved, call.elements))
    known = {"percent_of_copy": 100 * moved / us / COPY, "gb_per_s": moved / us / 1e3} if provider != "empty" else {}
    found: common.Row = dict.fromkeys(kernels.COLUMNS, "")
    found |= {
        "kernel_name": call.op,
        "kernel_provider": provider,
        "metric_name": "time",
        "x_value": size,
        "status": status,
        "quiet": 1,
    }
    found |= {
        "extra_benchmark_config_str": json.dumps({"call": str(call)}),
        "backend": provider if provider in ("cuda", "triton") else "",
    }
    found |= {
        "cache": cache,
        "dtype": "bf16",
        "batch": batch,
        "shapes": "l",
        "llc_bytes": 50e6,
        "gpu_name": "a GPU",
        "timestamp": "1",
    }
    return found | {f"y_value_{percent}": us for percent in (50, 20, 80)} | known


COPY = 2.5e6  # bytes a microsecond


def test_targets_and_summary_of_a_csv_file(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_report.BACKENDS, "cuda", Backend("cuda", "cuda"))
    bytes_large, bytes_small = LARGE.moved * 64 * 2, SMALL.moved * 2
    copy, floor = bytes_large / COPY, 2.0 + bytes_small / 3e6
    large = {"copy": copy, "eager": 4 * copy, "compile": 1.3 * copy, "triton": copy / 0.8, "cuda": copy / 0.9}
    below = {"copy": copy / 4, "eager": copy, "cuda": copy / 4 / 0.1}  # 42 MB, of which no share of the copy is asked
    small = {"copy": 2.0, "empty": 2.0, "eager": 2.7, "triton": 1.6 * floor, "cuda": 1.4 * floor}
    rows = [row(name, us) for name, us in large.items()] + [row(name, us, batch=16) for name, us in below.items()]
    rows += [row(name, us, SMALL, 1) for name, us in small.items()]
    common.append(tmp_path / "kernels.csv", rows, kernels.COLUMNS)
    with (tmp_path / "kernels.csv").open("a") as file:
        file.write("group_norm_silu,cuda")  # where a part was killed
    status, report, summary = run([gpu.Part("kernels", 1, lambda limit: ("ok", ""))], tmp_path)
    assert status == 0
    asked = {(each["target"].split()[2].strip(","), "copy" in each["target"]): each for each in report["targets"]}
    assert {key: each["status"] for key, each in asked.items()} == {
        ("cuda", True): "met",
        ("cuda", False): "met",
        ("triton", True): "missed",
        ("triton", False): "missed",
    }
    assert asked["triton", True]["figures"] == "0 of 1 calls; from 80 to 80, median 80"
    assert asked["cuda", False]["figures"] == "1 of 1 calls; from 1.4 to 1.4, median 1.4"
    assert len(report["slower"]) == 2
    assert report["slower"][0].startswith("2.50x the time: group_norm_silu bf16 warm, l 320x64x64 g32 batch 16: ")
    assert "256x8x8 g32 batch 1: " in report["slower"][1]
    assert ", eager 2.7 us" in report["slower"][1]
    assert "cuda is slower than eager, inductor or triton in 2 of the 3 calls measured on it." in summary
    assert "| group_norm_silu | bf16 | warm | triton | 2 |" in summary
    assert "| group_norm_silu | bf16 | warm | cuda | 3 |" in summary
    assert (
        "| group_norm_silu on triton, bf16 warm: at least 85 % of the copy's rate from 64 MB up | missed |" in summary
    )


emulated = pytest.mark.skipif(not cuda_library.INTERPRETED, reason="needs the emulation of CUDA")
NATIVE = ["reference", *(["cpu"] if ops.backends("bias_residual")["cpu"][0] else [])]


@pytest.mark.parametrize("backend", NATIVE)
def test_calls_are_right_and_repeat(backend, capsys):
    assert gpu_calls.main(["--backends", backend, "--all"]) == 0
    assert capsys.readouterr().out.startswith(f"{backend}: {3 * len(gpu_calls.CALLS)} calls, 0 wrong")


def test_calls_reach_every_op_dtype_and_layout(monkeypatch):
    found = []
    monkeypatch.setattr(
        gpu_calls,
        "fault",
        lambda backend, cell, inputs, layout: found.append((cell.call.op, cell.dtype, layout)) or ("", 0.0),
    )
    assert not any(trial.wrong for trial in gpu_calls.check("reference", False))
    assert len(found) == len(gpu_calls.CALLS)
    assert {(op, dtype) for op, dtype, _ in found} == {
        (op, dtype) for op in kernels.peers.EAGER for dtype in kernels.DTYPES
    }
    assert {layout for op, _, layout in found if op == "group_norm_silu"} == set(gpu_calls.LAYOUTS)


@pytest.mark.parametrize("broken", ["wrong", "unsteady", "raises"])
def test_calls_that_are_wrong(broken, monkeypatch, capsys):
    count = iter(range(1000))

    def several(result):
        if broken == "raises":
            raise RuntimeError("no such kernel")
        factor = 1.1 + (next(count) if broken == "unsteady" else 0)
        return tuple(x * factor for x in refcheck.several(result))

    monkeypatch.setattr(gpu_calls, "several", several)
    assert gpu_calls.main(["--backends", "reference"]) == 1
    out = capsys.readouterr().out
    words = {"wrong": " is above ", "unsteady": ": other bits when asked again", "raises": ": no such kernel"}[broken]
    assert "\nFAIL reference bias_residual 7x3x3 batch 3 fp32 channels_last: " in out
    assert sum(words in line for line in out.splitlines()) == len(gpu_calls.CALLS)
    assert f"reference: {len(gpu_calls.CALLS)} calls, {len(gpu_calls.CALLS)} wrong" in out


def test_failures_are_kept_and_replayed(monkeypatch, tmp_path, capsys):
    """One element is wrong: its place is named, and the replay finds nothing wrong, for the kernel is right."""
    path = tmp_path / "failures.pt"

    def several(result):
        (first, *rest) = refcheck.several(result)
        if first.shape == (5, 3, 7, 7):
            first = first.clone()
            first[3, 2, 1, 0] = 7.0
        if first.shape == (1, 640, 32, 32):
            first = first + 1
        return (first, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_calls, "several", several)
        assert gpu_calls.main(["--backends", "reference", "--failures", str(path)]) == 1
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if "FAIL reference coalesce_step 3x7x7 raw batch 5" in line)
    assert ", first at (3, 2, 1, 0): 7, expected " in line
    assert path.stat().st_size < 2 * gpu_calls.KEPT_BYTES
    large, small = torch.load(path, weights_only=True)
    assert large["inputs"] is None  # drawn again
    assert small["call"] in line
    assert small["inputs"]["sample"].shape == (5, 3, 7, 7)
    if not cuda_library.INTERPRETED:
        return
    assert gpu_replay.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "on the GPU: error " in out
    assert out.count("  right here") == 2
    small["inputs"]["distance"] = torch.full((5,), torch.nan)
    torch.save([small], path)
    assert gpu_replay.main([str(path)]) == 1
    assert "  here: " in capsys.readouterr().out
    assert gpu_replay.main([str(tmp_path / "none.pt")]) == 1


def test_only_the_first_failures_are_kept(tmp_path):
    trials = [gpu_calls.Trial("cuda", 12, "fp32", "contiguous", "wrong")] * 20
    gpu_calls.keep(trials, tmp_path / "failures.pt")
    assert len(torch.load(tmp_path / "failures.pt", weights_only=True)) == gpu_calls.KEPT


@emulated
def test_calls_on_the_stand_in_for_a_gpu(capsys):
    assert gpu_calls.main(["--emulated", "--backends", "cuda"]) == 0
    assert capsys.readouterr().out.startswith(f"cuda: {len(gpu_calls.CALLS)} calls, 0 wrong, worst error 0.")


@pytest.mark.parametrize("wrong", [False, True])
def test_the_picture(wrong, tmp_path, monkeypatch, capsys):
    path = tmp_path / "picture.png"
    if wrong:
        drawn = iter([torch.zeros(6, 3, 8, 8), torch.full((6, 3, 8, 8), 0.5), torch.ones(6, 3, 8, 8)])
        monkeypatch.setattr(gpu_picture, "draw", lambda pipe: next(drawn))
    argv = ["--device", "cpu", "--dtype", "float32", "--out", str(path)]
    assert gpu_picture.main(argv) == wrong
    out = capsys.readouterr().out
    last = out.splitlines()[-1]
    if wrong:
        assert (
            "FAIL the second call differs by up to 0.5\nFAIL the median PSNR is 6.0 dB; expected at least 60\n" in out
        )
        assert last.startswith("6 pictures, 3 faults, PSNR 6.0 dB")
    else:
        assert last.startswith("6 pictures, 0 faults, PSNR ")
        assert Image.open(path).size == (6 * 64, 2 * 64)


def test_the_screen(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_report.BACKENDS, "cuda", Backend("cuda", "cuda"))
    rows = [row("copy", 100.0), row("eager", 400.0), row("chunked", 250.0), row("cuda", 200.0)]
    rows += [row("copy", 1.0, SMALL, 1), row("eager", 3.0, SMALL, 1), row("cuda", 2.0, SMALL, 1)]
    common.append(tmp_path / "kernels.csv", rows, kernels.COLUMNS)
    drawn = [sampled("ours", 2.0), sampled("compile_graphs", 3.0), sampled("compile", 4.0, 16)]
    common.append(tmp_path / "sampler.csv", drawn, sampler.COLUMNS)
    net = dict.fromkeys(networks.COLUMNS, "") | {"model": "sd-turbo", "batch": 1, "dtype": "bf16", "metric_unit": "ms"}
    nets = [
        {**net, "provider": "coalescer_fast", "y_value_50": 12.5, "status": "ok"},
        {**net, "provider": "compile", "status": "FAIL: no such thing"},
    ]
    common.append(tmp_path / "networks.csv", nets, networks.COLUMNS)
    results = [
        gpu_report.Result("calls", "ok", 1, 2, "said\ncuda: 45 calls, 0 wrong\n", "a"),
        gpu_report.Result("kernels", "ok", 1, 2, "not shown", "c"),
        gpu_report.Result("networks", "failed", 1, 2, "no such option", "e"),
    ]
    read = (gpu.whole(tmp_path / f"{name}.csv") for name in ("kernels", "sampler", "networks"))
    lines = list(gpu_report.screen(FACTS, results, *read))
    assert lines[1:] == [
        "a calls              ok            cuda: 45 calls, 0 wrong",
        "e networks           failed        no such option",
        "c group_norm_silu bf16 cuda: 1.75 x eager (least 1.50, 2 times); 1.25 x chunked (least 1.25, 1 times); "
        f"from 64 MB up {100 * LARGE.moved * 128 / 200 / COPY:.0f} - {100 * LARGE.moved * 128 / 200 / COPY:.0f} % of "
        f"copy, up to {LARGE.moved * 128 / 200 / 1e3:.0f} GB/s",
        "d m sampler: b1 2.00 ms 1.50 x compile_graphs, b16 ours not measured",
        "e sd-turbo scale  size  batch 1: coalescer_fast bf16 12.50 ms, compile bf16 FAIL: no such thing",
    ]


def test_calls_on_a_backend_that_cannot_run(capsys, monkeypatch):
    monkeypatch.setattr(ops, "backends", lambda op: {"triton": (False, "there is no CUDA device")})
    assert gpu_calls.main(["--backends", "triton"]) == 1
    assert "FAIL triton cannot run: there is no CUDA device" in capsys.readouterr().out


def test_needs_torch_alone(tmp_path):
    code = """
import sys
missing = "diffusers transformers accelerate safetensors tokenizers huggingface_hub matplotlib numpy scipy PIL tqdm"
for name in missing.split():
    sys.modules[name] = None
import coalescer_fast, coalescer_fast.cli, benchmarks.kernels.shapes, benchmarks.gpu.benchmark, benchmarks.gpu.calls
from benchmarks.kernels import benchmark as kernels
argv = "--quick --op bias_residual --calls 96x8x8 --backends reference --peers eager --budget 0.001 --csv kernels.csv"
raise SystemExit(kernels.main(argv.split()))
"""
    folders = [str(Path(module.__file__).parents[1]) for module in (benchmarks, sys.modules["coalescer_fast"])]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {folders}; {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(common.read(tmp_path / "kernels.csv")) == 3
