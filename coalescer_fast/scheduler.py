"""The two-step update of a coalescer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

from . import ops


@dataclass
class CoalescerSchedulerOutput(BaseOutput):
    """prev_sample: the moved R, of the sample's shape and dtype."""

    prev_sample: torch.Tensor


class CoalescerScheduler(SchedulerMixin, ConfigMixin):
    r"""Moves R along the target direction by the target distance, a few times.

        unit:  R <- R + eta * distance * direction / max(|direction|, eps)
        raw:   R <- R + eta * distance * direction               (the direction's length damps the step)

    with ``|x| = ||x||_2 / sqrt(C H W)`` of one sample. Two steps go half the distance raw, then the whole distance along the unit
    direction; other step counts have a row of their own in ``rows``, or go ``etas[0]`` of the distance at a time and then the whole.

    Args:
        etas, modes: the two-step schedule.
        rows: schedules of other step counts, {"4": (etas, modes)}.
        guidance_scale: the model's own, used where the call gives none; 1 is no guidance.
        guided_steps: "last" guides the last step alone (one evaluation more a call), "all" every step.
        eps: smallest direction length to divide by.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        etas: Sequence[float] = (0.5, 1.0),
        modes: Sequence[str] = ("raw", "unit"),
        rows: dict[str, tuple[Sequence[float], Sequence[str]]] | None = None,
        guidance_scale: float = 1.0,
        guided_steps: str = "last",
        eps: float = 1e-6,
    ):
        if guided_steps not in ("last", "all"):
            raise ValueError(f"guided_steps is {guided_steps!r}; use 'last' or 'all'")
        for name, row_etas, row_modes in [("", etas, modes), *((f"rows[{n!r}]: ", *row) for n, row in (rows or {}).items())]:
            if len(row_etas) != len(row_modes) or not len(row_etas):
                raise ValueError(f"{name}etas {tuple(row_etas)} and modes {tuple(row_modes)} must have one entry a step, and at least one")
            if unknown := set(row_modes) - {"unit", "raw"}:
                raise ValueError(f"{name}modes has {sorted(unknown)[0]!r}; use 'unit' or 'raw'")
        for n, (row_etas, _) in (rows or {}).items():
            if n != str(len(row_etas)):
                raise ValueError(f"rows[{n!r}] has {len(row_etas)} entries; expected {n}")
        self.set_timesteps(len(etas))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the schedule of a step count; ``timesteps`` are then 0, 1, ..., on the CPU whatever the device."""
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps!r}; expected a whole number from 1 up")
        n, config = num_inference_steps, self.config
        if n == len(config.etas):
            self.etas, self.modes = tuple(config.etas), tuple(config.modes)
        elif str(n) in (config.rows or {}):
            etas, modes = config.rows[str(n)]
            self.etas, self.modes = tuple(etas), tuple(modes)
        else:
            self.etas = (config.etas[0],) * (n - 1) + (config.etas[-1],)
            self.modes = (config.modes[0],) * (n - 1) + (config.modes[-1],)
        self.num_inference_steps = n
        self.timesteps = torch.arange(n, dtype=torch.int64)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | None = None) -> torch.Tensor:
        """The sample itself: the network sees R as it is."""
        return sample

    def is_guided(self, timestep: int) -> bool:
        """Whether guidance applies at this step."""
        return self.config.guided_steps == "all" or int(timestep) == self.num_inference_steps - 1

    def step(
        self,
        direction: torch.Tensor,
        distance: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        return_dict: bool = True,
        backend: str = "reference",
    ) -> CoalescerSchedulerOutput | tuple[torch.Tensor]:
        """One update of R = ``sample`` (N, C, H, W) by direction (N, C, H, W) and distance (N,)."""
        i = int(timestep)
        moved = ops.coalesce_step(sample, direction, distance, eta=self.etas[i], mode=self.modes[i], eps=self.config.eps, backend=backend)
        return CoalescerSchedulerOutput(moved) if return_dict else (moved,)


def guide(
    direction: torch.Tensor,
    distance: torch.Tensor,
    empty_direction: torch.Tensor,
    empty_distance: torch.Tensor,
    guidance_scale: float | torch.Tensor,
) -> torch.Tensor:
    r"""The direction towards the guided endpoint, to be gone the distance of the description.

    ``x = x_d + w (x_d - x_empty)`` with ``x_. = R + distance_. * direction_.`` and w = guidance_scale - 1, so that
    ``(x - R) / distance = direction + w (direction - distance_empty / distance * direction_empty)``: guidance extrapolates where the
    network lands, the equivalent of classifier-free guidance (arXiv 2207.12598). Directions (N, C, H, W), distances (N,); a scale that is
    a tensor is (), float64, which gives the bits of the number.
    """
    ratio = (empty_distance / distance.clamp_min(1e-6))[:, None, None, None]
    return direction + (guidance_scale - 1) * (direction - ratio * empty_direction)
