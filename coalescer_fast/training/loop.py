"""The optimizer loop that all trainings share: schedule, EMA, checkpoints, exact resume, several processes.

Every random draw of a training is a function of (seed, step, process), see `generator`: a checkpoint needs no random
state, and a run that was killed and resumed takes the same steps as one that was not.
"""

from __future__ import annotations

import copy
import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from . import checkpoint
from .checkpoint import Checkpoint

# fields of `Schedule` that decide what is kept and not what is learnt
KEEPING = ("checkpoint_every", "sample_every")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a network is trained.

    The learning rate rises linearly, stays flat, and then falls by a cosine.

    Attributes:
        steps: of the training.
        batch_size: of one process.
        learning_rate: the largest.
        warmup_steps: over which the learning rate rises.
        decay_from: share of ``steps`` after which it falls.
        final_learning_rate: share of ``learning_rate`` that it falls to.
        weight_decay, betas: of AdamW.
        max_grad_norm: that gradients are clipped to; 0 for no clipping.
        ema_decay: of the averaged weights.
        checkpoint_every: steps between checkpoints.
        sample_every: steps between sample sheets.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    decay_from: float = 0.5
    final_learning_rate: float = 0.01
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998
    checkpoint_every: int = 512
    sample_every: int = 2048

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "sample_every"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a whole number from 1 to 2^31 - 1")
        ranges = {
            "learning_rate": (0, math.inf),
            "warmup_steps": (0, math.inf),
            "decay_from": (0, 1),
            "final_learning_rate": (0, 1),
            "weight_decay": (0, math.inf),
            "max_grad_norm": (0, math.inf),
            "ema_decay": (0, 1),
        }
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; expected a number from {least} {'up' if most > 1 else 'to 1'}"
                )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; expected two numbers from 0 to below 1")

    def rate(self, step: int) -> float:
        """The learning rate of ``step`` (from 0)."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        progress = max(0.0, step / self.steps - self.decay_from) / max(1e-9, 1 - self.decay_from)
        decay = self.final_learning_rate + (1 - self.final_learning_rate) * (0.5 + 0.5 * math.cos(math.pi * progress))
        return self.learning_rate * warm * decay


class EMA:
    """Exponential moving average of a network's parameters; its buffers are copied.

    The decay of update n is at most (1 + n) / (10 + n).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = [
            (mine, theirs.detach())
            for mine, theirs in zip(self.model.parameters(), model.parameters())
            if theirs.requires_grad
        ]
        torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers()):
            mine.copy_(theirs)


def generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator whose seed is a hash of the seed and a key, such as (step, process)."""
    # torch uses 32 bits of a seed
    digest = hashlib.blake2b(struct.pack(f"<{1 + len(key)}q", seed, *key), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def make_accelerator() -> Accelerator:
    """HF accelerate with bf16 autocast, on the GPU if there is one; with several processes if they were launched."""
    return Accelerator(mixed_precision="bf16", cpu=not torch.accelerator.is_available())


class Trainer:
    """Takes the optimizer steps of a training, and keeps a checkpoint to resume from.

    The checkpoint ``output_dir/<name>.pt`` has weights, averaged weights, the optimizer's state, the step and the
    settings that decide the training. It is written atomically, after steps that are multiples of
    ``schedule.checkpoint_every`` and after the last. A training is not resumed with other settings.

    Args:
        name: of the checkpoint and of the progress bar.
        model: the network.
        schedule: how long and how fast it is trained.
        output_dir: folder of the checkpoint.
        accelerator: device, precision and processes.
        seed: of all random draws.
        settings: what decides the training besides schedule, seed and number of processes, such as a hash of the data.
        allow_changes: resume with other settings all the same.
        progress: show a bar.

    Raises:
        ValueError: for a checkpoint that is damaged, or of another model, or of other settings.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        schedule: Schedule,
        output_dir: Path,
        accelerator: Accelerator,
        seed: int = 0,
        *,
        settings: Mapping[str, Any] | None = None,
        allow_changes: bool = False,
        progress: bool = True,
    ):
        self.name, self.schedule, self.accelerator, self.seed = name, schedule, accelerator, seed
        self.allow_changes, self.progress = allow_changes, progress
        lasting = {key: value for key, value in asdict(schedule).items() if key not in KEEPING}
        self.settings = checkpoint.flat(
            {"schedule": lasting, "seed": seed, "processes": accelerator.num_processes, **(settings or {})}
        )
        self.path = output_dir / f"{name}.pt"
        self.step = 0
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, schedule.learning_rate, weight_decay=schedule.weight_decay, betas=schedule.betas, fused=True
        )
        self.ema = EMA(model.to(accelerator.device), schedule.ema_decay)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if self.path.exists():
            self._load()
        self.first_step = self.step

    @property
    def finished(self) -> bool:
        return self.step >= self.schedule.steps

    def generator(self, *key: int) -> torch.Generator:
        """The generator of ``key`` on this process."""
        return generator(self.seed, *key, self.accelerator.process_index)

    def run(
        self,
        loss: Callable[[nn.Module, int], tuple[torch.Tensor, dict[str, float]]],
        on_sample: Callable[[nn.Module, int], None] | None = None,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
    ) -> nn.Module:
        """Minimize a loss.

        Args:
            loss: (model, step) -> the loss, a scalar, and figures for the progress bar.
            on_sample: is called with the averaged network and the step every ``schedule.sample_every`` steps.
            on_step: is called after every step, with its number and its figures, the loss among them.

        Returns:
            The averaged network.
        """
        schedule = self.schedule
        shows = self.progress and self.accelerator.is_main_process
        bar = tqdm(
            total=schedule.steps, initial=self.step, desc=self.name, disable=not shows, mininterval=2.0, delay=1.0
        )
        self.model.train()
        shown: dict[str, float] = {}
        while not self.finished:
            for group in self.optimizer.param_groups:
                group["lr"] = schedule.rate(self.step)
            value, figures = loss(self.model, self.step)
            if not math.isfinite(value.item()):
                said = f"the loss of {self.name} is {value.item()} at step {self.step + 1}"
                raise ValueError(f"{said}: lower learning_rate, or look at the data")
            self.optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(value)
            if schedule.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.model.parameters(), schedule.max_grad_norm)
            self.optimizer.step()
            self.ema.update(self.accelerator.unwrap_model(self.model))
            self.step += 1
            figures = {"loss": float(value.detach()), **figures}
            if on_step:
                on_step(self.step, figures)
            for key, figure in figures.items():
                shown[key] = figure if key not in shown else 0.98 * shown[key] + 0.02 * figure
            bar.set_postfix({key: f"{figure:.4f}" for key, figure in shown.items()}, refresh=False)
            bar.update()
            if self.step % schedule.checkpoint_every == 0 or self.finished:
                self._save()
            if (
                on_sample
                and self.accelerator.is_main_process
                and (self.step % schedule.sample_every == 0 or self.finished)
            ):
                on_sample(self.ema.model, self.step)
        bar.close()
        self.optimizer.zero_grad(set_to_none=True)  # or the gradients would count when another part is clipped
        return self.ema.model

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        Checkpoint(
            self.step,
            self.ema.updates,
            self.settings,
            self.accelerator.unwrap_model(self.model).state_dict(),
            self.ema.model.state_dict(),
            self.optimizer.state_dict(),
        ).write(self.path)

    def _load(self) -> None:
        found = checkpoint.read(self.path)
        fix = "train into another folder"
        if not self.allow_changes and (what := checkpoint.difference(found.settings, self.settings)):
            words = "add --allow-changes (allow_changes=True) to go on all the same"
            raise ValueError(f"{self.path} was trained with {what}: {fix}, or {words}")
        if found.step > self.schedule.steps:
            where = f"{self.path} is at step {found.step} of a schedule of {self.schedule.steps}"
            raise ValueError(f"{where}: give more steps, or {fix}")
        try:
            self.accelerator.unwrap_model(self.model).load_state_dict(found.model)
            self.ema.model.load_state_dict(found.ema)
            self.optimizer.load_state_dict(found.optimizer)
            self._check_optimizer()
        except Exception as error:  # torch's for a state of another shape are of every kind
            raise ValueError(f"{self.path} was written for another model: {fix}, or remove it") from error
        self.ema.updates = found.ema_updates
        self.step = found.step

    def _check_optimizer(self) -> None:
        """Raise ValueError unless the optimizer has moments for all of its parameters, or for none."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = [self.optimizer.state[p] for p in parameters if p in self.optimizer.state]
        moments = [(state["exp_avg"].shape, state["exp_avg_sq"].shape, state["step"].numel()) for state in states]
        if states and moments != [(p.shape, p.shape, 1) for p in parameters]:
            raise ValueError("the state of the optimiser does not fit")
