"""docs/training.md: its tables of digits, Fashion-MNIST and clip art, and what it counts of Stable Diffusion 1.5."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import results
from benchmarks.quality.fashion import OBJECTIVES, STEPS
from benchmarks.quality.teacher import COALESCERS
from coalescer_fast import CoalescerUNet
from coalescer_fast.models.unet import CONFIGURATIONS
from coalescer_fast.training.autoencoder import AutoencoderConfig
from coalescer_fast.training.coalescer import CoalescerConfig
from coalescer_fast.training.config import read

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text("utf-8")
SECTION = PAGE[PAGE.index("### What Stable Diffusion 1.5 would take") :]


def stated(pattern: str) -> float:
    [found] = re.findall(pattern, SECTION)
    return float(found.replace(",", ""))


def of_model(model: str) -> tuple[list[float], list[dict[str, str]]]:
    """Losses in the order of the training, and the rows of its samplers."""
    with (ROOT / "benchmarks" / "results" / "teacher.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model]
    return [float(row["loss"]) for row in rows if row["loss"]], [row for row in rows if row["evaluations"]]


def test_text_of_the_digits():
    text = " ".join(PAGE[PAGE.index("### Tried on digits") : PAGE.index(SECTION[:20])].split())
    _, (many, two) = of_model("teacher")
    distances = [float(row["frechet_distance"]) for row in (many, two)]
    recognised = [float(row["accuracy"]) for row in (many, two)]
    assert f"a distance of {distances[0]:.1f} in 20 steps ({recognised[0]:.2f} recognised)" in text
    assert f"and {distances[1]:.1f} in 2 steps ({recognised[1]:.2f})" in text
    losses, (first, second) = of_model("from the teacher, timestep 999")
    assert f"the loss ends at {losses[-1]:.2f}" in text
    one, two = (f"{float(row['frechet_distance']):.1f}" for row in (first, second))
    assert f"one step has a distance of {one}, though two steps have {two}" in text


@pytest.mark.parametrize("model", [name for name in COALESCERS if "999" not in name])
def test_table_of_the_digits(model):
    losses, (one, two) = of_model(model)
    assert [one["evaluations"], two["evaluations"]] == ["1", "2"]
    [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {model} |")]
    figures = [f"{float(row['frechet_distance']):.1f}" for row in (one, two)]
    stated = [f"{losses[0]:.2f} → {losses[-1]:.2f}", *figures, f"{float(two['accuracy']):.2f}"]
    assert [cell.strip().strip("*") for cell in line.strip("|").split("|")][1:] == stated


def test_the_named_configuration_is_that_of_stable_diffusion():
    """So its counts are those of the network that would be made of Stable Diffusion 1.5's UNet."""
    from coalescer_fast.models.takeover import _configuration

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
    assert (
        _configuration(unet).items()
        >= {
            name: value
            for name, value in CONFIGURATIONS["l"].items()
            if name not in ("description_dim", "embedding_dim")
        }.items()
    )


def test_memory():
    def kept(batch: int) -> float:
        """Bytes of the tensors that a forward keeps for the gradient; of their shapes alone, nothing is computed."""
        saved = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[id(storage)] = storage
            return tensor

        with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model = CoalescerUNet.named("l")
            sample, description, rows = (
                torch.randn(batch, 4, 64, 64),
                torch.randn(batch, 768),
                torch.randn(batch, 77, 768),
            )
            with torch.autocast("cpu", torch.bfloat16):
                model(sample, description, rows)
            own = {id(parameter.untyped_storage()) for parameter in model.parameters()}
        return sum(storage.nbytes() for key, storage in saved.items() if key not in own)

    with torch.device("meta"):
        parameters = sum(p.numel() for p in CoalescerUNet.named("l").parameters())
    one, two = kept(1), kept(2)
    assert stated(r"parameters \| (\d+) M") == pytest.approx(parameters / 1e6, abs=0.5)
    assert stated(r"20 bytes each \| ([\d.]+) GB") == pytest.approx(20 * parameters / 1e9, abs=0.05)
    assert stated(r"for autocast \| ([\d.]+) GB") == pytest.approx(2 * parameters / 1e9, abs=0.05)
    assert stated(r"autocast \| ([\d.]+) GB a picture") == pytest.approx((two - one) / 1e9, abs=0.05)
    assert stated(r"needs about (\d+) GB") == pytest.approx((22 * parameters + 16 * (two - one)) / 1e9, abs=1)
    assert stated(r"noise \| (\d+) kB") == pytest.approx(2 * 4 * 4 * 64 * 64 / 1e3, abs=0.5)


