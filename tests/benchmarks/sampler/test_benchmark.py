from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import coalescer_fast
from benchmarks.harness import results as common
from benchmarks.sampler import benchmark as sampler
from benchmarks.sampler import providers as sampler_peers
from benchmarks.sampler import report as sampler_report
from coalescer_fast import acceleration
from coalescer_fast.bench import peers, timing
from coalescer_fast.models import CoalescerAutoencoder, CoalescerUNet
from coalescer_fast.models.unet import ResidualBlock
from coalescer_fast.pipeline import CoalescerPipeline
from coalescer_fast.runtime.eager import EagerRuntime
from coalescer_fast.runtime.engines import compiled
from coalescer_fast.runtime.native.module import no_programs
from coalescer_fast.scheduler import CoalescerScheduler

UNET = dict(
    sample_size=4,
    latent_channels=12,
    block_out_channels=(16, 32),
    norm_num_groups=4,
    attention_levels=(1,),
    mid_attention=False,
    num_attention_heads=2,
    description_dim=128,
    embedding_dim=16,
    anchor="mlp",
    anchor_hidden_dim=16,
)
LOAD = sampler_peers.load
BFLOAT16 = "skipped: dtype is torch.bfloat16; use one of auto, float32 with backend 'onnxruntime' on cpu"
BRIEF = [
    "--batch",
    "1,3",
    "--budget",
    "0.001",
    "--allocator",
    "system",
    "--threads",
    "1",
]  # one: others may have the CPUs


@pytest.fixture(autouse=True, scope="module")
def small():
    encoder = CoalescerPipeline.from_pretrained("emoji-64").description_encoder

    def load(model, device):
        torch.manual_seed(0)
        unet, vae = CoalescerUNet(**UNET).eval(), CoalescerAutoencoder(2, 12, 8, (1, 1), (1, 1)).eval()
        for parameter in unet.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        pipe = CoalescerPipeline(
            unet, CoalescerScheduler(guidance_scale=1.5 if model == "emoji-64" else 1.0), encoder, vae
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_peers, "load", load)
        patch.setattr(timing, "ROUNDS", (2, 3))
        patch.setattr(timing, "REST", 0)
        yield


def accelerate(pipe, backend="auto", dtype="auto", wrong=0.0):
    """What the accelerated pipeline looks like from outside; with dtype "auto" it says that it took bfloat16."""

    class Stub(EagerRuntime):
        def evaluate(self, sample, conditioning):
            direction, distance = super().evaluate(sample, conditioning)
            return direction * (1 + wrong), distance

    Stub.dtype = torch.bfloat16 if dtype == "auto" else dtype
    pipe.runtime = Stub(pipe)
    return pipe


@pytest.fixture
def accelerated(monkeypatch):
    monkeypatch.setattr(coalescer_fast, "accelerate", accelerate)


def run(folder, *argv: str) -> tuple[int, list[dict[str, str]]]:
    path = folder / "results" / "sampler.csv"
    status = sampler.main([*BRIEF, *argv, "--csv", str(path)])
    return status, common.read(path)


@pytest.fixture(scope="module")
def measured(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coalescer_fast, "accelerate", accelerate)
        status, _ = run(folder, "--model", "emoji-64,m", "--peers", "eager,eager_channels_last")
    assert status == 0
    return folder / "results" / "sampler.csv"


