"""A run from its file of prompts to the last shard, and the check of what it has made."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..console import missing as said_missing
from ..schema import conform
from . import processes, prompt_file, settings, shards
from .job import Drawn, Event, Job, Ready
from .prompt_file import Prompt, PromptFile
from .settings import Count, Facts, Model, Run, Settings

LOCK = ".lock"


@dataclass
class Report:
    """What a run, or a check, has found and done.

    Attributes:
        shards: of the whole folder.
        pictures: in the whole folder.
        made: shards that this run has made.
        drawn: pictures that it has drawn for them, kept or not.
        seconds: it took.
        quality: the mean of the pictures that it has written; None where nothing says or it has written none.
        missing: shards that are not there; of a check.
        damaged: what is wrong with each damaged shard, by its number; of a check.
    """

    shards: int
    pictures: int
    made: int = 0
    drawn: int = 0
    seconds: float = 0.0
    quality: float | None = None
    missing: list[int] = field(default_factory=list)
    damaged: dict[int, str] = field(default_factory=dict)


def generate(
    prompts: str | Path,
    folder: str | Path,
    wanted: Settings | None = None,
    model: Model | None = None,
    *,
    workers: int | None = None,
    threads: int = 1,
    batch_size: int = 16,
    ray: str | None = None,
    progress: bool = False,
) -> Report:
    """Draw the prompts of a file into shards.

    Shards that are there are left as they are. Each picture's noise depends on the seed and its prompt's id alone, see
    `prompt_file.noise_number`; with the native runtime (backend "cpu") so do its bytes, for a model, a dtype and an
    instruction set.

    Args:
        prompts: a file, see `prompt_file.read`.
        folder: of the shards; made if it is not there.
        wanted: what is drawn; the defaults of `Settings` if None.
        model: what draws it; the defaults of `Model` if None.
        workers: processes, or actors of Ray; if None one for each core that this process may use, by threads, or one
            where something else than cores draws.
        threads: of a worker.
        batch_size: pictures that a worker draws together.
        ray: the address of a Ray cluster, "auto" for that of the environment, or "local" for one on this machine; None
            draws without Ray.
        progress: show a bar.

    Returns:
        What was made.

    Raises:
        ValueError: for a file of prompts that is wrong, settings that are not those of the folder, a folder in use by
            another run, and what fails in a worker.
        OSError: for a folder that cannot be written.
    """
    _require("pyarrow")
    if ray is not None:
        _require("ray")
    for name, number in (("workers", workers), ("threads", threads), ("batch_size", batch_size)):
        conform(number, Count | None if name == "workers" else Count, name)
    started = time.perf_counter()
    wanted = wanted or Settings()
    source = prompt_file.read(prompts, wanted.prompt_column, wanted.id_column, wanted.pictures)
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(folder, wanted, model or Model(), batch_size, threads)
    with _locked(folder):
        shards.sweep(folder)
        before = _before(folder)
        if before is not None:  # what the model says is compared when it is loaded
            settings.check_same(folder, before, settings.run_of(source, wanted, before.facts))
        count = _shard_count(source, wanted)
        missing = [shard for shard in range(count) if not shards.is_there(folder, shard)]
        report = Report(count, len(source) * wanted.kept)
        graded, quality = 0, 0.0
        try:
            with (
                _bar(source, wanted, missing, progress) as bar,
                closing(_events(job, missing, source, workers, ray)) as events,
            ):
                for event in events:
                    if isinstance(event, Ready):
                        now = settings.run_of(source, wanted, event.facts)
                        if before is None:
                            settings.write(folder, before := now)
                        settings.check_same(folder, before, now)
                        if not report.made:
                            bar.unpause()  # the rate is that of drawing
                    elif isinstance(event, Drawn):
                        bar.update(event.pictures)
                    else:
                        report.made += 1
                        report.drawn += event.pictures
                        graded, quality = graded + event.graded, quality + event.quality
        finally:
            shards.sweep(folder)
    report.seconds = time.perf_counter() - started
    report.quality = quality / graded if graded else None
    return report


def check(prompts: str | Path, folder: str | Path, wanted: Settings | None = None, *, progress: bool = False) -> Report:
    """Read every byte of a folder of shards. The next run makes damaged ones again: their Parquet file is removed.

    Args:
        prompts: as in `generate`.
        folder: as in `generate`.
        wanted: as in `generate`.
        progress: show a bar.

    Returns:
        What is missing or damaged.

    Raises:
        ValueError: see `generate`, and for a folder without ``run.json``.
    """
    _require("pyarrow")
    from importlib.metadata import version

    from tqdm import tqdm

    started = time.perf_counter()
    wanted = wanted or Settings()
    source = prompt_file.read(prompts, wanted.prompt_column, wanted.id_column, wanted.pictures)
    folder = Path(folder).absolute()
    before = settings.read(folder) if folder.is_dir() else None
    if before is None:
        raise ValueError(f"{folder} has no {settings.RUN_FILE}: name the folder of a run")
    with _locked(folder):
        here = {**before.facts, "pyarrow version": version("pyarrow")}  # which writes the bytes that are compared
        settings.check_same(folder, before, settings.run_of(source, wanted, here))
        count = _shard_count(source, wanted)
        report = Report(count, len(source) * wanted.kept)
        for shard in tqdm(range(count), "check", unit="shard", delay=1.0, disable=not progress):
            parts = [(folder / f"{shards.name(shard)}.{ending}").exists() for ending in ("tar", "parquet")]
            if not all(parts):
                report.missing.append(shard)
            elif reason := shards.damage(folder, shard, _rows(source, wanted, shard), wanted):
                report.damaged[shard] = reason
                shards.withdraw(folder, shard)
    report.seconds = time.perf_counter() - started
    return report


def _events(
    job: Job, missing: list[int], source: PromptFile, workers: int | None, ray: str | None
) -> Generator[Event, None, None]:
    def rows(shard: int) -> list[Prompt]:
        return _rows(source, job.settings, shard)

    if ray is not None:
        from . import ray_data

        return ray_data.run(job, missing, rows, workers, ray)

    def count(facts: Facts | None) -> int:
        if workers is not None:
            return workers
        drawn_by_cores = facts is not None and facts["runtime"] == "cpu"
        return max(_cores() // job.threads, 1) if drawn_by_cores else 1

    return processes.run(job, missing, rows, count)


def _rows(source: PromptFile, wanted: Settings, shard: int) -> list[Prompt]:
    return source.rows(shard * wanted.per_shard, (shard + 1) * wanted.per_shard)


def _shard_count(source: PromptFile, wanted: Settings) -> int:
    return -(-len(source) // wanted.per_shard)


def _before(folder: Path) -> Run | None:
    """The run that the folder was begun with; None for one that has no shards yet."""
    if not shards.any_there(folder):
        return None
    found = settings.read(folder)
    if found is None:
        raise ValueError(f"{folder} holds shards without the {settings.RUN_FILE} of a run: name another folder")
    return found


@contextmanager
def _bar(source: PromptFile, wanted: Settings, missing: list[int], progress: bool) -> Iterator[Any]:
    from tqdm import tqdm

    total = len(source) * wanted.pictures
    left = sum(len(_rows(source, wanted, shard)) for shard in missing) * wanted.pictures
    with tqdm(
        total=total, initial=total - left, unit=" pictures", desc="generate", disable=not progress, smoothing=0.05
    ) as bar:
        yield bar


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Inside, no other run uses the folder."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{folder} is in use by another run: let it end, or name another folder") from None
    try:
        yield
    finally:
        lock.release()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _require(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ImportError(said_missing(package))
