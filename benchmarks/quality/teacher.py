"""A coalescer from a pretrained network, shown on digits: a diffusion model is trained, then coalescers of its UNet.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.teacher --out runs/teacher

The same network is trained from the diffusion model's weights and from scratch, with the diffusion model as the teacher
and with the vector search, for the same steps. A row of the CSV is a model after some steps, with the mean loss of the
steps since the row before and the CPU time since the training began; or a sampler by its evaluations of the network,
with the share of its pictures that a classifier recognises as what was described, and their Fréchet distance to the
training pictures in the classifier's features.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel
from torch import nn

from coalescer_fast import CoalescerAutoencoder, CoalescerPipeline, CoalescerUNet, files
from coalescer_fast.bench.environment import environment
from coalescer_fast.training.autoencoder import AutoencoderConfig, encode, train_autoencoder
from coalescer_fast.training.coalescer import CoalescerConfig, description_encoder, train_coalescer
from coalescer_fast.training.config import read
from coalescer_fast.training.data import PictureDataset, load
from coalescer_fast.training.items import ItemStream, Pairing
from coalescer_fast.training.loop import Schedule, Trainer, make_accelerator
from coalescer_fast.training.losses import mean_square
from coalescer_fast.training.pictures import sheet
from coalescer_fast.training.prompts import PromptSampler
from coalescer_fast.training.teacher import Teacher, TeacherConfig, described

from ..harness.results import Row, write
from ..harness.results import read as read_rows
from .recognition import Recognition

RESULTS = Path(__file__).parents[1] / "results" / "teacher.csv"
UNET = dict(
    sample_size=4,
    in_channels=8,
    out_channels=8,
    block_out_channels=(64, 96),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    norm_num_groups=8,
    attention_head_dim=4,
    cross_attention_dim=128,
)
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
TEACHER = Schedule(
    steps=2048, batch_size=128, learning_rate=1e-3, ema_decay=0.998, checkpoint_every=1024, sample_every=4096
)
# name -> whether it starts from the teacher's weights, and whether the teacher draws the close pictures
COALESCERS = {
    "from the teacher": (True, True),
    "from scratch, with the teacher": (False, True),
    "from the teacher, search": (True, False),
    "from scratch, search": (False, False),
    "from the teacher, timestep 999": (True, True),
}
PICTURES = 100  # of a digit
ROW_EVERY = 64  # steps


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.teacher", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/teacher"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--csv", type=Path, default=RESULTS, metavar="FILE.csv", help="results (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="pictures of the teacher and of the coalescers")
    parser.add_argument("--steps", type=int, metavar="N", help="of every training: to see it run, not to compare")
    args = parser.parse_args(argv)
    compare(args.out, args.csv, args.plot, args.steps)
    return 0


def compare(out: Path, csv: Path, plot: Path | None, steps: int | None = None, progress: bool = True) -> list[Row]:
    """Train the diffusion model and the coalescers, and measure them.

    Args:
        out: folder of everything that is trained, and of the losses; what is there is not trained again.
        csv: the rows.
        plot: a sheet of pictures, a row for each sampler.
        steps: of every training; None for those that the results are of.
        progress: show bars.
    """
    data = load("digits")
    digits, config = (shortened(read(name, CoalescerConfig), steps) for name in ("digits", "digits-teacher"))
    assert isinstance(digits.autoencoder, AutoencoderConfig)
    teacher = replace(config.teacher or TeacherConfig(), folder=str(out / "pictures"))
    if (out / "autoencoder").exists():
        vae = CoalescerAutoencoder.from_pretrained(out / "autoencoder").eval()
    else:
        vae = train_autoencoder(digits.autoencoder, data, out, progress=progress).eval()
    losses = out / "losses.csv"
    rows: list[Row] = [dict(row) for row in read_rows(losses)] if losses.exists() else []
    pipe = train_teacher(config, data, vae, out, curve("teacher", rows), steps, progress)
    network = CoalescerUNet.from_diffusers(pipe.unet)
    overrides = {name: value for name, value in network.config.items() if not name.startswith("_")}
    for name, (starts, drawn) in COALESCERS.items():
        changed = replace(
            config,
            autoencoder=str(out / "autoencoder"),
            init=str(out / "teacher") if starts else "",
            init_timestep=999 if name.endswith("999") else config.init_timestep,
            overrides={} if starts else overrides,
            teacher=teacher if drawn else None,
        )
        pipeline = pipe if drawn else None
        train_coalescer(
            changed, data, folder(out, name), teacher=pipeline, on_step=curve(name, rows), progress=progress
        )
        write(losses, rows)
    rows += [{**row, **environment()} for row in measure(data, vae, pipe, teacher, out, plot)]
    write(csv, rows)
    return rows


def folder(out: Path, name: str) -> Path:
    return out / name.replace(",", "").replace(" ", "-")


def shortened(config: CoalescerConfig, steps: int | None) -> CoalescerConfig:
    """The configuration with so many steps of everything."""
    if steps is None:
        return config
    autoencoder = config.autoencoder
    if isinstance(autoencoder, AutoencoderConfig):
        autoencoder = replace(autoencoder, schedule=replace(autoencoder.schedule, steps=steps))
    teacher = None if config.teacher is None else replace(config.teacher, pictures=64, steps=2)
    schedule = replace(config.schedule, steps=steps)
    return replace(config, autoencoder=autoencoder, schedule=schedule, teacher=teacher)


def curve(name: str, rows: list[Row]) -> Callable[[int, dict[str, float]], None]:
    """Add a row with the mean loss every `ROW_EVERY` steps."""
    losses: list[float] = []
    started = time.process_time()

    def on_step(step: int, figures: dict[str, float]) -> None:
        losses.append(figures["loss"])
        if step % ROW_EVERY == 0:
            seconds = time.process_time() - started
            rows.append({"model": name, "step": step, "loss": statistics.fmean(losses), "cpu_seconds": seconds})
            losses.clear()

    return on_step


def train_teacher(
    config: CoalescerConfig,
    data: PictureDataset,
    vae: CoalescerAutoencoder,
    out: Path,
    on_step: Callable[[int, dict[str, float]], None],
    steps: int | None,
    progress: bool,
) -> DDIMPipeline:
    """Train a UNet2DConditionModel to predict epsilon (arXiv 2006.11239), and save it as a diffusers pipeline."""
    training, accelerator = data.train(), make_accelerator()
    encoder, latents = description_encoder(training), encode(vae, training)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**UNET)
    scheduler = DDIMScheduler(**SCHEDULER)
    schedule = TEACHER if steps is None else replace(TEACHER, steps=steps)
    trainer = Trainer("teacher", unet, schedule, out, accelerator, progress=progress)
    items = ItemStream(trainer, PromptSampler(training, encoder, config.prompts), latents, Pairing("paired"), key=2)

    def loss(network: nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch = items.at(step)
        t = torch.randint(1000, (len(batch.noise),), generator=trainer.generator(3, step))
        noised: Any = scheduler.add_noise(latents[batch.close], batch.noise, t)
        _, rows, mask = described(encoder, True, batch.texts)
        predicted = network(noised, t, rows, encoder_attention_mask=mask, return_dict=False)[0]
        return mean_square(predicted.float() - batch.noise).mean(), {}

    pipe = DDIMPipeline(trainer.run(loss, on_step=on_step), scheduler)
    with files.writing_folder(out / "teacher") as saved:
        pipe.save_pretrained(saved)
    return pipe


def measure(
    data: PictureDataset,
    vae: CoalescerAutoencoder,
    pipe: DDIMPipeline,
    teacher: TeacherConfig,
    out: Path,
    plot: Path | None,
) -> list[Row]:
    """Measure the pictures of the teacher and of the coalescers, from the same noise."""
    figures = Recognition(data, steps=400).figures
    encoder = description_encoder(data.train())
    labels = [c.name for c in data.concepts]
    texts = [name for name in labels for _ in range(PICTURES)]
    noise = torch.randn(len(texts), 8, 4, 4, dtype=torch.float32, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def by_teacher(steps: int) -> torch.Tensor:
        draws = Teacher(pipe, encoder, replace(teacher, steps=steps))
        decoded: Any = vae.decode(draws.draw(noise, texts))
        drawn: torch.Tensor = decoded.sample.clamp(-1, 1)
        return drawn

    rows: list[Row] = []
    pictures: dict[str, torch.Tensor] = {}
    for steps in (teacher.steps, 2):
        pictures[f"teacher, {steps} steps"] = drawn = by_teacher(steps)
        rows.append({"model": "teacher", "evaluations": steps, **figures(drawn, texts)})
    for name in COALESCERS:
        coalescer = CoalescerPipeline.from_pretrained(folder(out, name) / "pipeline")
        coalescer.set_progress_bar_config(disable=True)
        for steps in (1, 2):
            given: Any = coalescer(texts, latents=noise, num_inference_steps=steps, output_type="pt")
            drawn = given.images * 2 - 1
            rows.append({"model": name, "evaluations": steps, **figures(drawn, texts)})
        pictures[name] = drawn
    if plot is not None:
        from PIL import Image

        shown = [
            Image.fromarray(((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
            for drawn in pictures.values()
            for x in drawn[:: PICTURES // 2]
        ]
        columns = texts[:: PICTURES // 2]
        captions = [caption for name in pictures for caption in (name, *columns[1:])]
        files.write_picture(plot, sheet(shown, captions, columns=len(columns), scale=2).convert("L"))
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