@torch.no_grad()
def test_operations():
    with torch.device("meta"):
        model = CoalescerUNet.named("l")
        conditioning = model.condition(torch.empty(1, 768), torch.empty(1, 77, 768))
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 4, 64, 64), conditioning)
    forward = counter.get_total_flops() / 1e12
    assert stated(r"picture: ([\d.]+) forward") == pytest.approx(forward, abs=0.005)
    assert stated(r"step \| ([\d.]+) TFLOP a picture") == pytest.approx(3 * forward, abs=0.05)
    assert stated(r"guidance \| (\d+) TFLOP") == pytest.approx(40 * forward, abs=0.5)
    peak = stated(r"\((\d+) TFLOP/s")
    assert stated(r"at least (\d+) minutes") == pytest.approx(1e4 * 64 * 3 * forward / peak / 60, abs=0.5)
    assert stated(r"of the teacher at least (\d+)") == pytest.approx(65536 * 40 * forward / peak / 60, abs=0.5)


FASHION = PAGE[PAGE.index("## Fashion-MNIST") : PAGE.index("## Clip art")]
CLIP_ART = PAGE[PAGE.index("## Clip art") : PAGE.index("## How the embedded model was made")]


def test_table_of_fashion_mnist():
    rows = results.read(ROOT / "benchmarks" / "results" / "fashion.csv")
    models = list(dict.fromkeys(row["model"] for row in rows))
    assert set(models) == {"held-out pictures", "autoencoder", *(name.replace("_", " ") for name in OBJECTIVES)}
    for model in models:
        mine = [row for row in rows if row["model"] == model]
        [line] = [line for line in FASHION.splitlines() if line.startswith(f"| {model} |")]
        figures = [f"{float(row['frechet_distance']):.1f} ({float(row['accuracy']):.2f})" for row in mine]
        assert [cell.strip().replace("*", "") for cell in line.strip("|").split("|") if cell.strip()][1:] == figures
    [seconds] = {float(row["cpu_seconds"]) for row in rows if row["model"] == "coalescer"}
    assert f"{seconds:.0f} CPU seconds" in " ".join(FASHION.split())
    assert seconds < 600


def test_text_of_fashion_mnist():
    rows = results.read(ROOT / "benchmarks" / "results" / "fashion.csv")
    [real] = (float(row["accuracy"]) for row in rows if row["model"] == "held-out pictures")
    drawn = [row for row in rows if row["evaluations"]]
    distance, share = (
        {(row["model"], int(row["evaluations"])): float(row[column]) for row in drawn}
        for column in ("frechet_distance", "accuracy")
    )
    rivals = {row["model"] for row in drawn} - {"coalescer"}
    text = " ".join(FASHION.split())

    def nearer(steps: int) -> set[str]:
        """The rivals with a smaller distance than the coalescer."""
        return {name for name in rivals if distance[name, steps] < distance["coalescer", steps]}

    # where it wins
    assert [nearer(steps) for steps in STEPS[:-1]] == [set(), *[{"mean flow"}] * 3]
    assert min(rivals, key=lambda name: distance[name, 1]) == "consistency"
    assert f"{distance['coalescer', 1]:.1f}, against {distance['consistency', 1]:.1f} of the next, consistency" in text
    best = {steps: max(rivals, key=lambda name: share[name, steps]) for steps in STEPS}
    assert all(share["coalescer", steps] > share[best[steps], steps] for steps in STEPS)
    assert best[2] == "flow matching"
    assert share["coalescer", 2] - share["flow matching", 2] < 0.01
    assert min(share["coalescer", steps] for steps in STEPS) > real
    # where it loses
    assert f"{distance['mean flow', 2]:.1f} against {distance['coalescer', 2]:.1f} at 2" in text
    assert min(distance, key=distance.__getitem__) == ("mean flow", 4)
    assert f"and {distance['mean flow', 4]:.1f} at 4, the smallest of all" in text
    assert nearer(50) == {"mean flow", "flow matching", "shortcut"}
    assert min(STEPS, key=lambda steps: distance["coalescer", steps]) == 8
    assert f"MeanFlow fails at 1 evaluation, with a distance of {distance['mean flow', 1]:.0f}" in text


