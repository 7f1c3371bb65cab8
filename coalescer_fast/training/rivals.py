"""Other ways to train a sampler of few steps: the coalescer's network, anchor and descriptions, and a time as input.

`RIVALS` maps an objective to its loss and its sampler. Latents have RMS 1, |x| is the RMS of a sample, z is noise, x a
picture, and p the anchor, 0 for a network without one.

Three of them learn velocities on the straight path x_t = (1 - t) z + t x, from noise at t = 0 to the picture at t = 1:
the network is asked at a time t for the next span s, and

    u(x_t, t, s) = net(x_t, t, s) + (1 - t) (p - x_t) + t x_t

is residual to what leads to the anchor: from noise, u = p - z is exact for a picture that is the anchor, and at the end
E[x - z | x_1] = x. So an untrained network draws the anchor in one step, like an untrained coalescer.

    flow_matching   u(x_t, t, 0) is the velocity E[x - z | x_t]                  arXiv 2210.02747
    mean_flow       u(x_t, t, s) is the mean velocity from t to t + s            arXiv 2505.13447
    shortcut        the same, for s = 1, 1/2, ..., 1/64, and 0 for the velocity  arXiv 2410.12557
    consistency     f(x + sigma z, sigma) is the picture that the path ends in   arXiv 2310.14189
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.unet import CoalescerUNet, replace_empty
from .losses import mean_square
from .pairing import mix

# (x (N, Cz, H, W), description (N, D), time (N,), span (N,)) -> net (N, Cz, H, W) and p, of the same shape, or None
Network = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class TimeConditionedUNet(CoalescerUNet):
    """The coalescer's UNet, with a time and a span as further inputs.

    Both are embedded by sinusoids of half a period to five periods in [0, 1], and added to the description's embedding.
    Objectives that compare the network at neighbouring times need low frequencies (arXiv 2310.14189, section 3.1). The
    distance head is unused and frozen.

    Attributes:
        full_precision: leave autocast aside, for objectives that take differences of outputs.
    """

    frequencies = 64
    full_precision = False

    # from_pretrained reads the arguments off the signature
    @functools.wraps(CoalescerUNet.__init__)  # type: ignore[misc]
    def __init__(self, **config: Any):
        super().__init__(**config)
        width = self.config.embedding_dim
        self.time_embedding = nn.Sequential(nn.Linear(4 * self.frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.distance_head.requires_grad_(False)
        self._times: Tensor | None = None

    def embed(self, description: Tensor) -> Tensor:
        assert self._times is not None
        exponents = torch.linspace(
            0.0, math.log(10.0), self.frequencies, dtype=torch.float32, device=description.device
        )
        angles = (self._times[..., None] * torch.exp(exponents) * math.pi).flatten(1)  # [N, 2 F]
        times = self.time_embedding(torch.cat([angles.sin(), angles.cos()], 1).to(description.dtype))
        return F.silu(self.embedding(replace_empty(description, self.null)) + times)

    def forward(  # type: ignore[override]
        self, sample: Tensor, description: Tensor, time: Tensor, span: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluate the network.

        Args:
            sample: (N, Cz, H, W).
            description: (N, D).
            time: (N,), from 0 to 1.
            span: (N,), from 0 to 1.

        Returns:
            The output of the direction head and the anchor p, both (N, Cz, H, W); None for no anchor.
        """
        with torch.autocast(sample.device.type, enabled=False) if self.full_precision else nullcontext():
            self._times = torch.stack([time, span], 1)
            conditioning = self.condition(description)
            return self.direction_head(self.features(sample, conditioning)), conditioning.anchor


@dataclass(frozen=True)
class Batch:
    """What a loss is computed of.

    Attributes:
        noise: z (N, Cz, H, W).
        picture: x (N, Cz, H, W).
        description: (N, D).
        generator: of all random draws, on the CPU.
        progress: share of the training's steps that have been taken.
        averaged: the averaged network.
    """

    noise: Tensor
    picture: Tensor
    description: Tensor
    generator: torch.Generator
    progress: float
    averaged: Network

    def uniform(self) -> Tensor:
        """A number in [0, 1) for each sample."""
        return torch.rand(len(self.noise), dtype=torch.float32, generator=self.generator).to(self.noise.device)

    def normal(self) -> Tensor:
        """A number of N(0, 1) for each sample."""
        return torch.randn(len(self.noise), dtype=torch.float32, generator=self.generator).to(self.noise.device)


