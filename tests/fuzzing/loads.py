"""Loads of damaged files: each gives the right result or fails with one sentence; none crashes, hangs or litters.

    python -m tests.fuzzing.loads --count 5000 --seed 1 --csv loads.csv

Damage number n of a target is a function of the target, the seed and n alone. The loads run in a process of their own,
so that one that crashes, or that never ends, is counted like any other. To fuzz another kind of folder, add an entry to
`TARGETS`.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..helpers import processes
from ..helpers.artefacts import small_artefacts
from ..helpers.pipelines import small_pipeline
from . import pipelines

RIGHT, SENTENCE = "right", "sentence"
SECONDS, START = 120, 600  # a load that takes longer counts as hanging; so does a process that takes longer to start

# What replaces a number, a string, a list or an object in JSON.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, float("nan"), float("inf"), 1e308),
    *(
        "",
        "zz",
        "../x",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "\x00",
        "\ud800",
        "é" * 300,
        "batch",
        "float32",
        "model.onnx",
        "manifest.json",
    ),
    *([], [[]], {}, {"": {}}, [None], ["batch"], [1, 2, 3], {"a": 1}, json.loads("[" * 200 + "]" * 200)),
)
NAMES = ("notes.txt", ".hidden", "model.onnx.data", "manifest.json~", "config.json", "pipeline.py", "a b", "ä")


@dataclass(frozen=True)
class Target:
    """A kind of folder that is damaged and loaded.

    Attributes:
        make: writes an undamaged one into an empty folder.
        load: loads it, and returns what a caller gets of it as bytes.
        seal: writes a changed JSON file together with the checksum that vouches for it, as an attacker would; None
            where nothing vouches for JSON files.
        needs: packages that it takes.
        tolerance: by how much float32 numbers may differ from those of the undamaged folder; 0 for the same bits.
        damage: damages the folder and says how; None for `mutate`.
    """

    make: Callable[[Path], None]
    load: Callable[[Path], bytes]
    seal: Callable[[Path, Any], None] | None = None
    needs: Sequence[str] = ()
    tolerance: float = 0.0
    damage: Callable[[Path, random.Random], str] | None = None


@dataclass(frozen=True)
class Case:
    """A damaged folder and what became of loading it."""

    target: str
    number: int
    damage: str
    outcome: str  # RIGHT, SENTENCE, or what went wrong
    message: str

    @property
    def passed(self) -> bool:
        return self.outcome in (RIGHT, SENTENCE)


# Damage


def mutate(folder: Path, rng: random.Random, seal: Callable[[Path, Any], None] | None = None) -> str:
    """Damage one thing in a folder, and return what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    kinds = [flip, flip, cut, grow, remove, swap, link, add]
    tables = [each for each in files if each.suffix == ".json"]
    if tables:
        kinds += [nest, *[value] * 4]
    kind = rng.choice(kinds)
    if kind in (nest, value):
        path = rng.choice(tables)
    name = path.relative_to(folder)
    return f"{name}: {value(path, rng, seal) if kind is value else kind(path, rng)}"


