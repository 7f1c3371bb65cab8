"""What 8 bits cost, kind of product by kind, on a small UNet of Stable Diffusion's structure that was trained a little.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.int8 --data emoji_32.npz --out runs/int8

The UNet has a fifth of SD-Turbo's widths and is trained on pictures of 32x32 for some minutes, so that its activations
are of a network that has learnt something. The error is |y - y_fp32| / |y_fp32| of its predictions for pictures that
were kept out of training, at five timesteps; ranges are those of twelve other pictures.

A row of the CSV is a kind of product: its error if it alone multiplies in 8 bits, and if all but it do. The last rows
are bfloat16 (none), all products, those that `Convolution.reads_uint8` chooses by this list, and OpenVINO's by NNCF.
"""

from __future__ import annotations

import argparse
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

import coalescer_fast
from coalescer_fast.bench.environment import environment
from coalescer_fast.runtime.native.module import runtime_of
from coalescer_fast.runtime.native.program import ProgramCache
from coalescer_fast.runtime.native.steps import Convolution
from coalescer_fast.training.data import PictureDataset, load

from ..harness.results import Row, write
from ..networks import models

RESULTS = Path(__file__).parents[1] / "results" / "int8.csv"
SCALE = 0.2  # of SD-Turbo's widths: 64, 128, 256 and 256
PATCH = 2  # pixels a side that are the channels of a position
STEPS, BATCH, LEARNING_RATE, WARMUP = 400, 16, 4e-4, 20
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
CALIBRATION, MEASURED = (4, (999, 499, 19)), (8, (999, 749, 499, 249, 19))  # pictures, timesteps