def like(values: Tensor, x: Tensor) -> Tensor:
    """(N,) -> (N, 1, ...), to be multiplied by x (N, ...)."""
    return values.view(-1, *[1] * (x.ndim - 1))


def velocity(network: Network, x: Tensor, time: Tensor, span: Tensor, description: Tensor) -> Tensor:
    """u(x, t, s) = net + (1 - t) (p - x) + t x, or net alone without an anchor; float32."""
    net, anchor = network(x, description, time, span)
    if anchor is None:
        return net.float()
    t = like(time, x)
    return net.float() + (1 - t) * (anchor.float() - x) + t * x


# --- losses -----------------------------------------------------------------------------------------------------------


def flow_matching_loss(network: Network, batch: Batch) -> Tensor:
    """|u(x_t, t, 0) - (x - z)|^2 with t ~ U(0, 1): flow matching on straight paths (arXiv 2210.02747)."""
    time = batch.uniform()
    x = mix(batch.noise, batch.picture, 1 - time)
    u = velocity(network, x, time, torch.zeros_like(time), batch.description)
    return mean_square(u - (batch.picture - batch.noise)).mean()


DIFFERENCE = 0.005  # in time; the fastest sinusoid of the embedding turns by 9 degrees


def mean_flow_loss(network: Network, batch: Batch) -> Tensor:
    """MeanFlow (arXiv 2505.13447), with a finite difference for the derivative (arXiv 2604.08837).

    The displacement s u(x_t, t, s) is the integral of the velocity from t to t + s. With the end t + s fixed, its
    derivative along the path is -v, so

        u = v + s du/dt,    s du/dt ~ s / h (u(x_t + h v, t + h, s - h) - u(x_t, t, s)),    h = min(0.005, s)

    and u is regressed on the right side, without gradient, with v = x - z. As in the paper, t and t + s are the smaller
    and the larger of two draws of sigmoid(N(0.4, 1)) (there, time runs to the noise), s = 0 for three quarters of the
    batch, and the squared error e is weighted by 1 / (e + 0.001), without gradient.
    """
    a, b = (torch.sigmoid(0.4 + batch.normal()) for _ in range(2))
    time, n = torch.minimum(a, b), len(a) // 4
    span = torch.maximum(a, b) - time
    span[n:] = 0
    v = batch.picture - batch.noise
    x = mix(batch.noise, batch.picture, 1 - time)
    u = velocity(network, x, time, span, batch.description)
    target = v.clone()
    if n:
        t, s = time[:n], span[:n]
        h = s.clamp(1e-6, DIFFERENCE)
        with torch.no_grad():
            ahead = velocity(network, x[:n] + like(h, x) * v[:n], t + h, (s - h).clamp_min(0), batch.description[:n])
            target[:n] += like(s / h, x) * (ahead - u[:n])
    error = mean_square(u - target)
    return (error / (error.detach() + 1e-3)).mean()


SMALLEST = 7  # a half step of 2^-7 is small enough to be taken by the velocity