def test_a_row_for_every_provider_part_and_batch(measured):
    rows = common.read(measured)
    assert list(rows[0]) == list(sampler.COLUMNS)
    parts = {(row["model"], row["part"], row["guidance_scale"], row["evaluations"]) for row in rows}
    assert parts == {
        ("emoji-64", "unet", "", "1"),
        ("emoji-64", "sampler", "1", "2"),
        ("emoji-64", "sampler", "1.5", "3"),
        ("emoji-64", "decoder", "", "0"),
        ("emoji-64", "pipeline", "1.5", "3"),
        ("m", "unet", "", "1"),
        ("m", "sampler", "1", "2"),
    }
    columns = [
        ("eager", "fp32"),
        ("eager_channels_last", "fp32"),
        ("eager_channels_last", "bf16"),
        ("ours", "bf16"),
        ("ours", "fp32"),
    ]
    columns += [("ours_int8", "int8"), ("convolutions", "fp32"), ("convolutions", "bf16")]
    assert len(rows) == len(parts) * 2 * len(columns)
    assert {(row["provider"], row["dtype"]) for row in rows} == set(columns)
    for row in rows:
        low, median, high = (float(row[f"y_value_{percent}"]) for percent in (20, 50, 80))
        assert 0 < low <= median <= high
        assert row["status"] == "ok"
        assert float(row["images_per_s"]) == pytest.approx(1e3 * int(row["batch"]) / median, rel=1e-4)
        assert row["weights"] == ("embedded" if row["model"] == "emoji-64" else "random weights, timing only")
        if row["provider"] == "convolutions":
            assert float(row["percent_of_floor"]) == 100
            continue
        error = float(row["direction_error"] if row["part"] == "unet" else row["result_error"])
        assert error < (5e-2 if row["provider"] == "eager_channels_last" and row["dtype"] == "bf16" else 1e-5)
        assert float(row["cosine"]) == pytest.approx(1, abs=1e-3)
        assert (row["distance_error"] != "") == (row["part"] == "unet")
        if row["provider"] == "eager":
            assert float(row["speedup_over_eager"]) == 1
            assert error == 0
    gflop = {
        (row["part"], row["guidance_scale"], row["batch"]): float(row["gflop"])
        for row in rows
        if row["model"] == "emoji-64"
    }
    one, decoder = gflop["unet", "", "1"], gflop["decoder", "", "1"]
    assert [gflop["unet", "", "3"], gflop["sampler", "1", "1"], gflop["sampler", "1.5", "1"]] == pytest.approx(
        [3 * one, 2 * one, 3 * one], rel=1e-3
    )
    assert 3 * one + decoder < gflop["pipeline", "1.5", "1"] < 3 * one + 1.2 * decoder  # and the conditioning


def test_evaluations_are_those_that_the_pipeline_makes(monkeypatch):
    pipe = sampler_peers.load("emoji-64", torch.device("cpu"))
    sample, texts = torch.randn(2, 12, 4, 4), ["cat", "dog"]
    count = 0

    def evaluate(sample, conditioning):
        nonlocal count
        count += 1
        return pipe.unet(sample, conditioning, return_dict=False)

    pipe.runtime.evaluate = evaluate
    engine = sampler_peers.Engine(pipe, "fp32")
    with torch.inference_mode():
        for part in sampler.parts_of(pipe, "m", sample, texts):
            count = 0
            (latents, *_) = part.prepare(engine)()
            assert count == part.evaluations
            if part.name == "sampler":
                plain = sampler_peers.twin(pipe)
                plain.with_styles = lambda prompts, sample: prompts  # the texts are conditioned on as they are
                images = plain(texts, latents=sample, guidance_scale=part.guidance_scale, output_type="latent").images
                assert torch.allclose(latents, images, atol=1e-6)


def test_ours_as_it_is(tmp_path):
    status, rows = run(tmp_path, "--batch", "2", "--peers", "none")
    assert status == 0
    mine = [row for row in rows if row["provider"] == "ours"]
    assert {row["part"] for row in mine if row["dtype"] == "fp32"} == {"unet", "sampler", "decoder", "pipeline"}
    assert all(row["status"] == "ok" and row["y_value_50"] for row in mine)


def test_on_a_gpu_the_reference_is_timed_if_it_is_asked_for(accelerated):
    """Float32 in torch, which is slow, takes no time from the others; results are held against it all the same."""
    pipe = sampler_peers.load("m", torch.device("cpu"))
    sample, texts = torch.randn(2, 12, 4, 4), ["cat", "dog"]
    found = [
        sampler.Provider("eager", "fp32", sampler_peers.Engine(sampler_peers.twin(pipe), "fp32")),
        sampler.Provider("ours", "bf16", sampler_peers.ours("auto", pipe)),
    ]
    with torch.inference_mode():
        part = next(sampler.parts_of(pipe, "m", sample, texts))
        rows = list(sampler.measure(part, found, 2, timing.CpuTimer(), 0.001, time_reference=False))
    assert [(row["provider"], row["dtype"]) for row in rows] == [("ours", "bf16"), ("convolutions", "bf16")]
    assert all("speedup_over_eager" not in row and row["gflop_per_s"] > 0 for row in rows)
    assert rows[0]["direction_error"] < 1e-5


