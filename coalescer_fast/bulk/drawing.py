"""What a worker does: load the model, and draw the prompts of a shard."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import platform
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image

from .. import __version__
from ..acceleration import accelerate
from ..console import open_pipeline
from ..noise import PhiloxGenerator
from ..ops import native_library
from ..runtime.eager import EagerRuntime
from ..runtime.engines.artefact import file_sha256
from ..runtime.engines.hashes import network_sha256
from . import shards
from .job import Job, Made
from .prompt_file import Prompt, noise_number
from .settings import Facts
from .shards import Sample


class Drawer:
    """A pipeline that draws shards.

    Args:
        job: what is wanted.

    Attributes:
        facts: what the bytes depend on beside the settings.

    Raises:
        ValueError: for a model that cannot be loaded, and for settings that it cannot follow.
    """

    def __init__(self, job: Job):
        self.job = job
        torch.set_num_threads(job.threads)
        # each unknown word of millions of prompts; the quality of the picture says it as well
        logging.getLogger("coalescer_fast.prompts").setLevel(logging.ERROR)
        model = job.model
        self.pipe = open_pipeline(model.name)
        self.pipe.set_progress_bar_config(disable=True)
        if model.backend is not None or model.dtype is not None or model.artefact is not None:
            accelerate(self.pipe, model.backend or "auto", model.dtype or "auto", model.artefact)
        if job.settings.keep_best is not None and self.pipe.scheduler.config.grading is None:
            raise ValueError(f"keep_best needs the quality of pictures, which {model.name} does not tell: leave it out")
        self.facts = self._facts()

    def _facts(self) -> Facts:
        pipe, runtime = self.pipe, self.pipe.runtime
        digest = hashlib.sha256()
        for network in (pipe.unet, pipe.description_encoder, pipe.vae):
            digest.update(network_sha256(network, network.config).encode())
        public = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
        digest.update(json.dumps(public, sort_keys=True, default=str).encode())
        facts = {"model of SHA-256": digest.hexdigest(), "runtime": runtime.name, "dtype": str(runtime.precision)}
        if self.job.model.artefact is not None:
            manifests = sorted(self.job.model.artefact.rglob("manifest.json"))
            facts["artefact of SHA-256"] = " ".join(map(file_sha256, manifests))
        if runtime.name == "cpu":
            facts["instruction set"] = native_library.isa()
        else:  # elsewhere the bits of a picture may depend on what is drawn with it, and on the machine
            facts["batch size"] = str(self.job.batch_size)
            cuda = runtime.device.type == "cuda"
            facts["device"] = torch.cuda.get_device_name(runtime.device) if cuda else platform.machine()
            if isinstance(runtime, EagerRuntime):
                facts["threads"] = str(self.job.threads)
        facts["coalescer_fast version"] = __version__
        for package in ("torch", "numpy", "pillow", "pyarrow"):
            facts[f"{package} version"] = version(package)
        return facts

    def make(self, shard: int, rows: list[Prompt], drawn: Callable[[int], object] = lambda pictures: None) -> Made:
        """Draw and write a shard.

        Args:
            shard: its number.
            rows: its prompts.
            drawn: told of each batch how many pictures it had.

        Returns:
            What was made.

        Raises:
            OSError, ValueError: see `files.writing`, and a call of the pipeline.
        """
        records = shards.write(self.job.folder, shard, self._samples(rows, drawn))
        qualities = [record["quality"] for record in records if record["quality"] is not None]
        return Made(shard, len(rows) * self.job.settings.pictures, len(qualities), sum(qualities))

    def _samples(self, rows: list[Prompt], drawn: Callable[[int], object]) -> Iterator[Sample]:
        """The samples of a shard: by prompt, and of a prompt by the number of the picture."""
        settings = self.job.settings
        for _, group in itertools.groupby(self._pictures(rows, drawn), key=lambda each: each[0]["id"]):
            kept = list(group)
            if settings.keep_best is not None:
                if any(record["quality"] is None for record, _ in kept):
                    raise ValueError(
                        "keep_best needs the quality of pictures, which this artefact does not tell: leave it out"
                    )
                best = sorted(kept, key=lambda each: -each[0]["quality"])[: settings.keep_best]
                kept = sorted(best, key=lambda each: each[0]["picture"])
            for record, picture in kept:
                file = io.BytesIO()
                picture.save(file, "PNG")
                png = file.getvalue()
                record |= {"width": picture.width, "height": picture.height, "sha256": hashlib.sha256(png).hexdigest()}
                yield Sample(record, png)

    def _pictures(
        self, rows: list[Prompt], drawn: Callable[[int], object]
    ) -> Iterator[tuple[dict[str, Any], Image.Image]]:
        each = ((row, picture) for row in rows for picture in range(self.job.settings.pictures))
        for batch in _batches(each, self.job.batch_size):
            yield from self._draw(batch)
            drawn(len(batch))

    def _draw(self, batch: list[tuple[Prompt, int]]) -> Iterator[tuple[dict[str, Any], Image.Image]]:
        settings, pipe = self.job.settings, self.pipe
        numbers = [noise_number(row.number, picture) for row, picture in batch]
        generators: Any = [PhiloxGenerator(settings.seed, picture=number) for number in numbers]
        texts = [row.text for row, _ in batch]
        out: Any = pipe(
            texts,
            generator=generators,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            negative_prompt=settings.negative_prompt,
            prompt_matching=settings.prompt_matching,
        )
        for i, (row, picture) in enumerate(batch):
            match = None if out.matched is None else out.matched[i]
            yield (
                {
                    "key": shards.key(row.row, picture, settings),
                    "id": row.id,
                    "prompt": row.text,
                    "picture": picture,
                    "seed": settings.seed,
                    "noise": numbers[i],
                    "drawn": out.descriptions[i],
                    "matched": None if match is None else match.name,
                    "similarity": None if match is None else match.similarity,
                    "quality": None if out.quality is None else out.quality[i],
                },
                out.images[i],
            )


def _batches(items: Iterable[tuple[Prompt, int]], size: int) -> Iterator[list[tuple[Prompt, int]]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
