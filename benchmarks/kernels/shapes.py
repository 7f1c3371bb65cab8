"""The calls of the four ops that the package's own networks make, emoji-64, m and l, as a plain table.

A call is all that matters to an op's speed except the batch, the dtype and the device. `CALLS` has how often each
occurs in one evaluation of a network; the sampler's update follows every evaluation once, in one mode or the other.
tests/benchmarks/kernels/test_shapes.py checks the table against the networks themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A call of an op.

    Attributes:
        op: its name.
        channels: of the first tensor.
        size: height and width of the first tensor.
    """

    op: ClassVar[str]
    channels: int
    size: int

    @property
    def elements(self) -> int:
        """Elements of a sample of the main tensor: the output, or the features where the output is far smaller."""
        return self.channels * self.size**2

    @property
    def moved(self) -> int:
        """Elements of a sample that must be read or written, each once."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size}"

    def inputs(self, batch: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Random arguments of the op with variance 1; images and weights of convolutions are channels_last."""
        raise NotImplementedError


@dataclass(frozen=True)
class GroupNorm(Call):
    """group_norm_silu.

    Attributes:
        groups: of the normalization.
        skip: channels that are concatenated.
        activation: of the output.
        film: whether there are scale and shift.
        pre_bias: whether there is one.
        eps: of the normalization.
    """

    op = "group_norm_silu"
    groups: int
    skip: int = 0
    activation: str | None = "silu"
    film: bool = False
    pre_bias: bool = False
    eps: float = 1e-5

    @property
    def elements(self) -> int:
        return (self.channels + self.skip) * self.size**2

    @property
    def moved(self) -> int:
        return 2 * self.elements

    def __str__(self) -> str:
        channels = f"{self.channels}+{self.skip}" if self.skip else str(self.channels)
        extras = [
            name
            for name, has in (("film", self.film), ("pre_bias", self.pre_bias), ("linear", self.activation is None))
            if has
        ]
        return " ".join([f"{channels}x{self.size}x{self.size}", f"g{self.groups}", *extras])

    def inputs(self, batch: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        draw = Draw(dtype, device)
        channels = self.channels + self.skip
        inputs: Inputs = {"x": draw.image(batch, self.channels, self.size), "num_groups": self.groups}
        inputs |= {
            "weight": 1 + 0.1 * draw(channels),
            "bias": 0.1 * draw(channels),
            "eps": self.eps,
            "activation": self.activation,
        }
        if self.film:  # two halves of one projection, as in the networks
            inputs["scale"], inputs["shift"] = (0.3 * draw(batch, 2 * channels)).chunk(2, 1)
        if self.skip:
            inputs["skip"] = draw.image(batch, self.skip, self.size)
        if self.pre_bias:
            inputs["pre_bias"] = draw(channels)
        return inputs


@dataclass(frozen=True)
class BiasResidual(Call):
    """bias_residual, with bias and residual."""

    op = "bias_residual"

    @property
    def moved(self) -> int:
        return 3 * self.elements

    def inputs(self, batch: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        draw = Draw(dtype, device)
        x, residual = (draw.image(batch, self.channels, self.size) for _ in range(2))
        return {"x": x, "bias": draw(self.channels), "residual": residual}


@dataclass(frozen=True)
class DualHead(Call):
    """dual_head.

    Attributes:
        latent: channels of the direction.
        anchored: whether there are sample and anchor.
    """

    op = "dual_head"
    latent: int
    anchored: bool = False

    @property
    def moved(self) -> int:
        return self.elements + self.latent * self.size**2

    def __str__(self) -> str:
        return f"{super().__str__()} to {self.latent}{' anchored' if self.anchored else ''}"

    def inputs(self, batch: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        draw = Draw(dtype, device)
        inputs: Inputs = {"h": draw.image(batch, self.channels, self.size)}
        inputs["direction_weight"] = draw.image(self.latent, self.channels, 3) / math.sqrt(9 * self.channels)
        inputs["direction_bias"] = draw(self.latent)
        inputs["distance_weight"], inputs["distance_bias"] = draw(1, self.channels), draw(1)
        if self.anchored:
            inputs["sample"], inputs["anchor"] = (draw.image(batch, self.latent, self.size) for _ in range(2))
        return inputs


@dataclass(frozen=True)
class CoalesceStep(Call):
    """coalesce_step, in one mode."""

    op = "coalesce_step"
    mode: str

    @property
    def moved(self) -> int:
        return 3 * self.elements

    def __str__(self) -> str:
        return f"{super().__str__()} {self.mode}"

    def inputs(self, batch: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        draw = Draw(dtype, device)
        sample, direction = (draw.image(batch, self.channels, self.size) for _ in range(2))
        distance = 0.5 + torch.rand(batch, generator=draw.generator, device=device)  # float32, as dual_head gives it
        return {"sample": sample, "direction": direction, "distance": distance, "mode": self.mode}


class Draw:
    """Standard normal numbers, the same for every call with the same sizes."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def image(self, batch: int, channels: int, size: int) -> torch.Tensor:
        """(N, C, H, W), channels_last."""
        return self(batch, size, size, channels).permute(0, 3, 1, 2)


# Arguments with one entry per sample; the others are parameters.
BATCHED = ("x", "skip", "residual", "scale", "shift", "h", "sample", "anchor", "direction", "distance")

# Calls that have next to nothing to compute, for what a call costs.
TINY: dict[Call, int] = {
    GroupNorm(8, size=2, groups=2, film=True, pre_bias=True): 1,
    BiasResidual(8, size=2): 1,
    DualHead(8, latent=8, size=2, anchored=True): 1,
    CoalesceStep(8, size=2, mode="unit"): 1,
}

CALLS: dict[str, dict[Call, int]] = {
    "emoji-64": {
        GroupNorm(96, size=8, groups=8): 2,
        GroupNorm(96, size=8, groups=8, film=True, pre_bias=True): 3,
        BiasResidual(96, size=8): 3,
        GroupNorm(96, size=4, groups=8): 1,
        GroupNorm(128, size=4, groups=8, film=True, pre_bias=True): 3,
        BiasResidual(128, size=4): 3,
        GroupNorm(128, size=4, groups=8, activation=None): 3,
        GroupNorm(128, size=2, groups=8): 1,
        GroupNorm(160, size=2, groups=8, film=True, pre_bias=True): 5,
        BiasResidual(160, size=2): 5,
        GroupNorm(160, size=2, groups=8): 2,
        GroupNorm(160, skip=160, size=2, groups=8): 1,
        GroupNorm(160, skip=128, size=2, groups=8): 1,
        GroupNorm(160, skip=128, size=4, groups=8): 1,
        GroupNorm(128, skip=96, size=4, groups=8): 1,
        GroupNorm(128, skip=96, size=8, groups=8): 1,
        GroupNorm(96, skip=96, size=8, groups=8): 1,
        DualHead(96, latent=16, size=8, anchored=True): 1,
        CoalesceStep(16, size=8, mode="raw"): 1,
        CoalesceStep(16, size=8, mode="unit"): 1,
    },
    "m": {
        GroupNorm(128, size=32, groups=32): 3,
        GroupNorm(128, size=32, groups=32, film=True, pre_bias=True): 5,
        BiasResidual(128, size=32): 5,
        GroupNorm(128, size=16, groups=32): 1,
        GroupNorm(256, size=16, groups=32, film=True, pre_bias=True): 5,
        BiasResidual(256, size=16): 5,
        GroupNorm(256, size=16, groups=32, activation=None): 5,
        GroupNorm(256, size=16, groups=32): 1,
        GroupNorm(256, size=8, groups=32): 2,
        GroupNorm(256, size=8, groups=32, film=True, pre_bias=True): 5,
        BiasResidual(256, size=8): 5,
        GroupNorm(256, size=4, groups=32): 4,
        GroupNorm(256, size=4, groups=32, film=True, pre_bias=True): 7,
        BiasResidual(256, size=4): 7,
        GroupNorm(256, size=4, groups=32, activation=None): 1,
        GroupNorm(256, skip=256, size=4, groups=32): 3,
        GroupNorm(256, skip=256, size=8, groups=32): 3,
        GroupNorm(256, skip=256, size=16, groups=32): 2,
        GroupNorm(256, skip=128, size=16, groups=32): 1,
        GroupNorm(256, skip=128, size=32, groups=32): 1,
        GroupNorm(128, skip=128, size=32, groups=32): 2,
        DualHead(128, latent=4, size=32): 1,
        CoalesceStep(4, size=32, mode="raw"): 1,
        CoalesceStep(4, size=32, mode="unit"): 1,
    },
    "l": {
        GroupNorm(320, size=64, groups=32): 3,
        GroupNorm(320, size=64, groups=32, film=True, pre_bias=True): 5,
        BiasResidual(320, size=64): 5,
        GroupNorm(320, size=64, groups=32, activation=None, eps=1e-06): 5,
        GroupNorm(320, size=32, groups=32): 1,
        GroupNorm(640, size=32, groups=32, film=True, pre_bias=True): 5,
        BiasResidual(640, size=32): 5,
        GroupNorm(640, size=32, groups=32, activation=None, eps=1e-06): 5,
        GroupNorm(640, size=32, groups=32): 1,
        GroupNorm(640, size=16, groups=32): 1,
        GroupNorm(1280, size=16, groups=32, film=True, pre_bias=True): 5,
        BiasResidual(1280, size=16): 5,
        GroupNorm(1280, size=16, groups=32, activation=None, eps=1e-06): 5,
        GroupNorm(1280, size=16, groups=32): 1,
        GroupNorm(1280, size=8, groups=32): 4,
        GroupNorm(1280, size=8, groups=32, film=True, pre_bias=True): 7,
        BiasResidual(1280, size=8): 7,
        GroupNorm(1280, size=8, groups=32, activation=None, eps=1e-06): 1,
        GroupNorm(1280, skip=1280, size=8, groups=32): 3,
        GroupNorm(1280, skip=1280, size=16, groups=32): 2,
        GroupNorm(1280, skip=640, size=16, groups=32): 1,
        GroupNorm(1280, skip=640, size=32, groups=32): 1,
        GroupNorm(640, skip=640, size=32, groups=32): 1,
        GroupNorm(640, skip=320, size=32, groups=32): 1,
        GroupNorm(640, skip=320, size=64, groups=32): 1,
        GroupNorm(320, skip=320, size=64, groups=32): 2,
        DualHead(320, latent=4, size=64): 1,
        CoalesceStep(4, size=64, mode="raw"): 1,
        CoalesceStep(4, size=64, mode="unit"): 1,
    },
}
