"""The two-step update of a coalescer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

from . import ops
from .grading import Grading, check_grading

MAX_STEPS = 100_000  # of a call: a mistyped count is an error at once, and not after hours
LARGEST = 1e6  # of etas, guidance scales and latents: far beyond any use, and far from where squares overflow float32
MAX_AUTO_STEPS = 8  # of a picture with num_inference_steps="auto"
_TINY = torch.finfo(torch.float32).tiny


@dataclass
class CoalescerSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: the moved R, of the sample's shape and dtype.
    """

    prev_sample: torch.Tensor


class CoalescerScheduler(SchedulerMixin, ConfigMixin):
    r"""Moves R along the target direction by the target distance, a few times.

        unit:  R <- R + eta * distance * direction / max(|direction|, eps)
        raw:   R <- R + eta * distance * direction               (the direction's length damps the step)

    with ``|x| = ||x||_2 / sqrt(C H W)`` of one sample. Two steps go half the distance raw, then the whole distance
    along the unit direction; other step counts have a row of their own in ``rows``, or go ``etas[0]`` of the distance
    at a time and then the whole.

    With "auto" in the place of a step count, each picture takes such steps until the distance says that it has arrived:
    the first step that begins nearer than ``arrival_distance``, or the `MAX_AUTO_STEPS`-th, is its last one.

    ``config`` holds lists for all sequences, before and after it is saved.

    Args:
        etas: of the two-step schedule, a number for each step.
        modes: of the two-step schedule, "raw" or "unit" for each step.
        rows: schedules of other step counts, {"4": (etas, modes)}.
        guidance_scale: the model's own, used where the call gives none; 1 is no guidance.
        guided_steps: "last" guides the last step alone (one evaluation more a call), "all" every step.
        eps: smallest direction length to divide by.
        arrival_distance: of "auto".
        grading: what turns the network's heads into the quality of a picture, see `coalescer_fast.grading`; None for no
            quality.

    Attributes:
        is_auto: whether the step count is "auto"; ``num_inference_steps`` is then the largest.

    Raises:
        ValueError: for anything that is no schedule or not finite.
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
        arrival_distance: float = 1.3,
        grading: Grading | None = None,
    ):
        if guided_steps not in ("last", "all"):
            raise ValueError(f"guided_steps is {guided_steps!r}; use 'last' or 'all'")
        check_number("guidance_scale", guidance_scale)
        check_number("arrival_distance", arrival_distance)
        if not is_number(eps) or eps < _TINY:
            raise ValueError(f"eps is {eps!r}; expected a number from {_TINY:.1e} up")
        etas, modes = _checked_row("", etas, modes)
        if rows is not None:
            rows = {n: _checked_row(f"rows[{n!r}]: ", *row) for n, row in _pairs(rows).items()}
            for n, (row_etas, _) in rows.items():
                if n != str(len(row_etas)):
                    raise ValueError(f"rows[{n!r}] has {len(row_etas)} entries; expected {n}")
        # lists, as JSON gives them back
        as_lists = None if rows is None else {n: list(row) for n, row in rows.items()}
        if grading is not None:
            grading = check_grading(grading, LARGEST)
        self.register_to_config(etas=etas, modes=modes, rows=as_lists, grading=grading)
        self.set_timesteps(len(etas))

    def set_timesteps(self, num_inference_steps: int | str, device: str | torch.device | None = None) -> None:
        """Choose the schedule of a step count, or "auto". ``timesteps`` are then 0, 1, ..., on the CPU in any case."""
        given = num_inference_steps
        self.is_auto = given == "auto"
        if not self.is_auto and (isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= MAX_STEPS):
            raise ValueError(
                f"num_inference_steps is {given!r}; expected a whole number from 1 to {MAX_STEPS}, or 'auto'"
            )
        n, config = MAX_AUTO_STEPS if self.is_auto else int(given), self.config
        if n == len(config.etas) and not self.is_auto:
            self.etas, self.modes = tuple(config.etas), tuple(config.modes)
        elif str(n) in (config.rows or {}) and not self.is_auto:
            etas, modes = config.rows[str(n)]
            self.etas, self.modes = tuple(etas), tuple(modes)
        else:
            self.etas = (config.etas[0],) * (n - 1) + (config.etas[-1],)
            self.modes = (config.modes[0],) * (n - 1) + (config.modes[-1],)
        self.num_inference_steps = n
        self.timesteps = torch.arange(n, dtype=torch.int64)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | None = None) -> torch.Tensor:
        """Return the sample itself: the network sees R as it is."""
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
        """Move R once.

        Args:
            direction: (N, C, H, W).
            distance: (N,).
            timestep: index of the step.
            sample: R (N, C, H, W).
            return_dict: whether to return a `CoalescerSchedulerOutput` and not a tuple.
            backend: of `ops.coalesce_step`.

        Returns:
            The moved R, of the sample's shape and dtype.
        """
        i = int(timestep)
        if not 0 <= i < self.num_inference_steps:
            raise ValueError(
                f"timestep is {i}; expected one of 0 to {self.num_inference_steps - 1}, as set_timesteps chose them"
            )
        moved = ops.coalesce_step(
            sample, direction, distance, eta=self.etas[i], mode=self.modes[i], eps=self.config.eps, backend=backend
        )
        return CoalescerSchedulerOutput(moved) if return_dict else (moved,)


def is_number(value: Any) -> bool:
    """Whether a value is a number, and one to compute with in float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def check_number(name: str, value: Any) -> None:
    """Raise ValueError for what is no number, not finite or absurdly large."""
    if not is_number(value):
        raise ValueError(f"{name} is {value!r}; expected a finite number, of at most {LARGEST:g} in size")


