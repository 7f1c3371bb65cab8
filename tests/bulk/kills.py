"""Kill a run of coalescer-fast generate at random moments, until it has made all, and compare with one that was left
alone, and with one of another number of workers: hash for hash.

python -m tests.bulk.kills --prompts 3000 --kills 20
unshare -n sh -c 'ip link set lo up && python -m tests.bulk.kills --ray'     # Ray asks addresses beyond this machine
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from coalescer_fast.models.emoji import names
from tests.helpers.processes import workers

STYLES = ("", ", noto style", ", twemoji style")


def write_prompts(path: Path, count: int) -> None:
    """Prompts in turn of all names and some styles."""
    known = sorted(set(names().values()))
    path.write_text("".join(f"{known[i % len(known)]}{STYLES[i % len(STYLES)]}\n" for i in range(count)), "utf-8")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def ray_workers(pid: int) -> list[int]:
    """The processes in which Ray runs tasks and actors in this network namespace; no agents, with which a node dies."""
    found, ours = [], os.readlink("/proc/self/ns/net")
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            name = Path(f"/proc/{process}/cmdline").read_bytes()
            if name.startswith(b"ray::") and b"Agent" not in name and os.readlink(f"/proc/{process}/ns/net") == ours:
                found.append(int(process))
        except OSError:
            continue
    return found


class Killer:
    """Runs the command in a folder and kills it, or its workers, at random moments.

    Args:
        line: the command without its folder.
        loading: seconds until a run draws. Three kills of ten come at a moment of that.
        drawing: the others come so many seconds, at most, after the first picture.
        find_workers: of the process of the command.
        seed: of the moments.
    """

    def __init__(
        self, line: list[str], loading: float, drawing: float, find_workers: Callable[[int], list[int]], seed: int
    ):
        self.line, self.loading, self.drawing = line, loading, drawing
        self.find_workers, self.random = find_workers, random.Random(seed)
        self.killed = Counter[str]()
        self.shards_then: list[int] = []  # that there were, at each kill

    def run(self, folder: Path, kills: int) -> None:
        """Run until the folder is complete, with at most so many kills."""
        run = self._start(folder)
        for _ in range(kills):
            self._wait(run, folder)
            if run.poll() is not None:
                break
            self.shards_then.append(len(list(folder.glob("*.parquet"))))
            how = self.random.choice(["group", "run", "worker", "worker"])
            found = self.find_workers(run.pid)
            if how == "worker" and found:
                os.kill(self.random.choice(found), signal.SIGKILL)
            elif how == "run":
                run.kill()
                run.wait()
            else:
                how = "group"
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
            self.killed[how] += 1
            if how != "worker":
                run = self._start(folder)
        if status := run.wait():
            raise SystemExit(f"the run has ended with status {status}")

    def _wait(self, run: subprocess.Popen[bytes], folder: Path) -> None:
        """Until a random moment, or the end of the run."""
        seconds = self.random.uniform(0, self.loading)
        if self.random.random() < 0.7:
            before = set(folder.glob(".*.partial"))
            while run.poll() is None and not set(folder.glob(".*.partial")) - before:
                time.sleep(0.01)
            seconds = self.random.uniform(0, self.drawing)
        with suppress(subprocess.TimeoutExpired):
            run.wait(seconds)

    def _start(self, folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self.line, "-o", str(folder)], start_new_session=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--per-shard", type=int, default=10)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        os.chdir(here)  # so that it is the package that is installed
        write_prompts(here / "prompts.txt", args.prompts)
        line = [sys.executable, "-m", "coalescer_fast", "generate", str(here / "prompts.txt"), "--quiet"]
        line += ["--per-shard", str(args.per_shard), "--seed", "5"]

        start = time.monotonic()
        alone = subprocess.Popen([*line, "--workers", str(args.workers), "-o", str(here / "alone")])
        loading = None
        while alone.poll() is None:
            if loading is None and list((here / "alone").glob("*.parquet")):
                loading = time.monotonic() - start
            time.sleep(0.01)
        assert alone.returncode == 0
        whole = time.monotonic() - start
        loading = whole if loading is None else loading
        print(f"undisturbed, {args.workers} workers: {whole:.0f} s, the first shard after {loading:.0f} s", flush=True)
        expected = hashes(here / "alone")
        subprocess.run([*line, "--workers", str(args.workers + 1), "-o", str(here / "more")], check=True)
        assert hashes(here / "more") == expected
        print(f"{args.workers + 1} workers: the same {len(expected)} files", flush=True)

        if args.ray:
            line += ["--ray", "local"]
        line += ["--workers", str(args.workers)]
        drawing = 2 * (whole - loading) / max(args.kills, 1)
        killer = Killer(line, loading, drawing, ray_workers if args.ray else workers, args.seed)
        rounds = 0
        while (done := killer.killed.total()) < args.kills:
            folder = here / f"killed-{rounds}"
            killer.run(folder, args.kills - done)
            assert hashes(folder) == expected, {
                name
                for name in expected.keys() | hashes(folder).keys()
                if expected.get(name) != hashes(folder).get(name)
            }
            rounds += 1
        checked = [each for each in line if each not in ("--ray", "local")]
        subprocess.run([*checked, "-o", str(folder), "--check"], check=True)
        print(f"killed {dict(killer.killed)} with {killer.shards_then} shards there, {rounds} folders: the same files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
