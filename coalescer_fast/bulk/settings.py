"""What decides the bytes of a run, and ``run.json``, which holds it and refuses to go on with something else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from .. import files
from ..schema import Rule, Sha256, between, build, conform, table
from .prompt_file import MOST_PICTURES, PromptFile

RUN_FILE = "run.json"
FORMAT = 2
Count = Annotated[int, between(1, 1_000_000)]
Steps = Annotated[int | str, Rule(lambda steps: steps == "auto" or (type(steps) is int and steps > 0), "steps or auto")]


@dataclass(frozen=True)
class Model:
    """What draws.

    Attributes:
        name: an embedded model, a folder or a Hub id.
        backend: what runs the networks, as in `accelerate`; None for the reference.
        dtype: what they compute in, as in `accelerate`.
        artefact: a folder that coalescer-export wrote.
    """

    name: str = "emoji-64"
    backend: str | None = "auto"
    dtype: str | None = "auto"
    artefact: Path | None = None


@dataclass(frozen=True)
class Settings:
    """What is drawn, and how it is cut into shards.

    Attributes:
        seed: of the noise, with the prompt's id and the picture's number.
        pictures: drawn of each prompt.
        keep_best: so many of them are kept, those of the best quality; None keeps all.
        num_inference_steps: as in a call of the pipeline.
        guidance_scale: as in a call.
        negative_prompt: as in a call, the same for all prompts.
        prompt_matching: as in a call.
        per_shard: prompts a shard.
        prompt_column: of the file of prompts.
        id_column: of the file of prompts, or None for "id" where there is one.

    Raises:
        ValueError: for other values.
    """

    seed: Annotated[int, between(0, 2**64 - 1)] = 0
    pictures: Annotated[int, between(1, MOST_PICTURES)] = 1
    keep_best: Annotated[int, between(1, MOST_PICTURES)] | None = None
    num_inference_steps: Steps = 2
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    prompt_matching: bool = True
    per_shard: Count = 1000
    prompt_column: str = "prompt"
    id_column: str | None = None

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            conform(getattr(self, name), hint, name)
        if self.kept > self.pictures:
            raise ValueError(
                f"keep_best is {self.kept} and pictures of a prompt are {self.pictures}: draw more, or keep fewer"
            )

    @property
    def kept(self) -> int:
        """Pictures of a prompt that are written."""
        return self.pictures if self.keep_best is None else self.keep_best


Facts = dict[str, str]  # what else the bytes depend on, such as the model's hash, by name


@dataclass(frozen=True)
class Run:
    """What ``run.json`` holds.

    Attributes:
        format: of the folder.
        input_sha256: of the file of prompts.
        prompts: how many it holds.
        settings: of the run.
        facts: of the model and of what computed.
    """

    format: int
    input_sha256: Sha256
    prompts: int
    settings: Settings
    facts: dict[str, str]


def run_of(prompts: PromptFile, settings: Settings, facts: Facts) -> Run:
    """What the run file of this run holds."""
    return Run(FORMAT, prompts.sha256, len(prompts), settings, dict(sorted(facts.items())))


def write(folder: Path, run: Run) -> None:
    """Write ``run.json``."""
    files.write_text(folder / RUN_FILE, json.dumps(table(run), indent=2) + "\n")


def read(folder: Path) -> Run | None:
    """Read ``run.json``; None if there is none. Raises ValueError for a damaged one."""
    path = folder / RUN_FILE
    try:
        content = path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: name another folder, or restore the file") from error
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
        run: Run = build(found, Run)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!s:.200}): name another folder, or restore the file") from error
    return run


def check_same(folder: Path, before: Run, now: Run) -> None:
    """Raise ValueError, which names the first difference, unless a run may go on."""
    old, new = _flat(before), _flat(now)
    for name in dict.fromkeys((*old, *new)):
        if old.get(name) != new.get(name):
            was, is_now = (_shown(values.get(name)) for values in (old, new))
            raise ValueError(
                f"{folder} was begun with {name.replace('_', ' ')} {was}, and here it is {is_now}: go on with what it "
                "was begun with, or name another folder"
            )


def _flat(run: Run) -> dict[str, Any]:
    of_input = {"format": run.format, "prompts of SHA-256": run.input_sha256, "number of prompts": run.prompts}
    return {**of_input, **table(run.settings), **run.facts}


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value!s:.80}"