def flip(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    if not content:
        return grow(path, rng)
    places = [rng.randrange(len(content)) for _ in range(rng.choice((1, 1, 1, 8, 64)))]
    for place in places:
        content[place] ^= rng.randrange(1, 256)
    path.write_bytes(content)
    return f"{len(places)} bytes flipped, the first at {places[0]}"


def cut(path: Path, rng: random.Random) -> str:
    size = rng.choice((0, 1, rng.randrange(path.stat().st_size + 1), max(0, path.stat().st_size - 1)))
    os.truncate(path, size)
    return f"cut to {size} bytes"


def grow(path: Path, rng: random.Random) -> str:
    more = rng.randbytes(rng.choice((1, 100, 10_000)))
    with path.open("ab") as file:
        file.write(more)
    return f"{len(more)} bytes more"


def remove(path: Path, rng: random.Random) -> str:
    path.unlink()
    if rng.random() < 0.3:
        path.mkdir()
        return "a folder in its place"
    return "removed"


def swap(path: Path, rng: random.Random) -> str:
    others = [each for each in sorted(path.parent.iterdir()) if each.is_file() and each != path]
    content = rng.choice(others).read_bytes() if others and rng.random() < 0.5 else rng.randbytes(rng.randrange(5000))
    path.write_bytes(content)
    return f"{len(content)} other bytes"


def link(path: Path, rng: random.Random) -> str:
    path.unlink()
    where = rng.choice(("/etc/passwd", "/dev/zero", "/dev/null", "..", path.name, "missing"))
    path.symlink_to(where)
    return f"a link to {where}"


def add(path: Path, rng: random.Random) -> str:
    new = path.with_name(rng.choice(NAMES))
    if new.exists():
        return grow(new, rng)
    new.write_bytes(rng.randbytes(100))
    return f"{new.name} beside it"


def nest(path: Path, rng: random.Random) -> str:
    text = rng.choice(("[", '{"a":', '[{"a":[')) * rng.choice((500, 100_000))
    path.write_text(text)
    return "nested without an end"


def value(path: Path, rng: random.Random, seal: Callable[[Path, Any], None] | None) -> str:
    """Replace, remove or add one value in JSON; where there is a ``seal``, mostly sealed."""
    content = json.loads(path.read_text("utf-8"))
    where, holder = rng.choice(list(_holders(content, path.name)))
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    what = rng.choice(("replace", "replace", "replace", "drop", "add"))
    if not keys or what == "add":
        new = copy.deepcopy(rng.choice(VALUES))
        if isinstance(holder, dict):
            key = rng.choice(("zz", "", "../x", "sha256", "unet"))
            holder[key] = new
        else:
            key = len(holder)
            holder.append(new)
        said = f"{where}: {key!r} is there"
    elif what == "drop":
        key = rng.choice(keys)
        del holder[key]
        said = f"{where}: {key!r} is gone"
    else:
        key = rng.choice(keys)
        holder[key] = _other(holder[key], rng)
        said = f"{where}: {key!r} is another"
    if seal is not None and rng.random() < 0.8:
        seal(path, content)
        return f"{said}, sealed"
    path.write_text(json.dumps(content), "utf-8")
    return said


def _holders(content: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(content, (dict, list)):
        yield where, content
        for key, each in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _holders(each, f"{where}.{key}")


def _other(old: Any, rng: random.Random) -> Any:
    if isinstance(old, (int, float)) and not isinstance(old, bool) and rng.random() < 0.5:
        return rng.choice((old + 1, old - 1, -old, old * 1000, float(old)))
    return copy.deepcopy(rng.choice(VALUES))


# Checks


def check(load: Callable[[], bytes], expected: bytes, tolerance: float = 0.0) -> tuple[str, str]:
    """The outcome of a load, and its message."""
    try:
        found = load()
    except ValueError as error:
        message = str(error)
        whole = bool(message) and "\n" not in message and len(message) < 1000
        return (SENTENCE if whole else "no sentence"), message[:300]
    except BaseException as error:
        return f"raises {type(error).__name__}", " ".join(str(error).split())[:300]
    return (RIGHT, "") if found == expected or _close(found, expected, tolerance) else ("another result", "")


def _close(found: bytes, expected: bytes, tolerance: float) -> bool:
    import numpy as np

    if not tolerance or len(found) != len(expected):
        return False
    a, b = (np.frombuffer(each, np.float32) for each in (found, expected))
    return bool((np.abs(a - b) <= tolerance).all())


def snapshot(folder: Path) -> list[tuple[str, int, int]]:
    """The entries of a folder: name, mode and size."""
    facts = [(str(path.relative_to(folder)), path.lstat()) for path in sorted(folder.rglob("*"))]
    return [(name, each.st_mode, each.st_size) for name, each in facts]


def work(name: str, seed: int, numbers: Sequence[int], original: Path, pipe: Connection) -> None:
    """Run the cases of these numbers one after the other; send each when it begins and when it has ended."""
    target = TARGETS[name]
    expected = target.load(original)
    pipe.send(None)
    for number in numbers:
        rng = random.Random(f"{name} {seed} {number}")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "folder"
            shutil.copytree(original, folder)
            damage = mutate(folder, rng, target.seal) if target.damage is None else target.damage(folder, rng)
            pipe.send((number, damage))
            before = snapshot(Path(scratch))
            outcome, message = check(lambda folder=folder: target.load(folder), expected, target.tolerance)
            if snapshot(Path(scratch)) != before:
                outcome = "changes the folder"
            pipe.send(Case(name, number, damage, outcome, message))


def run(name: str, count: int, seed: int = 0, worker: Callable[..., None] = work) -> Iterator[Case]:
    """Cases 0 to ``count`` of a target; after a crash or a hang, in another process."""
    context = processes.context()
    done = 0
    with tempfile.TemporaryDirectory() as scratch:
        original = Path(scratch) / "original"
        original.mkdir()
        TARGETS[name].make(original)
        while done < count:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=worker, args=(name, seed, range(done, count), original, theirs), daemon=True
            )
            process.start()
            theirs.close()
            begun: tuple[int, str] | None = None
            patience = START
            try:
                while done < count:
                    if not ours.poll(patience):
                        raise TimeoutError
                    received = ours.recv()
                    patience = SECONDS
                    if isinstance(received, Case):
                        yield received
                        done, begun = received.number + 1, None
                    elif received is not None:
                        begun = received
            except TimeoutError:
                outcome = "hangs"
            except EOFError:
                process.join()
                outcome = f"ends the process with {process.exitcode}"
            else:
                outcome = ""
            finally:
                if done < count:
                    process.kill()
                process.join()
                ours.close()
            if done < count:
                if begun is None:
                    raise RuntimeError(f"{name}: the undamaged folder {outcome}")
                yield Case(name, *begun, outcome, "")
                done = begun[0] + 1


# What is loaded


@cache
def _pipeline() -> Any:
    return small_pipeline(anchor="mlp", anchor_hidden_dim=16)


def make_artefact(folder: Path) -> None:
    shutil.copytree(small_artefacts(), folder, dirs_exist_ok=True)


def load_artefact(folder: Path) -> bytes:
    """Pictures of the artefacts: by the generator, and with a trace, by UNet and decoder."""
    import torch

    import coalescer_fast as cf

    pipe = cf.accelerate(_pipeline(), artefact=folder)
    try:
        pictures = []
        for trace in (False, True):
            noise = torch.Generator().manual_seed(0)
            pictures.append(
                pipe("octopus", num_images_per_prompt=2, generator=noise, output_type="pt", return_trace=trace).images
            )
        return b"".join(each.numpy().tobytes() for each in pictures)
    finally:
        cf.restore(pipe)


def seal_manifest(path: Path, content: Any) -> None:
    """Write a manifest with its own checksum."""
    content.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "sha256": digest}), "utf-8")


