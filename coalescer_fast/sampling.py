"""From noise to latents: the noise, and the loop of a call, which is the same whatever runs the networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor

from .finite import check_readable, is_finite
from .grading import HEADS, Heads, direction_length
from .models.unet import Conditioning
from .noise import PhiloxGenerator, draw
from .nvtx_ranges import span
from .scheduler import LARGEST, CoalescerScheduler, guide

Generator = torch.Generator | PhiloxGenerator
Generators = Generator | list[Generator] | None
# (step, R before it, direction before guidance, distance, R after it) -> the R to go on from
OnStep = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Networks(Protocol):
    """What a step needs; every `Runtime` has it.

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
        heads: |direction| and distance of the first `HEADS` evaluations, before guidance, where the runtime sees them;
            NaN for a picture that has arrived before.
        evaluations: of the network so far, for each picture or all of them; 0 where the runtime does not say.
    """

    guidance_scale: float
    num_timesteps: int
    interrupt: bool = False
    progress: Callable[[int], object] = field(default=lambda steps: None, repr=False)
    heads: list[Heads] = field(default_factory=list, repr=False)
    evaluations: int | torch.Tensor = 0


def sample(
    networks: Networks,
    scheduler: CoalescerScheduler,
    sample: torch.Tensor,
    conditioning: Conditioning,
    empty: Conditioning | None,
    guidance_scale: float | torch.Tensor,
    on_step: OnStep | None = None,
    call: Call | None = None,
    heads: list[Heads] | None = None,
) -> torch.Tensor:
    """Run the steps: evaluate, guide where the scheduler says so, move.

    Args:
        networks: evaluates the UNet.
        scheduler: with its steps set.
        sample: R (N, C, h, w).
        conditioning: of N descriptions.
        empty: of the empty or the negative description, N rows or one; None without guidance.
        guidance_scale: see `guide`. Where there is a call, its guidance scale counts instead.
        on_step: called after each step with (step, R before it, direction before guidance, distance, R after it);
            returns the R to go on from.
        call: read before each step, and told of it. Where its guidance scale is 1, ``empty`` is not evaluated.
        heads: where there is no call, the list that takes the place of its ``heads``.

    Returns:
        R (N, C, h, w) after the last step.
    """
    if empty is not None:
        empty = empty.expand(sample.shape[0])
    if scheduler.is_auto:
        call = call or Call(float(guidance_scale), len(scheduler.timesteps))
        return _sample_until_arrival(networks, scheduler, sample, conditioning, empty, call)
    if call is not None:
        heads = call.heads
    for i in scheduler.timesteps.tolist():
        if call is not None:
            if call.interrupt:
                break
            guidance_scale = call.guidance_scale
        guided = scheduler.is_guided(i) and (call is None or call.guidance_scale != 1)
        with span(f"evaluate[{i}]"):
            direction, distance = networks.evaluate(sample, conditioning)
        if heads is not None and len(heads) < HEADS:
            heads.append((direction_length(direction), distance))
        towards = direction
        if guided and empty is not None:
            with span(f"evaluate_empty[{i}]"):
                empty_direction, empty_distance = networks.evaluate(sample, empty)
            towards = guide(direction, distance, empty_direction, empty_distance, guidance_scale)
        moved = scheduler.step(towards, distance, i, sample, return_dict=False, backend=networks.backend)[0]
        sample = moved if on_step is None else on_step(i, sample, direction, distance, moved)
        if call is not None:
            call.evaluations += 1 + (guided and empty is not None)
            call.progress(1)
    return sample


def _sample_until_arrival(
    networks: Networks,
    scheduler: CoalescerScheduler,
    sample: torch.Tensor,
    conditioning: Conditioning,
    empty: Conditioning | None,
    call: Call,
) -> torch.Tensor:
    """`sample` with "auto": each step is computed for the pictures that have not arrived."""
    rows = torch.arange(len(sample), dtype=torch.int64, device=sample.device)
    evaluations = torch.zeros(len(sample), dtype=torch.int64, device=sample.device)
    last, sample = len(scheduler.timesteps) - 1, sample.clone()
    for i in scheduler.timesteps.tolist():
        if call.interrupt or not len(rows):
            break
        with span(f"evaluate[{i}]"):
            direction, distance = networks.evaluate(sample[rows], conditioning.take(rows, len(sample)))
        if i < HEADS:
            heads = direction_length(direction), distance
            call.heads.append(tuple(x.new_full((len(sample),), torch.nan).index_copy(0, rows, x) for x in heads))  # type: ignore[arg-type]
        evaluations[rows] += 1
        arrived = (distance < scheduler.config.arrival_distance) | (i == last)
        for some, step in ((~arrived, i), (arrived, last)):
            if not some.any():
                continue
            mine, towards = rows[some], direction[some]
            if empty is not None and call.guidance_scale != 1 and scheduler.is_guided(step):
                with span(f"evaluate_empty[{i}]"):
                    away = networks.evaluate(sample[mine], empty.take(mine, len(sample)))
                towards = guide(towards, distance[some], *away, call.guidance_scale)
                evaluations[mine] += 1
            sample[mine] = scheduler.step(
                towards, distance[some], step, sample[mine], return_dict=False, backend=networks.backend
            )[0]
        rows = rows[~arrived]
        call.progress(1)
    call.evaluations = evaluations
    return sample


def first_bad_step(
    networks: Networks,
    scheduler: CoalescerScheduler,
    start: torch.Tensor,
    conditioning: Conditioning,
    empty: Conditioning | None,
    guidance_scale: float,
) -> int | None:
    """Find the first step of `sample` after which R is not finite, by running the steps again.

    Returns:
        Its index, or None if there is none.
    """
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


def initial_sample(
    shape: tuple[int, ...], device: torch.device, generator: Generators = None, latents: torch.Tensor | None = None
) -> torch.Tensor:
    """The R that a call begins with: its latents, or noise.

    Args:
        shape: (N, C, h, w).
        device: of the result.
        generator: one for all, or a list of one a sample.
        latents: R of this shape, in any floating-point dtype.

    Returns:
        R (N, C, h, w), float32.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if latents is None:
        _check_generator(generator, shape[0])
        several = generator if isinstance(generator, list) else [generator] * shape[0]
        philox = [one for one in several if isinstance(one, PhiloxGenerator)]
        if philox:
            if len(philox) != len(several):
                raise TypeError("generator is a list of two kinds; expected all of torch or all PhiloxGenerator")
            return draw(philox, shape, device)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise TypeError(f"latents is {kind}; expected a floating-point tensor")
    check_readable("latents", latents)
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents has shape {tuple(latents.shape)}; expected {shape}")
    if not latents.abs().amax() <= LARGEST:  # also where it is NaN
        raise ValueError(
            f"latents holds numbers that are not finite or beyond {LARGEST:g}; expected noise, about N(0, 1)"
        )
    return latents.to(device, torch.float32)


def _check_generator(generator: object, batch_size: int) -> None:
    for one in generator if isinstance(generator, list) else [generator]:
        if isinstance(one, PhiloxGenerator):
            continue
        if not isinstance(one, torch.Generator) and (one is not None or isinstance(generator, list)):
            expected = "a torch.Generator, a PhiloxGenerator, or a list of one a picture"
            raise TypeError(f"generator is {generator!r:.80}; expected {expected}")
        if one is not None and one.device.type == "meta":
            raise ValueError("generator is on device meta, which draws nothing; expected one on the CPU")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"generator is a list of {len(generator)}; expected one for each of the {batch_size} pictures")
