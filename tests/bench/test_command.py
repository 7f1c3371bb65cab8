"""`coalescer-fast bench`: what it measures, what it says, and what a user can get wrong."""

from __future__ import annotations

import importlib.util
import json
import time

import pytest
import torch

from coalescer_fast import cli
from coalescer_fast.bench import command, engines, report
from coalescer_fast.bench.measure import Measured, measure
from coalescer_fast.bench.peers import Missing
from coalescer_fast.bench.timing import Measurement
from coalescer_fast.ops import native_library

from ..helpers.pipelines import tiny_pipeline

needs_kernels = pytest.mark.skipif(bool(native_library.unavailable()), reason="the CPU library is not built")
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a command line in an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("coalescer_fast.bench.measure.ROUNDS", (3, 10))

    def call(*argv: str) -> tuple[int, str, str]:
        try:
            status = cli.main(["bench", *argv])
        except SystemExit as exit:
            status = int(exit.code or 0)
        return (status, *capsys.readouterr())

    return call


def engine(name, seconds=0.0, result=1.0, error=None, prepare=0.0):
    """One whose calls take so long."""

    def call():
        time.sleep(seconds)
        return torch.full((2, 3), result)

    def ready(folder):
        time.sleep(prepare)
        if error is not None:
            raise error
        return [call, call]

    return engines.Engine(name, "float32", ready)


def subject(*others):
    return engines.Subject("x", {}, [engine("eager", 0.012), *others], engines.compare_outputs)


def test_engines_are_prepared_checked_and_timed_in_turn():
    rows = measure(
        subject(
            engine("coalescer_fast", 0.004),
            engine("onnxruntime", 0.004, result=1.1),
            engine("openvino", error=Missing("it needs the package openvino")),
            engine("compile", error=RuntimeError("no compiler")),
        ),
        1.0,
    )
    assert [row.status.partition(":")[0] for row in rows] == ["ok", "ok", "FAIL", "skipped", "FAIL"]
    assert "error 0.1 is above 0.0001" in rows[2].status
    assert [bool(row.samples) for row in rows] == [True, True, False, False, False]
    assert rows[1].figures == {"relative_error": 0.0}
    first, second = report.rows(rows)[:2]
    assert first["times_as_fast"] == 1
    assert 2 < second["times_as_fast"] < 4
    assert second["percent_of_reference"] == pytest.approx(100 / second["times_as_fast"], rel=1e-4)
    assert second["low_ms"] <= second["median_ms"] <= second["high_ms"]


def test_what_is_not_ready_in_time_is_left_out():
    start = time.monotonic()
    rows = measure(subject(engine("coalescer_fast", prepare=30), engine("openvino")), 1.0)
    assert time.monotonic() - start < 10
    assert rows[1].status == "left out: it was not ready after 1 s, give more --seconds"
    assert rows[2].status == "left out: the time was over, give more --seconds"


def test_an_error_of_the_reference_is_raised():
    with pytest.raises(ValueError, match="damaged"):
        measure(engines.Subject("x", {}, [engine("eager", error=ValueError("damaged"))], engines.compare_outputs), 1.0)


def timed(name, milliseconds, dtype="float32"):
    return Measured(name, dtype, samples=[Measurement(milliseconds / 1e3)] * 3)


def test_the_summary_names_the_fastest_and_says_where_others_are_faster():
    reference, ours = timed("eager", 80), timed("coalescer_fast", 20, "bfloat16")
    alone = "coalescer_fast bfloat16 is 4.00 times as fast as plain PyTorch in float32"
    assert report.summary([reference, ours, timed("coalescer_fast", 30)]) == f"{alone}."
    slower = f"{alone}, and 2.00 times as fast as the fastest other, onnxruntime float32."
    assert report.summary([reference, ours, timed("onnxruntime", 40), timed("openvino", 50)]) == slower
    faster = f"{alone}, and slower, 2.00 times the time of the fastest other, openvino float32."
    assert report.summary([reference, ours, timed("openvino", 10)]) == faster
    assert report.summary([reference]) == "coalescer_fast was not measured."


def test_the_exit_status_is_of_accelerates_results_alone():
    wrong = Measured("coalescer_fast", "int8", "FAIL: error 1 is above 0.1")
    assert report.status([timed("eager", 80), wrong]) == 1
    assert report.status([timed("eager", 80), Measured("compile", "float32", "FAIL: no compiler")]) == 0
    assert report.status([timed("eager", 80), Measured("coalescer_fast", "int8", "skipped: no int8")]) == 0


def test_pictures_are_compared_as_verify_does():
    exact = [torch.full((2, 3, 4, 4), 0.5)]
    assert engines.compare_pictures(exact, exact, "float32") == engines.Agreement(
        {"psnr_median_db": 200.0, "psnr_min_db": 200.0}, ""
    )
    found = engines.compare_pictures([exact[0] + 0.01], exact, "float32")  # 40 dB
    assert found.figures["psnr_min_db"] == pytest.approx(40, abs=0.01)
    assert "median PSNR" in found.wrong
    assert "below 60" in found.wrong
    assert not engines.compare_pictures([exact[0] + 0.01], exact, "bfloat16").wrong
    assert engines.compare_pictures([exact[0] * torch.nan], exact, "bfloat16").wrong