def _training(folder: Path) -> Any:
    """The training of a small network for eight steps, resumed from the folder's checkpoint if there is one."""
    import torch

    from coalescer_fast.training.loop import Schedule, Trainer, make_accelerator

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    schedule = Schedule(steps=8, batch_size=4, learning_rate=0.1, warmup_steps=2, checkpoint_every=4)
    return Trainer("net", network, schedule, folder, make_accelerator(), progress=False, settings={"data": "1" * 64})


def _loss(trainer: Any, stop: int) -> Callable[[Any, int], Any]:
    import torch

    def loss(model: Any, step: int) -> Any:
        if step == stop:
            raise InterruptedError
        x = torch.randn(4, 2, generator=trainer.generator(step), dtype=torch.float32)
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}

    return loss


def make_checkpoint(folder: Path) -> None:
    """The checkpoint of a training that was stopped in its seventh step: that of step four."""
    trainer = _training(folder)
    with suppress(InterruptedError):
        trainer.run(_loss(trainer, 6))


def load_checkpoint(folder: Path) -> bytes:
    """The weights at the end of the training that is resumed from it, in a copy of the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        there = Path(scratch) / "copy"
        shutil.copytree(folder, there, symlinks=True)
        trainer = _training(there)
        if trainer.first_step == 0:
            raise ValueError("there is no checkpoint, and the training begins anew")
        averaged = trainer.run(_loss(trainer, 8))
        return b"".join(tensor.numpy().tobytes() for tensor in averaged.state_dict().values())


def load_pipeline(folder: Path) -> bytes:
    import coalescer_fast as cf

    return pipelines.draw(cf.CoalescerPipeline.from_pretrained(folder)).numpy().tobytes()


TARGETS = {
    "pipeline": Target(pipelines.make, load_pipeline, damage=pipelines.mutate),
    # a generator of another schedule is not used, and UNet and decoder round the same picture in other places
    "artefact": Target(make_artefact, load_artefact, seal_manifest, ("onnx", "onnxscript", "onnxruntime"), 1e-4),
    "checkpoint": Target(make_checkpoint, load_checkpoint, None, ("accelerate",)),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzzing.loads", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="cases of every target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="(default: all)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row a target and outcome")
    args = parser.parse_args(argv)
    rows = []
    failed = 0
    for name in args.target or TARGETS:
        outcomes: Counter[str] = Counter()
        for case in run(name, args.count, args.seed):
            outcomes[case.outcome] += 1
            if not case.passed:
                failed += 1
                print(f"{name} {case.number}, {case.damage}: {case.outcome} ({case.message})", file=sys.stderr)
        rows += [
            {"target": name, "seed": args.seed, "outcome": outcome, "cases": n} for outcome, n in outcomes.most_common()
        ]
        print(f"{name}: {', '.join(f'{n} {outcome}' for outcome, n in outcomes.most_common())}")
    if args.csv:
        from coalescer_fast import files

        files.write_csv(args.csv, rows, list(rows[0]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