def shortcut_loss(network: Network, batch: Batch) -> Tensor:
    """Shortcut models (arXiv 2410.12557): flow matching, and two steps of s / 2 that teach one of s.

        u(x_t, t, s) -> (u(x_t, t, s/2) + u(x', t + s/2, s/2)) / 2,    x' = x_t + s/2 u(x_t, t, s/2)

    on a quarter of the batch, with s = 2^-k, k = 0 ... 6, and t a multiple of s below 1; the right side is by the
    averaged network. Steps of 2^-7 are asked for as span 0, which flow matching teaches on the rest of the batch.
    """
    time, draw = batch.uniform(), batch.uniform()
    n = len(time) // 4
    sections = torch.floor(SMALLEST * draw[:n]).exp2()  # 1, 2, ..., 64
    time[:n] = torch.floor(sections * time[:n]) / sections
    span = torch.zeros_like(time)
    span[:n] = 1 / sections
    x = mix(batch.noise, batch.picture, 1 - time)
    target = batch.picture - batch.noise
    if n:
        half = span[:n] / 2
        asked = torch.where(half > 2.0**-SMALLEST, half, 0)
        with torch.no_grad():
            first = velocity(batch.averaged, x[:n], time[:n], asked, batch.description[:n])
            middle = x[:n] + like(half, x) * first
            second = velocity(batch.averaged, middle, time[:n] + half, asked, batch.description[:n])
        target = torch.cat([(first + second) / 2, target[n:]])
    return mean_square(velocity(network, x, time, span, batch.description) - target).mean()


# Twice those of arXiv 2310.14189 and 2206.00364, whose pictures have an RMS of 0.5 and not of 1.
SIGMA_MIN, SIGMA_MAX, HUBER = 0.004, 160.0, 0.00108
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.1 + math.log(2), 2.0
INTERVALS = (10, 1280)  # at first and at last


def consistent(network: Network, x: Tensor, sigma: Tensor, description: Tensor) -> Tensor:
    """f(x, sigma) = p + skip (x - p) + out net(x / sqrt(sigma^2 + 1), t, 0); float32.

        skip = 1 / ((sigma - sigma_min)^2 + 1),    out = (sigma - sigma_min) / sqrt(sigma^2 + 1)

    so that f(x, sigma_min) = x (arXiv 2303.01469, with p where that has 0). t is log sigma, scaled to [0, 1].
    """
    s = like(sigma, x)
    scale = (s.square() + 1).rsqrt()
    time = (sigma / SIGMA_MIN).log() / math.log(SIGMA_MAX / SIGMA_MIN)
    net, anchor = network(x * scale, description, time, torch.zeros_like(time))
    p = 0.0 if anchor is None else anchor.float()
    return p + (x - p) / ((s - SIGMA_MIN).square() + 1) + (s - SIGMA_MIN) * scale * net.float()


def noise_levels(progress: float) -> Tensor:
    """The levels sigma_1 < ... < sigma_N at a share of the training: their intervals double from 10 to 1280.

    They are equally spaced in sigma^(1/7) (arXiv 2206.00364).
    """
    doublings = round(math.log2(INTERVALS[1] / INTERVALS[0]))
    intervals = INTERVALS[0] * 2 ** min(math.floor(progress * (doublings + 1)), doublings)
    ramp = torch.linspace(SIGMA_MIN ** (1 / 7), SIGMA_MAX ** (1 / 7), intervals + 1, dtype=torch.float64)
    return ramp.pow(7).float()


def consistency_loss(network: Network, batch: Batch) -> Tensor:
    """Consistency training from scratch with the improved schedules (arXiv 2310.14189).

    f(x + sigma_{i+1} z, sigma_{i+1}) is regressed on f(x + sigma_i z, sigma_i) by the same network without gradient: no
    average of it. The loss is pseudo-Huber, sqrt(|e|^2 + c^2) - c, over sigma_{i+1} - sigma_i; i is drawn such that log
    sigma is about normal, of mean -0.41 and standard deviation 2; the levels become more while it is trained.
    """
    levels = noise_levels(batch.progress)
    below = torch.erf((levels.log() - LOG_SIGMA_MEAN) / (LOG_SIGMA_STD * math.sqrt(2)))
    i = torch.multinomial(below.diff(), len(batch.noise), replacement=True, generator=batch.generator)
    low, high = levels[i].to(batch.noise.device), levels[i + 1].to(batch.noise.device)

    def f(sigma: Tensor) -> Tensor:
        return consistent(network, batch.picture + like(sigma, batch.noise) * batch.noise, sigma, batch.description)

    with torch.no_grad():
        target = f(low)
    error = mean_square(f(high) - target)
    return (((error + HUBER**2).sqrt() - HUBER) / (high - low)).mean()


# --- samplers ---------------------------------------------------------------------------------------------------------


