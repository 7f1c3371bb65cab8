"""How likely it is that a picture shows what was asked, from what the network's heads say on the way to it.

    quality = 1 / (1 + exp(-(b + w . x)))

with x = (|direction|, distance) of the first evaluation, or of the first two, before guidance, and then three numbers
of the description: its similarity to the known name that it is taken as, the cosine of the two in the table of words,
and how much more that is than the cosine with the next name. b and w are fitted by `coalescer_fast.training.grading`.
They are stored with the scheduler, for whose steps they hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from .models import DescriptionEncoder

HEADS = 2  # evaluations that a grade is made of
# by evaluations, what the numbers of `Grading` are multiplied with, after the first one
WORDS = ("similarity", "cosine", "margin")
FEATURES = {
    "1": ("direction_length_1", "distance_1", *WORDS),
    "2": ("direction_length_1", "distance_1", "direction_length_2", "distance_2", *WORDS),
}
NO_WORDS = (0.0,) * len(WORDS)
# by evaluations, (b, *w)
Grading = dict[str, list[float]]
# |direction| (N,) and distance (N,) of an evaluation
Heads = tuple[torch.Tensor, torch.Tensor]


def check_grading(grading: Any, largest: float) -> dict[str, list[float]]:
    """Return a grading as lists.

    Raises:
        ValueError: for anything that is none.
    """
    if not isinstance(grading, dict) or set(grading) != set(FEATURES):
        raise ValueError(
            f"grading is {grading!r:.80}; expected lists of numbers by evaluations, {' and '.join(FEATURES)}"
        )
    for count, names in FEATURES.items():
        numbers = grading[count]
        if not isinstance(numbers, (list, tuple)) or len(numbers) != 1 + len(names):
            raise ValueError(f"grading[{count!r}] is {numbers!r:.80}; expected {1 + len(names)} numbers")
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= largest:
                raise ValueError(f"grading[{count!r}] has {number!r:.80}; expected finite numbers")
    return {count: [float(number) for number in grading[count]] for count in FEATURES}


def direction_length(direction: torch.Tensor) -> torch.Tensor:
    """|direction| (N,) of directions (N, C, h, w), float32; on a CPU its bits do not depend on the other rows."""
    if direction.device.type != "cpu":
        return direction.float().square().mean((1, 2, 3)).sqrt()
    # numpy sums each row by itself: torch's mean depends, in its last bit, on the number of rows and of threads
    rows = direction.detach().float().flatten(1).numpy()
    return torch.from_numpy(np.sqrt(np.square(rows).mean(1)))


def of_words(encoder: DescriptionEncoder, texts: Sequence[str]) -> list[tuple[float, ...]]:
    """`WORDS` of each text; `NO_WORDS` where it is taken as no name, or no word is known."""
    found: dict[str, tuple[float, ...]] = {}
    for text in dict.fromkeys(texts):
        match = encoder.match(text)
        if match is None or not any(encoder.words(text).values()):
            found[text] = NO_WORDS
        else:
            found[text] = (match.similarity, *encoder.closeness(text))
    return [found[text] for text in texts]


def log_odds(grading: Grading, heads: Sequence[Heads], words: Sequence[Sequence[float]]) -> list[float]:
    """Compute ``b + w . x`` of N pictures.

    Args:
        grading: the numbers.
        heads: of the first evaluations, at least one. A picture that has had one evaluation less has NaN in the last.
        words: `WORDS` of each description, (N, 3).
    """
    columns = [column.cpu().double().tolist() for one in heads[:HEADS] for column in one]
    found = []
    for *row, said in zip(*columns, words):
        if len(row) == 2 * HEADS and math.isnan(row[2]) and math.isnan(row[3]):
            row = row[:2]
        bias, *weights = grading[str(len(row) // 2)]
        found.append(bias + sum(w * x for w, x in zip(weights, (*row, *said))))
    return found


def among_seeds(heads: Sequence[Heads]) -> list[float]:
    """What the best of several pictures of one prompt is chosen by, (N,), more is better; [] without an evaluation.

    The distance of the second evaluation, or of the first one, where some pictures have had no more. Between pictures
    of one prompt, of the embedded model, it tells right from wrong better than the quality, which is made to compare
    prompts (`python -m benchmarks.quality.best_of`).
    """
    if not heads:
        return []
    (_, first), (_, last) = heads[0], heads[min(len(heads), HEADS) - 1]
    return (first if last.isnan().any() else last).cpu().double().tolist()


def probability(log_odds: float) -> float:
    """Turn log-odds into a probability."""
    return 1 / (1 + math.exp(-log_odds)) if log_odds > 0 else 1 - 1 / (1 + math.exp(max(log_odds, -700.0)))
