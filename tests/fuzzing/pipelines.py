"""Damage of saved pipelines, at random: whatever happens to one, it draws what it drew or is refused in one sentence.

python -m tests.fuzzing.pipelines --count 1000 --seed 1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from coalescer_fast import CoalescerPipeline

from ..helpers.pipelines import noise, tiny_pipeline

NUMBERS = (0, 1, -1, 2, 3, 7, 0.5, 1e300, 10**12, float("nan"))
VALUES = (None, True, False, *NUMBERS, "", "mlp", "raw", "os", [], [1], [[]], {}, {"a": 1}, "x" * 999)


def make(folder: Path) -> Path:
    """The pipeline to be damaged."""
    tiny_pipeline().save_pretrained(folder)
    return folder


def mutate(folder: Path, rng: random.Random) -> str:
    """Damage one thing in a saved pipeline; what it was."""
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    own = TENSORS if path.suffix == ".safetensors" else ENTRIES if path.suffix == ".json" else []
    damage = rng.choice([*BYTES, *FILES, *own, *own, *own])
    return f"{damage.__name__} {path.relative_to(folder)}: {damage(path, rng)}"


def check(folder: Path, expected: torch.Tensor, vouched: bool = True) -> str:
    """ "same" or "refused"; where no checksums vouch for the files, "other" pictures may come of it, which are finite.

    Raises AssertionError for anything else.
    """
    try:
        found = draw(CoalescerPipeline.from_pretrained(folder))
    except (ValueError, TypeError) as error:
        said = str(error)
        assert said, "an empty sentence"
        assert "\n" not in said, f"more than one sentence: {said}"
        return "refused"
    assert found.isfinite().all(), "a picture of numbers that are not finite"
    if torch.equal(found, expected):
        return "same"
    assert not vouched, "another picture"
    return "other"


def draw(pipe: CoalescerPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(["octopus", "red cat"], latents=noise(2), guidance_scale=1.5, output_type="pt").images


def run(count: int, seed: int, vouched: bool = True) -> Counter[str]:
    """Damage a pipeline ``count`` times, each time anew, and count what came of it.

    Raises AssertionError, naming the damage.
    """
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        whole = make(Path(scratch) / "whole")
        expected = draw(CoalescerPipeline.from_pretrained(whole))
        for i in range(count):
            folder = Path(shutil.copytree(whole, Path(scratch) / "damaged", symlinks=True))
            if not vouched:
                (folder / "checksums.json").unlink()
            damage = mutate(folder, random.Random(f"{seed} {i}"))
            try:
                found[check(folder, expected, vouched)] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}, damage {i}, {damage}: {type(error).__name__}: {error}") from error
            shutil.rmtree(folder)
    return found


def flip(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at, bit = rng.randrange(min(len(content), rng.choice((16, 2000, len(content))))), rng.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at}"


def cut(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    size = rng.randrange(len(content))
    path.write_bytes(content[:size])
    return f"to {size} bytes"


def grow(path: Path, rng: random.Random) -> str:
    more = rng.randbytes(rng.choice((1, 8, 100)))
    path.write_bytes(path.read_bytes() + more)
    return f"by {len(more)} bytes"


def scramble(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    content[at : at + 16] = rng.randbytes(min(16, len(content) - at))
    path.write_bytes(content)
    return f"from byte {at}"


def nest(path: Path, rng: random.Random) -> str:
    path.write_text(rng.choice("[{") * 50_000, "utf-8")
    return "brackets"


def remove(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "file"


def remove_folder(path: Path, rng: random.Random) -> str:
    part = path.parent if (path.parent / "model_index.json").exists() is False else path.parent / "vae"
    shutil.rmtree(part)
    return part.name


def become_a_folder(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return ""


def lead_nowhere(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.symlink_to("nowhere")
    return ""


def become_another(path: Path, rng: random.Random) -> str:
    other = rng.choice(sorted(p for p in path.parents[1].rglob("*") if p.is_file() and p != path))
    shutil.copyfile(other, path)
    return str(other.name)


def litter(path: Path, rng: random.Random) -> str:
    name = rng.choice(
        (
            "README.md",
            "diffusion_pytorch_model.bin",
            "pipeline.py.bak",
            "diffusion_pytorch_model.fp16.safetensors",
            "x.y.z",
        )
    )
    (path.parent / name).write_bytes(rng.randbytes(50))
    return name


def places(table: Any) -> list[tuple[Any, Any]]:
    """All (container, key) of a value out of JSON."""
    keys = list(table) if isinstance(table, dict) else range(len(table)) if isinstance(table, list) else []
    return [found for key in keys for found in [(table, key), *places(table[key])]]


def on_json(change: Callable[[Any, Any, random.Random], str]) -> Callable[[Path, random.Random], str]:
    def damage(path: Path, rng: random.Random) -> str:
        table = json.loads(path.read_text("utf-8"))
        container, key = rng.choice(places(table))
        said = f"{key}, {change(container, key, rng)}"
        path.write_text(json.dumps(table), "utf-8")
        return said

    damage.__name__ = change.__name__
    return damage


@on_json
def set_entry(container: Any, key: Any, rng: random.Random) -> str:
    container[key] = rng.choice(VALUES)
    return f"{container[key]!r:.40}"


@on_json
def drop_entry(container: Any, key: Any, rng: random.Random) -> str:
    del container[key]
    return "gone"


@on_json
def rename_entry(container: Any, key: Any, rng: random.Random) -> str:
    if isinstance(container, list):
        container.append(container[key])
        return "twice"
    container[f"{key}s"] = container.pop(key)
    return "renamed"


@on_json
def nudge_entry(container: Any, key: Any, rng: random.Random) -> str:
    old = container[key]
    if isinstance(old, (int, float)):
        container[key] = rng.choice((old + 1, old - 1, 2 * old, -old, float(old), str(old)))
    else:
        container[key] = f"{old}"
    return f"{old!r:.40} to {container[key]!r:.40}"


def on_tensors(
    change: Callable[[dict[str, torch.Tensor], str, random.Random], str],
) -> Callable[[Path, random.Random], str]:
    def damage(path: Path, rng: random.Random) -> str:
        state = load_file(path)
        name = rng.choice(sorted(state))
        said = f"{name}, {change(state, name, rng)}"
        save_file(state, path, {"format": "pt"})
        return said

    damage.__name__ = change.__name__
    return damage


@on_tensors
def poison_tensor(state: dict[str, torch.Tensor], name: str, rng: random.Random) -> str:
    flat = state[name].flatten()
    value = (
        rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, -3e38))
        if flat.is_floating_point()
        else rng.randrange(128)
    )
    if flat.numel():
        flat[rng.randrange(flat.numel())] = value
    state[name] = flat.view(state[name].shape)
    return f"{value}"


@on_tensors
def drop_tensor(state: dict[str, torch.Tensor], name: str, rng: random.Random) -> str:
    del state[name]
    return "gone"


@on_tensors
def rename_tensor(state: dict[str, torch.Tensor], name: str, rng: random.Random) -> str:
    state[f"{name}s"] = state.pop(name)
    return "renamed"


@on_tensors
def add_tensor(state: dict[str, torch.Tensor], name: str, rng: random.Random) -> str:
    state[f"{name}s"] = state[name].clone()
    return "twice"


@on_tensors
def cast_tensor(state: dict[str, torch.Tensor], name: str, rng: random.Random) -> str:
    dtype = rng.choice(
        (
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int8,
            torch.uint8,
            torch.int64,
            torch.bool,
            torch.float8_e5m2,
        )
    )
    state[name] = state[name].to(dtype)
    return str(dtype)


@on_tensors
def reshape_tensor(state: dict[str, torch.Tensor], name: str, rng: random.Random) -> str:
    old = state[name]
    new = rng.choice((old.flatten(), old[None], old.flatten()[:-1], torch.cat([old.flatten(), old.flatten()])))
    state[name] = new.clone()
    return str(tuple(new.shape))


BYTES = [flip, flip, cut, grow, scramble, nest]
FILES = [remove, remove_folder, become_a_folder, lead_nowhere, become_another, litter]
ENTRIES = [set_entry, drop_entry, rename_entry, nudge_entry]
TENSORS = [poison_tensor, drop_tensor, rename_tensor, add_tensor, cast_tensor, reshape_tensor]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unvouched", action="store_true", help="without checksums.json")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    print(dict(run(args.count, args.seed, not args.unvouched)))
