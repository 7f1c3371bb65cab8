"""Random configurations of the UNet in the native runtime: the first and the second call against float64.

python -m tests.fuzzing.configurations --count 500 --seed 1 --csv FILE
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch

from coalescer_fast import (
    CoalescerAutoencoder,
    CoalescerPipeline,
    CoalescerScheduler,
    CoalescerUNet,
    DescriptionEncoder,
    files,
)
from coalescer_fast.models.unet import Conditioning
from coalescer_fast.ops import native_library
from coalescer_fast.runtime.native.module import no_programs
from coalescer_fast.runtime.native.runtime import NativeRuntime

# Largest |y - y64| / |y64| of directions and of distances: what rounding the inputs and weights of every layer can add
# up to in networks as small as these.
BUDGET = {"float32": 3e-6, "bfloat16": 0.03, "int8": 0.04}


def draw_configuration(rng: random.Random) -> dict[str, Any]:
    groups = rng.choice((1, 2, 3, 4))
    levels = rng.randint(1, 3)
    heads = rng.choice((1, 2, 4))
    anchor = rng.choice(("mlp", None))
    return dict(
        sample_size=2 ** (levels - 1) * rng.randint(1, 4),
        latent_channels=rng.randint(1, 17),
        block_out_channels=[4 * groups * rng.randint(1, 6) for _ in range(levels)],
        layers_per_block=rng.randint(1, 2),
        norm_num_groups=groups,
        attention_levels=[level for level in range(levels) if rng.random() < 0.4],
        mid_attention=rng.random() < 0.5,
        num_attention_heads=heads if groups % heads == 0 else 1,
        cross_attention_dim=128 if rng.random() < 0.4 else None,
        description_dim=128,
        embedding_dim=rng.choice((8, 20, 33)),
        anchor=anchor,
        anchor_hidden_dim=rng.choice((12, 40)),
    )


def build(configuration: dict[str, Any], seed: int) -> CoalescerPipeline:
    """A pipeline of the network, its weights random with variance 1 / fan-in, so that activations stay near 1."""
    unet, generator = CoalescerUNet(**configuration).eval().requires_grad_(False), torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) / fan**0.5)
    vocabulary = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cat", "dog", "tree"])
    table = torch.randint(-90, 90, (9, 128), generator=generator, dtype=torch.int8).numpy()
    encoder = DescriptionEncoder.from_table(
        table,
        torch.ones(128, dtype=torch.float32).numpy(),
        torch.tensor(list(vocabulary.encode()), dtype=torch.uint8).numpy(),
    )
    vae = CoalescerAutoencoder(2, configuration["latent_channels"], 8, (1, 1), (1, 1)).eval()
    return CoalescerPipeline(unet, CoalescerScheduler(), encoder, vae)


def figures(configuration: dict[str, Any], dtype: str, seed: int) -> dict[str, float]:
    """Relative errors of direction and distance in the first and the second call, and "alone", 1 if a sample that is
    evaluated alone has the same bits as in a batch."""
    pipe = build(configuration, seed)
    n, rng = 3, torch.Generator().manual_seed(seed + 1)
    texts, side = ["red cat", "", "tree"], configuration["sample_size"]
    sample = torch.randn(n, configuration["latent_channels"], side, side, generator=rng, dtype=torch.float32)
    described = pipe.describe(texts, torch.device("cpu"))
    exact = build(configuration, seed).unet.double()
    wide = [x.double() if x.is_floating_point() else x for x in described]
    with torch.no_grad():
        expected = exact(sample.double(), exact.condition(*wide), return_dict=False)
    runtime = NativeRuntime(pipe, getattr(torch, dtype))
    assert not runtime.refused, runtime.refused
    found: dict[str, float] = {}
    conditioning: Conditioning = runtime.conditioning(described)
    calls = [runtime.evaluate(sample, conditioning) for _ in range(2)]
    for word, results in zip(("first", "second"), calls):
        for name, y, y64 in zip(("direction", "distance"), results, expected):
            found[f"{word} {name}"] = float((y.double() - y64).norm() / y64.norm())
    alone = runtime.evaluate(sample[1:2], runtime.conditioning(tuple(x[1:2] for x in described)))
    found["alone"] = float(all(torch.equal(one, y[1:2]) for one, y in zip(alone, calls[0])))
    if runtime.refused:
        raise AssertionError(f"it has no program: {runtime.refused}")
    return found


def run(count: int, seed: int) -> list[dict[str, Any]]:
    """Evaluate random configurations.

    Args:
        count: number of configurations.
        seed: of their choice.

    Returns:
        A row for each configuration and dtype.

    Raises:
        AssertionError: if one exceeds the error budget of its dtype; it names the configuration.
    """
    rows = []
    dtypes = [dtype for dtype in BUDGET if not no_programs(torch.uint8 if dtype == "int8" else getattr(torch, dtype))]
    for i in range(count):
        configuration = draw_configuration(random.Random(f"{seed} {i}"))
        for dtype in dtypes:
            try:
                found = figures(configuration, dtype, i)
                largest = max(value for name, value in found.items() if name != "alone")
                assert largest <= BUDGET[dtype], f"off by {largest:.3g}"
                assert found["alone"], "other bits alone than in a batch"
            except Exception as error:
                raise AssertionError(f"seed {seed}, configuration {i}, {dtype}, {configuration}: {error}") from error
            rows.append(
                {
                    "configuration": i,
                    "dtype": dtype,
                    "instruction_set": native_library.isa(),
                    **{k: f"{v:.3g}" for k, v in found.items()},
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="configurations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each configuration and dtype")
    args = parser.parse_args()
    rows = run(args.count, args.seed)
    if args.csv:
        files.write_csv(args.csv, rows, list(rows[0]))
    for dtype in BUDGET:
        errors = [
            max(float(row[f"{call} {name}"]) for call in ("first", "second") for name in ("direction", "distance"))
            for row in rows
            if row["dtype"] == dtype
        ]
        if errors:
            print(f"{dtype}: {len(errors)} configurations, largest error {max(errors):.3g}, budget {BUDGET[dtype]:g}")


if __name__ == "__main__":
    main()
