"""docs/training.md: its table of digits, and what it counts of Stable Diffusion 1.5."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.quality.teacher import COALESCERS
from coalescer_fast import CoalescerUNet
from coalescer_fast.models.unet import CONFIGURATIONS

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


def test_table_of_fashion_mnist():
    with (ROOT / "benchmarks" / "results" / "fashion.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    section = PAGE[PAGE.index("## Fashion-MNIST") : PAGE.index("## Clip art")]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        [line] = [line for line in section.splitlines() if line.startswith(f"| {model} |")]
        figures = [f"{float(row['frechet_distance']):.1f} ({float(row['accuracy']):.2f})" for row in mine]
        assert [cell.strip().replace("*", "") for cell in line.strip("|").split("|") if cell.strip()][1:] == figures
    [seconds] = {float(row["cpu_seconds"]) for row in rows if row["model"] == "coalescer"}
    assert f"{seconds:.0f} CPU seconds" in " ".join(section.split())
    assert seconds < 600
