"""The optimiser loop that every training shares: schedule, EMA, checkpoints, exact resume, several processes.

Every random draw of a training is a function of (seed, step, process), see `generator`: a checkpoint needs no random state, and a run
that was killed and resumed takes the same steps as one that was not.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a network is trained.

    The learning rate rises linearly over ``warmup_steps``, stays flat, and from ``decay_from`` (a share of ``steps``) on falls by a
    cosine to ``final_learning_rate`` (a share of ``learning_rate``). ``batch_size`` is that of one process.
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
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a whole number from 1 up")

    def rate(self, step: int) -> float:
        """The learning rate of ``step`` (from 0)."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        progress = max(0.0, step / self.steps - self.decay_from) / max(1e-9, 1 - self.decay_from)
        decay = self.final_learning_rate + (1 - self.final_learning_rate) * (0.5 + 0.5 * math.cos(math.pi * progress))
        return self.learning_rate * warm * decay


class EMA:
    """Exponential moving average of a network's parameters, its buffers copied; the decay warms up as (1 + n) / (10 + n)."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = [(mine, theirs.detach()) for mine, theirs in zip(self.model.parameters(), model.parameters()) if theirs.requires_grad]
        torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers()):
            mine.copy_(theirs)


def generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator that is a function of the seed and of a key, such as (step, process), through a hash that keeps all apart."""
    digest = hashlib.blake2b(struct.pack(f"<{1 + len(key)}q", seed, *key), digest_size=4).digest()  # of a seed, torch uses 32 bits
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def make_accelerator() -> Accelerator:
    """HF accelerate's device, precision (bf16 autocast) and processes; on a machine without a GPU, torchrun's processes too."""
    return Accelerator(mixed_precision="bf16", cpu=not torch.accelerator.is_available())


class Trainer:
    """Runs ``schedule.steps`` optimiser steps of ``model`` and keeps ``output_dir/<name>.pt`` to resume from.

    A checkpoint holds weights, averaged weights, optimiser state and the step, is written atomically and only between steps that are
    multiples of ``schedule.checkpoint_every``.
    """

    def __init__(self, name: str, model: nn.Module, schedule: Schedule, output_dir: Path, accelerator: Accelerator, seed: int = 0):
        self.name, self.schedule, self.accelerator, self.seed = name, schedule, accelerator, seed
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
    ) -> nn.Module:
        """Minimise ``loss(model, step)`` and return the averaged network; ``on_sample(averaged, step)`` draws sheets now and then."""
        schedule = self.schedule
        bar = tqdm(total=schedule.steps, initial=self.step, desc=self.name, disable=not self.accelerator.is_main_process, mininterval=2.0)
        self.model.train()
        shown: dict[str, float] = {}
        while not self.finished:
            for group in self.optimizer.param_groups:
                group["lr"] = schedule.rate(self.step)
            value, figures = loss(self.model, self.step)
            self.optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(value)
            if schedule.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.model.parameters(), schedule.max_grad_norm)
            self.optimizer.step()
            self.ema.update(self.accelerator.unwrap_model(self.model))
            self.step += 1
            for key, figure in {"loss": float(value.detach()), **figures}.items():
                shown[key] = figure if key not in shown else 0.98 * shown[key] + 0.02 * figure
            bar.set_postfix({key: f"{figure:.4f}" for key, figure in shown.items()}, refresh=False)
            bar.update()
            if self.step % schedule.checkpoint_every == 0 or self.finished:
                self._save()
            if on_sample and self.accelerator.is_main_process and (self.step % schedule.sample_every == 0 or self.finished):
                on_sample(self.ema.model, self.step)
        bar.close()
        self.optimizer.zero_grad(set_to_none=True)  # a network trained in parts must not clip the next part by these
        return self.ema.model

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "ema_updates": self.ema.updates,
            "schedule": asdict(self.schedule),
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def _load(self) -> None:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
            raise ValueError(f"{self.path} is damaged: remove it to begin anew") from error
        try:
            self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
            self.ema.model.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self.path} was written for another model: train into another folder, or remove it") from error
        self.ema.updates = state["ema_updates"]
        self.step = state["step"]
