"""From a random R to latents: the loop of a call, the same for whatever runs the networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .finite import is_finite
from .models.unet import Conditioning
from .nvtx_ranges import span
from .scheduler import CoalescerScheduler, guide

OnStep = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Networks(Protocol):
    """What a step needs: an evaluation of the UNet, and the backend of the update. Every `Runtime` has it.

    Attributes:
        backend: of `ops.coalesce_step`.
    """

    @property
    def backend(self) -> str: ...

    def evaluate(self, sample: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass
class Call:
    """The state of one call of a pipeline, which a callback may change.

    Attributes:
        guidance_scale: of the steps to come, 1 for none.
        num_timesteps: number of steps of the whole call.
        interrupt: whether the call ends here, with the R that it has.
        progress: called with the number of steps that have been done since it was called last.
    """

    guidance_scale: float
    num_timesteps: int
    interrupt: bool = False
    progress: Callable[[int], object] = field(default=lambda steps: None, repr=False)


def sample(
    networks: Networks,
    scheduler: CoalescerScheduler,
    sample: torch.Tensor,
    conditioning: Conditioning,
    empty: Conditioning | None,
    guidance_scale: float | torch.Tensor,
    on_step: OnStep | None = None,
    call: Call | None = None,
) -> torch.Tensor:
    """R after ``scheduler``'s steps: evaluate, guide where the scheduler says so, move.

    Args:
        networks: has ``evaluate(R, conditioning)``, direction and distance, and ``backend``, of the update.
        scheduler: with its steps set.
        sample: R, (N, C, h, w).
        conditioning, empty: of the descriptions, N rows; of the empty description, N rows or one, None for no guidance.
        guidance_scale: see `guide`; `Call.guidance_scale` in its place where there is a call.
        on_step: called after each step as (step, R before it, direction before guidance, distance, R after it); gives the R to go on from.
        call: read before each step; where its guidance is 1, the empty description is not evaluated.
    """
    if empty is not None:
        empty = empty.expand(sample.shape[0])
    for i in scheduler.timesteps.tolist():
        if call is not None:
            if call.interrupt:
                break
            guidance_scale = call.guidance_scale
        guided = scheduler.is_guided(i) and (call is None or call.guidance_scale != 1)
        with span(f"evaluate[{i}]"):
            direction, distance = networks.evaluate(sample, conditioning)
        towards = direction
        if guided and empty is not None:
            with span(f"evaluate_empty[{i}]"):
                empty_direction, empty_distance = networks.evaluate(sample, empty)
            towards = guide(direction, distance, empty_direction, empty_distance, guidance_scale)
        moved = scheduler.step(towards, distance, i, sample, return_dict=False, backend=networks.backend)[0]
        sample = moved if on_step is None else on_step(i, sample, direction, distance, moved)
        if call is not None:
            call.progress(1)
    return sample


def first_bad_step(
    networks: Networks,
    scheduler: CoalescerScheduler,
    start: torch.Tensor,
    conditioning: Conditioning,
    empty: Conditioning | None,
    guidance_scale: float,
) -> int | None:
    """The first step of `sample` after which R is not finite, found by going them all again, or None."""
    call, found = Call(guidance_scale, len(scheduler.timesteps)), []

    def on_step(
        i: int, before: torch.Tensor, direction: torch.Tensor, distance: torch.Tensor, after: torch.Tensor
    ) -> torch.Tensor:
        if not is_finite(after):
            found.append(i)
            call.interrupt = True
        return after

    sample(networks, scheduler, start, conditioning, empty, guidance_scale, on_step, call)
    return found[0] if found else None