def guided(answer: Callable[[Tensor], Tensor], description: Tensor, guidance_scale: float) -> Tensor:
    """The answer for a description, or empty + guidance_scale (answer - empty), as in classifier-free guidance."""
    wanted = answer(description)
    if guidance_scale == 1:
        return wanted
    empty = answer(torch.zeros_like(description))
    return empty + guidance_scale * (wanted - empty)


def _integrate(
    network: Network, noise: Tensor, description: Tensor, steps: int, guidance_scale: float, span: float
) -> Tensor:
    x, all_alike = noise, torch.ones(len(noise), dtype=torch.float32, device=noise.device)
    for i in range(steps):
        answer = functools.partial(velocity, network, x, all_alike * (i / steps), all_alike * span)
        x = x + guided(answer, description, guidance_scale) / steps
    return x


@torch.no_grad()
def euler(network: Network, noise: Tensor, description: Tensor, steps: int, guidance_scale: float = 1.0) -> Tensor:
    """Integrate the velocity from t = 0 to 1 in equal Euler steps.

    Args:
        network: of the objective flow_matching.
        noise: (N, Cz, H, W), at t = 0.
        description: (N, D).
        steps: how many, each an evaluation, or two with guidance.
        guidance_scale: as in classifier-free guidance; 1 for none.

    Returns:
        Latents (N, Cz, H, W), at t = 1.
    """
    return _integrate(network, noise, description, steps, guidance_scale, span=0.0)


@torch.no_grad()
def mean_flow_steps(
    network: Network, noise: Tensor, description: Tensor, steps: int, guidance_scale: float = 1.0
) -> Tensor:
    """Equal steps by the mean velocity over each; arguments and result as of `euler`."""
    return _integrate(network, noise, description, steps, guidance_scale, span=1 / steps)


@torch.no_grad()
def shortcut_steps(
    network: Network, noise: Tensor, description: Tensor, steps: int, guidance_scale: float = 1.0
) -> Tensor:
    """Equal steps, each asked for as the nearest power of 2 that was trained; arguments and result as of `euler`."""
    power = round(math.log2(steps))
    return _integrate(network, noise, description, steps, guidance_scale, 0.0 if power >= SMALLEST else 2.0**-power)


@torch.no_grad()
def consistency_steps(
    network: Network, noise: Tensor, description: Tensor, steps: int, guidance_scale: float = 1.0
) -> Tensor:
    """f of noise, and then, as often as there are further steps, f of its result with noise again (arXiv 2303.01469).

    The noise levels after the first are sigma = (1 - t) / t at t = i / steps, where straight paths are equally noisy.
    The noise of step i is the first noise with its elements in another, fixed order, so that a picture depends on
    nothing else. Arguments and result are as of `euler`.
    """
    all_alike = torch.ones(len(noise), dtype=torch.float32, device=noise.device)
    x, sigma = SIGMA_MAX * noise, SIGMA_MAX
    for i in range(steps):
        if i:
            sigma = (steps - i) / i
            order = torch.randperm(noise[0].numel(), generator=torch.Generator().manual_seed(i)).to(noise.device)
            x = x + math.sqrt(sigma**2 - SIGMA_MIN**2) * noise.flatten(1)[:, order].view_as(noise)
        answer = functools.partial(consistent, network, x, all_alike * sigma)
        x = guided(answer, description, guidance_scale)
    return x


@dataclass(frozen=True)
class Rival:
    """An objective.

    Attributes:
        loss: of a step of the training, its mean over the batch.
        sample: draws latents, see `euler`.
        full_precision: whether the loss takes differences of outputs, too small for bfloat16.
    """

    loss: Callable[[Network, Batch], Tensor]
    sample: Callable[..., Tensor]
    full_precision: bool = False


RIVALS = {
    "flow_matching": Rival(flow_matching_loss, euler),
    "consistency": Rival(consistency_loss, consistency_steps, full_precision=True),
    "mean_flow": Rival(mean_flow_loss, mean_flow_steps, full_precision=True),
    "shortcut": Rival(shortcut_loss, shortcut_steps),
}