def test_the_names_of_the_command_are_those_of_the_engines():
    assert command.NAMES == engines.NAMES


@needs_kernels
def test_a_pipeline(run, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    options = ["-n", "2", "--backends", "coalescer_fast", "--seconds", "5", "--json", "b.json"]
    status, out, err = run("--model", str(tmp_path / "tiny"), *options)
    assert (status, err) == (0, "")
    assert out.startswith("tiny: from prompt to picture, 2 steps, ")
    assert "2 pictures a call" in out
    found = json.loads((tmp_path / "b.json").read_text("utf-8"))
    assert found["summary"] == out.splitlines()[-1]
    environment = found["environment"]
    assert environment["threads"] == torch.get_num_threads()
    assert environment["instruction_set"] == native_library.isa()
    assert environment["torch"] == str(torch.__version__)
    assert str(tmp_path) not in json.dumps(found)
    assert found["engines"][0] == {**found["engines"][0], "engine": "eager", "times_as_fast": 1.0}
    ours = [row for row in found["engines"] if row["engine"] == "coalescer_fast"]
    assert {row["dtype"] for row in ours} == {"float32", "bfloat16", "int8"}
    exact = next(row for row in ours if row["dtype"] == "float32")
    assert exact["status"] == "ok"
    assert exact["psnr_min_db"] > 60
    assert 3 <= exact["samples"] <= 10


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("unet")
    UNet2DConditionModel(**UNET).save_pretrained(folder / "pipeline" / "unet")
    return folder / "pipeline"


@needs_kernels
def test_a_unet(run, unet_folder, tmp_path):
    argv = ("--unet", str(unet_folder), "--backends", "eager,coalescer_fast", "--json", "b.json")
    status, out, err = run(*argv)
    assert (status, err) == (0, "")
    assert out.startswith("pipeline: one evaluation of a UNet2DConditionModel, ")
    assert "8x8, batch 1" in out
    found = json.loads((tmp_path / "b.json").read_text("utf-8"))
    exact = next(row for row in found["engines"] if (row["engine"], row["dtype"]) == ("coalescer_fast", "float32"))
    assert exact["status"] == "ok"
    assert exact["relative_error"] < 1e-4


def test_other_engines_run_a_unet(unet_folder, tmp_path):
    names = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]
    for package in ("onnx", "onnxscript", *names[:1]):
        pytest.importorskip(package)
    found = engines.of_unet(engines.load_unet(unet_folder), "u", 1, 8, names).engines
    reference, *others = [each for each in found if each.dtype == "float32"]
    assert [each.name for each in others] == names
    expected = [call() for call in reference.prepare(tmp_path)]
    assert len(expected) == engines.CHECKED
    assert not torch.equal(expected[0], expected[1])
    for each in others:  # which read one export
        results = [call() for call in each.prepare(tmp_path)]
        assert not engines.compare_outputs(results, expected, "float32").wrong


@pytest.mark.slow
def test_torch_compile_runs_a_unet(unet_folder, tmp_path):
    module = engines.load_unet(unet_folder)
    for each in engines.of_unet(module, "u", 1, 8, ["compile"]).engines:
        results = [call() for call in each.prepare(tmp_path)]
        if each.name == "eager":
            expected = results
        assert not engines.compare_outputs(results, expected, each.dtype).wrong


@needs_kernels
def test_copies_of_a_unet_share_its_memory(unet_folder):
    module = engines.load_unet(unet_folder)
    twin = engines.sharing(module)
    assert twin is not module
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        assert a is not b
        assert a.data_ptr() == b.data_ptr()


def test_an_engine_that_does_not_fit_into_memory_is_left_out(unet_folder, monkeypatch):
    monkeypatch.setattr(engines, "COPIES", 1e9)
    with pytest.raises(Missing, match="GB of memory"):
        engines.check_memory(engines.load_unet(unet_folder))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--backends", "tensorrt"], "'tensorrt' is unknown: use some of coalescer_fast, eager"),
        (["--seconds", "1"], "'1' is no number of seconds from 5 to 86400"),
        (["--seconds", "nan"], "'nan' is no number of seconds"),
        (["--model", "emoji-64", "--unet", "x"], "not allowed with argument --model"),
        (["--unet", "nowhere"], "nowhere holds no UNet"),
        (["--unet", "other"], "is a AutoencoderKL; expected UNet2DModel"),
        (["--unet", "damaged"], "damaged: save the UNet again"),
        (["--size", "8"], "--size is of a UNet's sample"),
        (["--json", "nowhere/b.json"], "nowhere/b.json cannot be written"),
        (["--model", "nowhere"], "there is no model 'nowhere'"),
        (["-n", "0"], "'0' is not a whole number"),
    ],
)
def test_what_a_user_gets_wrong(argv, words, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, text in (("other", '{"_class_name": "AutoencoderKL"}'), ("damaged", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    status, out, err = run(*argv)
    assert status != 0
    assert words in err
    assert err.startswith("coalescer-fast: ")
    assert err.count("\n") == 1
    assert out == ""


def test_a_unet_with_unknown_arguments_is_refused(unet_folder):
    module = engines.load_unet(unet_folder)
    module.register_to_config(class_embed_type="timestep")
    with pytest.raises(ValueError, match="class_embed_type is 'timestep'; expected a UNet without it"):
        engines.of_unet(module, "u", 1, 8, ["eager"])