def test_one_dtype(tmp_path, accelerated):
    _, rows = run(tmp_path, "--batch", "2", "--dtypes", "bf16", "--peers", "eager_channels_last", "--parts", "unet")
    assert {(row["provider"], row["dtype"]) for row in rows} == {
        ("eager", "fp32"),
        ("ours", "bf16"),
        ("ours_int8", "int8"),
        ("eager_channels_last", "bf16"),
        ("convolutions", "fp32"),
        ("convolutions", "bf16"),
    }


def test_compiled_graphs(tmp_path, accelerated, monkeypatch):
    """They need a GPU; on one torch is asked for another mode than by the backend."""
    pipe = sampler_peers.load("m", torch.device("cpu"))
    with pytest.raises(peers.Missing, match="CUDA graphs need a CUDA device"):
        sampler_peers.PEERS["compile_graphs"].prepare(pipe, torch.float32)
    _, rows = run(tmp_path, "--batch", "2", "--peers", "compile_graphs", "--parts", "unet")
    assert not any(row["provider"] == "compile_graphs" for row in rows)
    modes = []
    monkeypatch.setattr(torch, "compile", lambda module, mode, **options: modes.append(mode) or module)

    class OnGpu(torch.Tensor):
        is_cuda = True

    module = nn.Sequential(nn.Conv2d(3, 3, 1))
    for given in ({}, {"mode": "reduce-overhead"}):
        with torch.no_grad():
            compiled.prepare(module, (torch.ones(1, 3, 2, 2).as_subclass(OnGpu),), torch.float32, tmp_path, **given)
    assert modes == ["max-autotune", "reduce-overhead"]


def test_what_convolutions_keep_of_images_is_no_memory():
    layer = nn.Conv2d(3, 5, 3, padding=1)
    with torch.no_grad(), sampler_peers.Convolutions() as made:
        layer(torch.ones(2, 3, 8, 8))
    ((x, weight, *_),) = made.found
    assert (x.device.type, x.shape, weight is layer.weight) == ("meta", (2, 3, 8, 8), True)


def test_a_runtime_that_draws_at_once_is_measured_so(tmp_path, monkeypatch):
    calls = []

    def at_once(pipe, **kwargs):
        def generate(scheduler, sample, conditioning, empty, guidance_scale, decode, on_step=None, call=None):
            calls.append((len(sample), guidance_scale, decode))
            return EagerRuntime(pipe).generate(scheduler, sample, conditioning, empty, guidance_scale, decode)

        accelerate(pipe, **kwargs).runtime.generate = generate
        return pipe

    monkeypatch.setattr(coalescer_fast, "accelerate", at_once)
    status, rows = run(tmp_path, "--batch", "2", "--peers", "none", "--parts", "sampler,pipeline")
    assert status == 0
    assert {row["part"] for row in rows if row["provider"] == "ours" and row["y_value_50"]} == {"sampler", "pipeline"}
    assert set(calls) == {(2, 1.0, False), (2, 1.5, False), (2, 1.5, True)}


def test_batches_for_which_there_is_no_time(tmp_path, accelerated, capsys):
    status, rows = run(tmp_path, "--seconds", "1e-9", "--peers", "none", "--parts", "unet")
    assert status == 0
    assert {row["batch"] for row in rows} == {"1"}  # of the first it is not known how long it takes
    assert "LEFT OUT emoji-64 batch 3\n" in capsys.readouterr().out


def test_a_wrong_result_has_no_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coalescer_fast, "accelerate", lambda pipe, **kwargs: accelerate(pipe, **kwargs, wrong=0.2))
    status, rows = run(tmp_path, "--parts", "unet", "--peers", "none")
    assert status == 1
    for row in (row for row in rows if row["provider"] == "ours"):
        assert row["status"] == "FAIL: direction error 0.2"
        assert row["y_value_50"] == row["images_per_s"] == ""
    assert "FAIL: direction error 0.2 (emoji-64 unet 1, emoji-64 unet 3)" in capsys.readouterr().out


def test_a_missing_package_is_said_and_no_error(tmp_path, accelerated, monkeypatch):
    monkeypatch.setattr(acceleration.importlib.util, "find_spec", lambda package: None)
    status, rows = run(tmp_path, "--parts", "unet", "--batch", "1", "--peers", "onnxruntime,openvino")
    assert status == 0
    missing = {row["provider"]: row["status"] for row in rows if row["provider"] in ("onnxruntime", "openvino")}
    reason = "skipped: backend {0!r} needs the package {0}, which is not installed: run pip install {0} onnx onnxscript"
    assert missing["openvino"] == reason.format("openvino")
    assert missing["onnxruntime"] in (reason.format("onnxruntime"), BFLOAT16)


