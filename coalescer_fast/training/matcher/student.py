"""The shipped matcher: one row a token, summed, and one vector a name, trained on what the teacher says."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from ...models import DescriptionEncoder
from ..build_text_table import quantise
from ..data import Concept
from .teacher import Vectors

TOP = 16  # names of a target
TEMPERATURE = 0.025  # of the teacher's scores
HALF = 512  # texts of each of the two halves of a batch


@dataclass(frozen=True)
class Targets:
    """Texts with what the teacher says of them.

    Attributes:
        texts: N.
        names: (N, TOP), the rows of the names that are nearest.
        shares: (N, TOP), their probabilities, the softmax of score / TEMPERATURE.
        vectors: (N, D), the transformer's vectors of the texts on their principal axes.
    """

    texts: list[str]
    names: torch.Tensor
    shares: torch.Tensor
    vectors: torch.Tensor


def targets(texts: Sequence[str], scores: Vectors, vectors: Vectors, axes: Vectors) -> Targets:
    """Targets from the teacher's scores (N, names) and vectors (N, D'), on axes (D', D)."""
    best = torch.from_numpy(scores).topk(min(TOP, scores.shape[1]), dim=1)
    projected = F.normalize(torch.from_numpy(vectors @ axes), dim=1)
    return Targets(list(texts), best.indices, (best.values / TEMPERATURE).softmax(1), projected)


class Matcher(nn.Module):
    """cos(sum of the tokens' rows, vector of a name), for all names.

    Args:
        table: (V, D), the rows to start from.
        names: token ids of each name.
    """

    def __init__(self, table: torch.Tensor, names: Sequence[Sequence[int]]):
        super().__init__()
        self.table = nn.Parameter(table.clone())
        self.log_scale = nn.Parameter(torch.tensor(math.log(15.0), dtype=torch.float32))
        with torch.no_grad():
            self.names = nn.Parameter(self.encode(names))

    def encode(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Vectors (N, D) of length 1 of N texts, given as token ids."""
        flat = torch.tensor([i for ids in texts for i in ids], dtype=torch.int64)
        starts = torch.tensor([0, *(len(ids) for ids in texts[:-1])], dtype=torch.int64).cumsum(0)
        return F.normalize(F.embedding_bag(flat, self.table, starts, mode="sum"), dim=1)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.log_scale.exp() * vectors @ F.normalize(self.names, dim=1).T


def train(
    encoder: DescriptionEncoder,
    concepts: Sequence[Concept],
    pools: Sequence[tuple[Targets, float]],
    steps: int = 3000,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: bool = True,
    on_step: Callable[[int, Matcher], None] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Train a matcher.

        L = CE(the teacher's shares) + CE(name of names, keywords, and both) + mean(1 - cos(vector, the transformer's))

    Args:
        encoder: gives tokens, and the table to start from.
        concepts: names and keywords, in the order of the encoder's known names.
        pools: what the teacher says, and the share of each among those drawn.
        steps: of Adam, with HALF texts of the teacher and HALF of the concepts each.
        learning_rate: the largest; it falls by a cosine.
        seed: of the draws.
        progress: show a bar.
        on_step: called before each step with its number and the matcher.

    Returns:
        The table (V, D) int8, its scale (D,) float32, and the names' vectors (names, D) int8.
    """
    rng = random.Random(seed)
    tokens = {id(pool): [encoder.token_ids(text) for text in pool.texts] for pool, _ in pools}
    usable = {id(pool): [i for i, ids in enumerate(tokens[id(pool)]) if ids] for pool, _ in pools}
    rows = encoder.table.float() * encoder.scale
    names = [encoder.token_ids(c.name) for c in concepts]
    keywords = [[ids for word in c.keywords if (ids := encoder.token_ids(word))] for c in concepts]
    matcher = Matcher(rows / rows.norm(dim=1).mean(), names)
    optimizer = torch.optim.Adam(matcher.parameters(), learning_rate)

    def told() -> tuple[list[list[int]], torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen = [pool for pool, _ in pools]
        drawn = rng.choices(chosen, [share for _, share in pools], k=HALF)
        picks = [(pool, rng.choice(usable[id(pool)])) for pool in drawn]
        top, shares, vectors = (
            torch.stack([getattr(pool, part)[i] for pool, i in picks]) for part in ("names", "shares", "vectors")
        )
        return [tokens[id(pool)][i] for pool, i in picks], top, shares, vectors

    def named() -> tuple[list[list[int]], torch.Tensor]:
        texts, wanted = [], []
        for row in (rng.randrange(len(names)) for _ in range(HALF)):
            words, kind = keywords[row], rng.random()
            ids = list(names[row]) if kind < 0.6 or not words else []
            if kind >= 0.4 and words:
                least, most = (1, 3) if kind < 0.6 else (2, 4)
                for word in rng.sample(words, min(len(words), rng.randint(least, most))):
                    ids += word
            texts.append(ids)
            wanted.append(row)
        return texts, torch.tensor(wanted, dtype=torch.int64)

    for step in tqdm(range(steps), desc="matcher", disable=not progress):
        if on_step is not None:
            on_step(step, matcher)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        (texts, top, shares, vectors), (others, wanted) = told(), named()
        encoded = matcher.encode(texts + others)
        logits = matcher(encoded)
        loss = -(shares * logits[:HALF].log_softmax(1).gather(1, top)).sum(1).mean()
        loss = loss + F.cross_entropy(logits[HALF:], wanted) + (1 - (encoded[:HALF] * vectors).sum(1)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    table, scale = quantise(matcher.table.detach().numpy())
    vectors_of_names = F.normalize(matcher.names.detach(), dim=1)
    step_size = vectors_of_names.abs().amax(1, keepdim=True) / 127
    return table, scale, (vectors_of_names / step_size).round().to(torch.int8).numpy()