def test_table_of_clip_art():
    rows = results.read(ROOT / "benchmarks" / "results" / "openclipart.csv")
    columns = {"name_top1": 2, "keyword_top1": 2, "held_out_group": 2, "fd_name": 1, "below_q5": 3}
    table = CLIP_ART[CLIP_ART.index("| steps |") :].split("\n\n")[0].splitlines()[2:]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert found[:-1] == [
        [row["steps"], *(f"{float(row[column]):.{digits}f}" for column, digits in columns.items())] for row in rows
    ]
    [floors] = {(f"{float(row['held_out_group_chance']):.2f}", f"{float(row['fd_floor_real']):.1f}") for row in rows}
    assert found[-1][1:] == ["", "", *floors, "0.05"]  # by its definition, 5 % of real pictures


def test_text_of_clip_art():
    rows = results.read(ROOT / "benchmarks" / "results" / "openclipart.csv")
    value = {column: [float(row[column]) for row in rows] for column in rows[0]}
    text = " ".join(CLIP_ART.split())
    assert value["steps"] == [1, 2, 4]
    assert set(value["guidance_scale"]) == {1.5}
    assert "a guidance of 1.5" in text
    for column in ("name_top1", "keyword_top1", "held_out_group"):
        assert value[column] == sorted(value[column], reverse=True)
    for column in ("fd_name", "below_q5", "density"):
        assert value[column] == sorted(value[column])
    assert f"Density rises from {value['density'][0]:.2f} to {value['density'][-1]:.2f}" in text
    assert "coverage hardly moves ({:.3f}, {:.3f}, {:.3f})".format(*value["coverage"]) in text
    assert f"are found, {value['name_top1'][0]:.2f} of them. Keywords are not, {value['keyword_top1'][0]:.2f};" in text
    assert f"The distance of {value['fd_name'][0]:.0f} is far from the floor of {value['fd_floor_real'][0]:.0f}" in text
    decibels = value["psnr_autoencoder_held_out"][0]
    floor = value["fd_floor_autoencoder"][0]
    assert f"have {floor:.1f}, and those of held-out drawings have {decibels:.0f} dB" in text


def test_training_of_clip_art():
    config, text = read("openclipart", CoalescerConfig), " ".join(CLIP_ART.split())
    assert isinstance(config.autoencoder, AutoencoderConfig)
    assert config.anchor is not None
    steps = [schedule.steps for schedule in (config.autoencoder.schedule, config.anchor, config.schedule)]
    assert "{:,} steps of the autoencoder, {:,} of the anchor and {:,} of the coalescer".format(*steps) in text
    assert config.scheduler["guidance_scale"] == 1.5
    assert len(config.scheduler["etas"]) == 2  # the default
    [clear, blurred] = re.findall(r"(?:the default|trained on): ((?:the \w+(?:, )?)+)\.", text)
    assert set(re.findall(r"the (\w+)", f"{clear}, {blurred}")) <= set(config.sheet)
    assert len(config.sheet) == 30  # "Thirty prompts"
    assert config.sheet[-1] == ""