def test_int8_needs_a_package_of_its_own(tmp_path, accelerated, monkeypatch):
    monkeypatch.setattr(sampler_peers.importlib.util, "find_spec", lambda package: None if package == "nncf" else True)
    status, rows = run(tmp_path, "--parts", "unet", "--batch", "1", "--peers", "openvino_int8")
    assert status == 0
    [row] = [row for row in rows if row["provider"] == "openvino_int8"]
    assert row["status"] == "skipped: it needs the package nncf: pip install openvino onnx onnxscript nncf"


def test_int8(tmp_path, accelerated):
    for package in ("onnx", "onnxscript", "openvino", "nncf"):
        pytest.importorskip(package, reason=f"needs {package}")
    status, rows = run(tmp_path, "--batch", "2", "--peers", "openvino_int8", "--parts", "unet,decoder")
    assert status == 0
    unet, decoder = (row for row in rows if row["provider"] == "openvino_int8")
    assert 1e-3 < float(unet["direction_error"]) < 0.1  # of 8 bits
    assert float(decoder["result_error"]) < 0.02  # in bfloat16
    assert float(unet["compile_s"]) > 0.1


def test_the_ranges_of_8_bits_are_those_of_both_evaluations_of_calls():
    pipe = sampler_peers.load("emoji-64", torch.device("cpu"))
    sample = torch.randn(2, 12, 4, 4)
    found = sampler_peers.samples_of(pipe, sample, ["cat", "dog"])
    assert len(found) == 2 * sampler_peers.CALLS
    assert all(x.shape == sample.shape and not torch.equal(x, sample) for x in found)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_peers_that_read_onnx(name, tmp_path, accelerated):
    for package in ("onnx", "onnxscript", name):
        pytest.importorskip(package, reason=f"needs {package}")
    status, rows = run(tmp_path, "--batch", "2", "--peers", name, "--parts", "unet,sampler")
    assert status == 0
    times = {(row["dtype"], row["part"]) for row in rows if row["provider"] == name and row["y_value_50"]}
    assert {part for dtype, part in times if dtype == "fp32"} == {"unet", "sampler"}
    if name == "onnxruntime":
        assert {row["status"] for row in rows if row["provider"] == name and row["dtype"] == "bf16"} == {BFLOAT16}


@pytest.mark.slow
def test_compile(tmp_path, accelerated):
    from torch._dynamo.utils import counters

    status, rows = run(tmp_path, "--batch", "2", "--peers", "compile", "--parts", "unet,sampler,decoder")
    assert status == 0
    mine = [row for row in rows if row["provider"] == "compile"]
    assert len(mine) == 2 * 4
    assert (
        counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] > 0
    )  # weights are frozen, which needs ordinary tensors
    assert all(float(row["compile_s"]) > 0.1 and float(row["y_value_50"]) > 0 for row in mine)


def test_the_floor_makes_every_convolution_of_the_network_once():
    pipe = sampler_peers.load("m", torch.device("cpu"))
    sample = torch.randn(1, 12, 4, 4)

    def once():
        pipe.unet(sample, pipe.condition(["cat"], sample.device), return_dict=False)

    with torch.no_grad(), sampler_peers.Convolutions() as made:
        once()
    modules = [m for m in pipe.unet.modules() if isinstance(m, nn.Conv2d)]
    skips = sum(
        isinstance(part[0], ResidualBlock) for part in pipe.unet.up
    )  # their 1x1 convolution is one of x and one of the skip
    assert len(made.found) == len(modules) + skips
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            sampler_peers.convolutions(once, dtype)()


@pytest.fixture
def table(measured):
    rows = common.read(measured)
    for row in rows:
        row["quiet"] = "1"
        if row["provider"] in ("ours", "eager_channels_last"):
            slow = row["provider"] == "ours" and row["part"] == "decoder"
            row |= {
                f"y_value_{percent}": "3" if slow else "1" if row["provider"] == "ours" else "2"
                for percent in (20, 50, 80)
            }
    return rows