# Kinds of products, by the names of their weights.
KINDS = {
    "time embedding": r"time_emb",
    "conv_in": r"^conv_in",
    "conv_out": r"^conv_out",
    "3x3 of residual blocks": r"resnets\.\d+\.conv\d",
    "shortcut": r"conv_shortcut",
    "strided": r"downsamplers",
    "upsampling": r"upsamplers",
    "proj_in": r"proj_in",
    "proj_out": r"proj_out",
    "self-attention q, k, v": r"attn1\.to_[qkv]",
    "self-attention out": r"attn1\.to_out",
    "cross-attention q": r"attn2\.to_q",
    "cross-attention k, v": r"attn2\.to_[kv]",
    "cross-attention out": r"attn2\.to_out",
    "GEGLU in": r"ff\.net\.0",
    "GEGLU out": r"ff\.net\.2",
}
Call = tuple[Tensor, dict[str, Tensor]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.int8", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, metavar="FILE.npz", help="pictures of 32x32, by build-data")
    parser.add_argument("--out", type=Path, default=Path("runs/int8"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--csv", type=Path, default=RESULTS, metavar="FILE.csv", help="results (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of the training (default: %(default)s)")
    args = parser.parse_args(argv)
    compare(load(args.data), args.out, args.csv, args.steps)
    return 0


def compare(data: PictureDataset, out: Path, csv: Path, steps: int = STEPS, progress: bool = True) -> list[Row]:
    """Train the UNet, and measure it.

    Args:
        data: pictures, whose side is a multiple of 16.
        out: folder of the UNet; if it is there, it is not trained again.
        csv: the rows.
        steps: of the training.
        progress: show a bar.
    """
    unet = trained(out / "unet", data.train(), steps, progress)
    calibration, measured = calls(data.train(), *CALIBRATION, seed=1), calls(data.held(), *MEASURED, seed=2)
    rows = [
        {**row, **environment()} for row in [*measure(unet, calibration, measured), *peer(unet, calibration, measured)]
    ]
    write(csv, rows)
    return rows


def trained(folder: Path, data: PictureDataset, steps: int, progress: bool) -> Any:
    """The UNet of a folder, trained if it is not there."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        channels = 3 * PATCH**2
        unet = UNet2DConditionModel(**models.config("sd-turbo", SCALE), in_channels=channels, out_channels=channels)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
        generator = torch.Generator().manual_seed(0)
        for step in tqdm(range(steps), disable=None if progress else True):
            warm = min(1.0, (step + 1) / WARMUP)
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm * (1 + math.cos(math.pi * step / steps)) / 2
            index = torch.randint(len(data), (BATCH,), generator=generator)
            noisy, given, noise = noised(data, index, torch.randint(1000, (BATCH,), generator=generator), generator)
            with torch.autocast("cpu", torch.bfloat16):
                predicted = unet(noisy, **given).sample
            optimizer.zero_grad()
            F.mse_loss(predicted.float(), noise).backward()
            nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
        unet.save_pretrained(folder)
    return UNet2DConditionModel.from_pretrained(folder).eval().requires_grad_(False)


def noised(
    data: PictureDataset, index: Tensor, timesteps: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Noisy pictures (n, 3 PATCH^2, side / PATCH, side / PATCH), the other arguments of a call, and the noise."""
    pictures = torch.from_numpy(data.images[index.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
    clean = F.pixel_unshuffle(pictures, PATCH)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float32)
    noisy = DDPMScheduler(**SCHEDULER).add_noise(clean, noise, timesteps)
    tokens = torch.stack([described(data.concepts[int(data.concept[i])].name) for i in index])
    return noisy, {"timestep": timesteps, "encoder_hidden_states": tokens}, noise


def described(text: str) -> Tensor:
    """A text as tokens (77, D): a vector of normal numbers for each word, and one that fills them up."""
    width = models.config("sd-turbo", SCALE)["cross_attention_dim"]
    words = [*text.split(), *["<end>"] * models.TOKENS][: models.TOKENS]
    seeds = [torch.Generator().manual_seed(zlib.crc32(word.encode())) for word in words]
    return torch.stack([torch.randn(width, generator=seed, dtype=torch.float32) for seed in seeds])


def calls(data: PictureDataset, pictures: int, timesteps: Sequence[int], seed: int) -> list[Call]:
    generator, made = torch.Generator().manual_seed(seed), []
    for timestep in timesteps:
        index = torch.randint(len(data), (pictures,), generator=generator)
        noisy, given, _ = noised(data, index, torch.full((pictures,), timestep, dtype=torch.int64), generator)
        made.append((noisy, given))
    return made


def relative_error(
    predict: Callable[[Tensor, dict[str, Tensor]], Tensor], measured: list[Call], exact: list[Tensor]
) -> float:
    """|y - exact| / |exact| over all calls."""
    with torch.inference_mode():
        found = torch.cat([predict(noisy, given).flatten() for noisy, given in measured]).double()
    expected = torch.cat([y.flatten() for y in exact]).double()
    return float((found - expected).norm() / expected.norm())


def measure(unet: Any, calibration: list[Call], measured: list[Call]) -> Iterator[Row]:
    def predict(noisy: Tensor, given: dict[str, Tensor]) -> Tensor:
        prediction: Tensor = unet(noisy, **given, return_dict=False)[0]
        return prediction

    with torch.inference_mode():
        exact = [predict(*call) for call in measured]

    def accelerated() -> float:
        inputs = [((noisy,), given) for noisy, given in calibration]
        coalescer_fast.accelerate(unet, dtype="int8", inputs=inputs)
        return relative_error(predict, measured, exact)

    with everything():
        all_products = accelerated()
        runtime = runtime_of(unet)
        assert runtime is not None
        assert runtime.ranges is not None
        ranges = runtime.ranges

        def only(chosen: Callable[[str], bool]) -> float:
            assert runtime is not None
            runtime.ranges = {key: range for key, range in ranges.items() if chosen(key[0])}
            runtime.programs = ProgramCache()
            return relative_error(predict, measured, exact)

        none = only(lambda name: False)
        for kind, pattern in KINDS.items():
            names = {key[0] for key in ranges if re.search(pattern, key[0])}
            others = {key[0] for key in ranges} - names
            yield {
                "kind": kind,
                "products": len(names),
                "alone": only(names.__contains__),
                "without": only(others.__contains__),
            }
    coalescer_fast.restore(unet)
    chosen = accelerated()
    found = runtime_of(unet)
    assert found is not None
    assert found.ranges is not None
    count = len(found.ranges)
    coalescer_fast.restore(unet)
    yield {"kind": "none: bfloat16", "products": 0, "alone": none}
    yield {"kind": "all", "products": len(ranges), "alone": all_products}
    yield {"kind": "chosen", "products": count, "alone": chosen}


@contextmanager
def everything() -> Iterator[None]:
    """Inside, all products that the kernels can do in 8 bits are recorded as such."""
    able = property(lambda step: step.weight.shape[1] % 4 == 0)
    always = property(lambda step: True)
    with mock.patch.object(Convolution, "reads_uint8", able), mock.patch.object(Convolution, "pays_for_a_copy", always):
        yield


def peer(unet: Any, calibration: list[Call], measured: list[Call]) -> Iterator[Row]:
    """OpenVINO in bfloat16 and, by NNCF, in int8; nothing if they are not installed."""
    try:
        import nncf  # noqa: F401
        import openvino as ov
    except ImportError:
        return
    from ..harness.int8 import quantized

    names = ["sample", *measured[0][1]]
    arguments = [dict(zip(names, (noisy, *given.values()))) for noisy, given in calibration]
    with torch.inference_mode():
        exact = [unet(noisy, **given, return_dict=False)[0] for noisy, given in measured]
    with torch.no_grad():
        example = tuple(measured[0][1].values())
        model = ov.convert_model(
            models.Flat(unet, arguments[0]).eval(),
            example_input=(measured[0][0], *example),
            input=[[-1, *measured[0][0].shape[1:]], *([-1, *x.shape[1:]] for x in example)],
        )
    in_int8 = quantized(model, [[x.numpy() for x in call.values()] for call in arguments])
    for kind, each in (("OpenVINO, bfloat16", model), ("OpenVINO, int8", in_int8)):
        compiled = ov.Core().compile_model(each, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})

        def predict(noisy: Tensor, given: dict[str, Tensor], compiled: Any = compiled) -> Tensor:
            return torch.from_numpy(compiled([x.numpy() for x in (noisy, *given.values())])[0]).float()

        yield {"kind": kind, "alone": relative_error(predict, measured, exact)}


if __name__ == "__main__":
    raise SystemExit(main())
