"""Training items of a coalescer: groups of pictures that fit a description, each paired with noise."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

import torch

from . import pairing
from .loop import Trainer
from .prompts import PromptSampler

PAIRINGS = ("output_transport", "transport", "nearest", "nearest_of_k", "paired")

# Where the network lands (n, C, h, w) in one step from noise (n, C, h, w), for descriptions (n, D) of n texts.
Endpoint = Callable[[torch.Tensor, torch.Tensor, Sequence[str]], torch.Tensor]


@dataclass
class Items:
    """Training items.

    Attributes:
        noise: (n, C, h, w).
        description: (n, D).
        radius: (n,), of R between picture and noise.
        source: (n,), index of the picture that R is mixed from.
        close: (n,), index of the close picture.
        texts: the n descriptions.
    """

    noise: torch.Tensor
    description: torch.Tensor
    radius: torch.Tensor
    source: torch.Tensor
    close: torch.Tensor
    texts: list[str]

    def part(self, start: int, size: int) -> Items:
        return Items(*(x[start : start + size] for x in vars(self).values()))


@dataclass(frozen=True)
class Pairing:
    """How the close picture is found.

    Attributes:
        name: one of `PAIRINGS`.
        prior_share: share of R that is drawn from the prior.
        nearest_of: pictures that nearest_of_k searches.
    """

    name: str = "output_transport"
    prior_share: float = 0.5
    nearest_of: int = 64

    def pairs(
        self,
        noise: torch.Tensor,
        pictures: torch.Tensor,
        radius: torch.Tensor,
        landing: torch.Tensor,
        generator: torch.Generator,
    ) -> pairing.Pairs:
        """Pair the noises of a group, which land at ``landing``, with its pictures; see `training.pairing`."""
        if self.name == "output_transport":
            return pairing.output_transport(noise, pictures, radius, landing)
        if self.name == "nearest_of_k":
            return pairing.nearest_of_k(noise, pictures, radius, self.nearest_of, generator)
        search = {"transport": pairing.transport, "nearest": pairing.nearest, "paired": pairing.paired}[self.name]
        return search(noise, pictures, radius)


def draw_items(
    sampler: PromptSampler,
    latents: torch.Tensor,
    how: Pairing,
    generator: torch.Generator,
    size: int,
    endpoint: Endpoint | None = None,
) -> Items:
    """Draw groups, pair each and shuffle.

    Args:
        sampler: draws the groups.
        latents: of all pictures, (N, C, h, w).
        how: the close pictures are found.
        generator: of all random draws.
        size: number of items.
        endpoint: where the network lands, for output_transport; None pairs in noise space.
    """
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    groups = sampler.groups(rng)
    counts = torch.tensor([len(g.pictures) for g in groups], dtype=torch.int64)
    description = sampler.vectors([g.phrases for g in groups]).repeat_interleave(counts, 0)
    texts = [text for g in groups for text in [", ".join(g.phrases)] * len(g.pictures)]
    picture = torch.tensor([i for g in groups for i in g.pictures], dtype=torch.int64)
    n = len(picture)
    noise = torch.randn(n, *latents.shape[1:], dtype=torch.float32, generator=generator)
    prior, mixed = (torch.rand(n, dtype=torch.float32, generator=generator) for _ in range(2))
    radius = torch.where(prior < how.prior_share, torch.ones_like(mixed), mixed)

    source, close = (torch.arange(n, dtype=torch.int64) for _ in range(2))
    if how.name != "paired":
        landing = noise
        if how.name == "output_transport" and endpoint is not None:
            several = counts.repeat_interleave(counts) > 1
            landing = noise.clone()
            landing[several] = endpoint(noise[several], description[several], list(compress(texts, several.tolist())))
        for start, count in zip((counts.cumsum(0) - counts).tolist(), counts.tolist()):
            if count > 1:
                part = slice(start, start + count)
                found = how.pairs(noise[part], latents[picture[part]], radius[part], landing[part], generator)
                source[part], close[part] = found[0] + start, found[1] + start
    order = torch.randperm(n, generator=generator)[:size]
    order = order.repeat(-(-size // len(order)))[:size]
    ordered = [texts[i] for i in order.tolist()]
    return Items(
        noise[order], description[order], radius[order], picture[source[order]], picture[close[order]], ordered
    )


class ItemStream:
    """The items of each step of a training: a queue of them is drawn when the one before is used up.

    Args:
        trainer: whose random draws they are.
        sampler: draws the groups.
        latents: of all pictures, (N, C, h, w).
        how: the close pictures are found.
        key: of the random draws.
        endpoint: where the averaged network lands, for output_transport.
        warmup: steps for which output_transport pairs in noise space.
    """

    def __init__(
        self,
        trainer: Trainer,
        sampler: PromptSampler,
        latents: torch.Tensor,
        how: Pairing,
        key: int,
        endpoint: Endpoint | None = None,
        warmup: int = 0,
    ):
        self.trainer, self.sampler, self.latents, self.how = trainer, sampler, latents, how
        self.key, self.endpoint, self.warmup = key, endpoint, warmup
        self.size, self.batch_size = sampler.config.queue_size, trainer.schedule.batch_size
        self.period = self.size // self.batch_size  # steps that a queue lasts
        self.queue: Items | None = None

    def at(self, step: int) -> Items:
        """The batch of a step; steps are asked for one after the other."""
        if self.queue is None or step % self.period == 0:
            generator = self.trainer.generator(self.key, step // self.period)
            endpoint = None if step < self.warmup else self.endpoint
            self.queue = draw_items(self.sampler, self.latents, self.how, generator, self.size, endpoint)
        return self.queue.part(step % self.period * self.batch_size, self.batch_size)