def test_summary_names_the_fastest_peer_and_the_losses(table):
    lines = list(sampler_report.summary(table))
    unet = next(line for line in lines if line.split()[:3] == ["emoji-64", "unet", "1"])
    assert "eager_channels_last" in unet or "eager fp32" in unet
    slower = [line for line in lines if "SLOWER" in line]
    assert any("decoder batch 1" in line for line in slower)
    assert sum("random weights" in line for line in lines) == 1
    older = [{**row, "timestamp": "2000", "y_value_50": "1e-3"} for row in table]
    assert list(sampler_report.summary([*older, *table])) == lines
    assert not any("disturbed" in line for line in slower)
    table[:] = [{**row, "quiet": "0"} for row in table]
    assert all(line.endswith(", disturbed") for line in sampler_report.summary(table) if "SLOWER" in line)
    with pytest.raises(ValueError, match="the column cpu is missing"):
        list(sampler_report.summary([{"model": "m"}]))


def test_summary_and_plot_of_a_file(measured, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "sampler.png"
    capsys.readouterr()
    assert sampler.main(["--summary", str(measured)]) == 0
    assert "fastest peer" in capsys.readouterr().out
    assert sampler.main(["--plot", str(picture), "--from", str(measured)]) == 0
    assert min(Image.open(picture).size) > 300


def test_cold_processes_in_turn(tmp_path, accelerated, monkeypatch):
    seen = []

    def process(command, env, **kwargs):
        seen.append(command[-1])
        assert "TORCHINDUCTOR_CACHE_DIR" in env
        return SimpleNamespace(returncode=int("compile" in command[-1]), stderr="Trouble\nValueError: no compiler\n")

    monkeypatch.setattr(sampler.subprocess, "run", process)
    status, rows = run(tmp_path, "--cold")
    assert status == 1
    assert ["accelerate" in code for code in seen[:2]] == [False, True]
    assert len(seen) == 5 + 5 + 1  # a way that failed is not tried again
    states = {row["provider"]: row["status"] for row in rows}
    assert states == {"eager": "ok", "ours": "ok", "compile": "FAIL: ValueError: no compiler"}
    assert {row["samples"] for row in rows if row["status"] == "ok"} == {"5"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--plot", "x.png"], "--plot and --from go together"),
        (["--cold", "--model", "m"], "--cold draws a picture"),
        (["--summary", "absent.csv"], "cannot use absent.csv"),
    ],
)
def test_mistakes_in_one_sentence(argv, message, capsys):
    assert sampler.main(argv) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_named_network_is_not_trivial():
    pipe = LOAD("m", torch.device("cpu"))
    assert isinstance(pipe, CoalescerPipeline)
    config = pipe.unet.config
    with torch.inference_mode():
        sample = torch.randn(1, config.latent_channels, config.sample_size, config.sample_size)
        outputs = [
            pipe.unet(sample, pipe.condition([text], sample.device), return_dict=False)
            for text in ("octopus", "red apple")
        ]
    (direction, distance), (other, _) = outputs
    assert 1e-2 < float(direction.std()) < 10
    assert math.isfinite(float(distance))
    assert not torch.allclose(direction, other)


@pytest.mark.skipif(bool(no_programs(torch.float32)), reason=no_programs(torch.float32) or "programs run here")
def test_a_profile_of_the_unet(monkeypatch, capsys):
    monkeypatch.setattr(sampler, "products_peak", lambda task: 100.0)
    assert sampler.main(["--profile", "--batch", "2", "--dtypes", "fp32", "--threads", "1"]) == 0
    head, whole, *lines = capsys.readouterr().out.splitlines()
    assert head == "emoji-64 fp32, batch 2, 1 threads, one evaluation of the UNet"
    kinds = [line.split("  ")[1] for line in lines[1 : lines.index("by shape, the first 15")]]
    assert {"convolution 3x3", "group_norm_silu", "attention", "dual_head"} <= set(kinds)
    steps = sum(int(line.split(" float32 ")[1].split()[0]) for line in lines[1 : len(kinds) + 1])
    assert whole.startswith(f"{steps} steps, ")


def test_a_cap_starts_a_process_that_libraries_are_loaded_in(monkeypatch):
    started = []

    def execve(path, command, env):
        started.append((command, env))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(SystemExit):
        sampler.main(["--isa", "avx2", "--peers", "none"])
    ((command, env),) = started
    assert command[1:] == ["-m", "benchmarks.sampler", "--isa", "avx2", "--peers", "none"]
    assert env["ONEDNN_MAX_CPU_ISA"] == env["DNNL_MAX_CPU_ISA"] == "AVX2"
