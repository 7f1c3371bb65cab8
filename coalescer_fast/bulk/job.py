"""What a run and its workers tell each other. Needs no torch, which the run itself does without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .settings import Facts, Model, Settings


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know.

    Attributes:
        folder: of the shards.
        settings: of the run.
        model: what draws.
        batch_size: pictures of a call of the pipeline.
        threads: of a worker.
    """

    folder: Path
    settings: Settings
    model: Model
    batch_size: int
    threads: int


@dataclass(frozen=True)
class Ready:
    """A worker has loaded the model.

    Attributes:
        facts: what it says of it.
    """

    facts: Facts


@dataclass(frozen=True)
class Drawn:
    """Pictures of a shard are drawn.

    Attributes:
        pictures: how many, kept or not; fewer than none where a worker has died and they are drawn again.
    """

    pictures: int


@dataclass(frozen=True)
class Made:
    """A shard is written.

    Attributes:
        shard: its number.
        pictures: drawn for it, kept or not.
        graded: pictures in it whose quality is known.
        quality: the sum of their qualities.
    """

    shard: int
    pictures: int
    graded: int
    quality: float


Event = Ready | Drawn | Made
