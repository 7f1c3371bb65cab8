"""coalescer-fast generate: CPU time of a picture, and how long a file of a million prompts takes to read.

The CPU time is the difference between two runs of the command, of many prompts and of few, divided by the pictures
between them: start-up and the loading of the model cancel out. Each run makes a shard with one worker of one thread; a
picture's PNG file, its JSON and its row of the table are part of it. Pictures are compared with those of direct calls.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.harness import results
from benchmarks.harness.arguments import Parser, command, positive
from benchmarks.harness.processes import same_package
from coalescer_fast import PhiloxGenerator, accelerate
from coalescer_fast.bench.environment import environment
from coalescer_fast.console import open_pipeline, transposed_table
from coalescer_fast.models.emoji import names
from coalescer_fast.ops import native_library

FEW, CHECKED = 60, 8  # prompts of the short run, and pictures that are compared
# the peak of /proc, for that of getrusage is inherited
READ = r"""
import re, sys, time
from coalescer_fast.bulk.prompt_file import read
def peak(): return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1e3
before, started = peak(), time.perf_counter()
assert len(read(sys.argv[1])) == int(sys.argv[2])
print(time.perf_counter() - started, peak() - before)
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.bulk", description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=positive, default=600, metavar="N", help="default: %(default)s")
    text = "prompts of the file that is read (default: %(default)s)"
    parser.add_argument("--rows", type=positive, default=1_000_000, metavar="N", help=text)
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="write the results there")
    args = parser.parse_args(argv)
    return command(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name:
        row: results.Row = {**drawing(Path(name), args.pictures), **reading(Path(name), args.rows)}
    row = {**row, "isa": native_library.isa(), **environment()}
    print(transposed_table([row]))
    if args.csv is not None:
        results.write(args.csv, [row])
    return 0


def drawing(folder: Path, pictures: int) -> results.Row:
    """CPU milliseconds of a picture, and how many of those compared differ from direct calls."""
    prompts = list(itertools.islice(itertools.cycle(sorted(set(names().values()))), FEW + pictures))
    seconds = []
    for count in (FEW, FEW + pictures):
        file, shards = folder / "prompts.txt", folder / f"{count}"
        file.write_text("".join(f"{prompt}\n" for prompt in prompts[:count]), "utf-8")
        words = f"generate {file} -o {shards} --workers 1 --threads 1 --per-shard {count}".split()
        before = cpu_seconds()
        run_python("-m", "coalescer_fast", *words)
        seconds.append(cpu_seconds() - before)
    return {
        "pictures": pictures,
        "cpu_ms_a_picture": 1e3 * (seconds[1] - seconds[0]) / pictures,
        "checked_pictures": CHECKED,
        "wrong_pictures": wrong(shards / "00000.tar", prompts[:CHECKED]),
    }


def run_python(*words: str) -> str:
    """What Python prints. Raises ValueError with what it says where it fails."""
    found = subprocess.run([sys.executable, *words], **same_package(), capture_output=True, text=True)
    if found.returncode:
        raise ValueError(found.stderr.strip())
    return found.stdout


def cpu_seconds() -> float:
    """Of the processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wrong(tar: Path, prompts: Sequence[str]) -> int:
    """How many of a tar's first pictures differ from those of direct calls."""
    pipe: Any = accelerate(open_pipeline("emoji-64"))
    pipe.set_progress_bar_config(disable=True)
    with tarfile.open(tar) as file:
        found = [file.extractfile(member) for member in file.getmembers() if member.name.endswith(".png")]
        drawn = [Image.open(io.BytesIO(each.read())).tobytes() for each in found[: len(prompts)] if each is not None]
    expected = [
        pipe(prompt, generator=PhiloxGenerator(0, picture=i)).images[0].tobytes() for i, prompt in enumerate(prompts)
    ]
    return sum(one != other for one, other in zip(drawn, expected, strict=True))


def reading(folder: Path, rows: int) -> results.Row:
    """Seconds and megabytes that a process takes to read a .jsonl file of prompts with ids; on Linux."""
    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for i in range(rows):
            lines.write(json.dumps({"id": f"picture-{i}", "prompt": f"octopus number {i}"}) + "\n")
    seconds, megabytes = map(float, run_python("-c", READ, str(file), str(rows)).split())
    return {"rows": rows, "read_s": seconds, "read_mb": megabytes}