def _checked_row(where: str, etas: Any, modes: Any) -> tuple[list[float], list[str]]:
    for name, entries in (("etas", etas), ("modes", modes)):
        if not isinstance(entries, (list, tuple)):
            raise ValueError(f"{where}{name} is {entries!r}; expected a list with one entry a step")
    if len(etas) != len(modes) or not etas:
        raise ValueError(
            f"{where}etas {tuple(etas)} and modes {tuple(modes)} must have one entry a step, and at least one"
        )
    for i, (eta, mode) in enumerate(zip(etas, modes)):
        check_number(f"{where}etas[{i}]", eta)
        if mode not in ("unit", "raw"):
            raise ValueError(f"{where}modes has {mode!r}; use 'unit' or 'raw'")
    return list(etas), list(modes)


def _pairs(rows: Any) -> dict[str, Any]:
    if not isinstance(rows, dict) or not all(isinstance(row, (list, tuple)) and len(row) == 2 for row in rows.values()):
        raise ValueError(f"rows is {rows!r}; expected (etas, modes) for each step count, as {{'4': (etas, modes)}}")
    return rows


def guide(
    direction: torch.Tensor,
    distance: torch.Tensor,
    empty_direction: torch.Tensor,
    empty_distance: torch.Tensor,
    guidance_scale: float | torch.Tensor,
) -> torch.Tensor:
    r"""Turn the direction towards the guided endpoint; the distance stays that of the description.

    ``x = x_d + w (x_d - x_empty)`` with ``x_. = R + distance_. * direction_.`` and w = guidance_scale - 1, so that
    ``(x - R) / distance = direction + w (direction - distance_empty / distance * direction_empty)``: guidance
    extrapolates where the network lands, the equivalent of classifier-free guidance (arXiv 2207.12598).

    Args:
        direction: (N, C, H, W), of the description.
        distance: (N,), of the description.
        empty_direction: (N, C, H, W), of the empty description.
        empty_distance: (N,), of the empty description.
        guidance_scale: a number, or a tensor () in float64, which gives the same bits.

    Returns:
        The guided direction (N, C, H, W).
    """
    ratio = (empty_distance / distance.clamp_min(1e-6))[:, None, None, None]
    return direction + (guidance_scale - 1) * (direction - ratio * empty_direction)
