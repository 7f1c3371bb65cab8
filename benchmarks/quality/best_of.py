"""Signals by which the best of four pictures of a prompt might be chosen, and what each is worth.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.best_of --data emoji_64.npz \
        --wordings benchmarks/quality/typed_wordings.json

A row of the CSV is a signal and a set of wordings: made wordings that the grading was not fitted to, or the free ones
of ``--wordings``. Its columns: the chance that a right picture has a higher signal than a wrong one of its prompt, the
mean over prompts that have both (AUC); the share of right pictures of one drawing, and of the one of four with the
highest signal, with the standard error of the difference; and the share of prompts where any of the four is right.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from coalescer_fast import files
from coalescer_fast.bench.environment import environment
from coalescer_fast.folders import WEIGHTS
from coalescer_fast.pipeline import CoalescerPipeline
from coalescer_fast.training.classifier import PictureClassifier
from coalescer_fast.training.data import PictureDataset, load
from coalescer_fast.training.evaluation import exclusions
from coalescer_fast.training.grading import (
    Drawn,
    Judge,
    area_under_curve,
    draw,
    draw_wordings,
    listed_wordings,
    split,
)

from ..harness.results import Row, write
from .grading import add_options, wordings_of

RESULTS = Path(__file__).parents[1] / "results" / "best_of.csv"
BEST_OF, ROUNDS = 4, 2  # so many times four pictures of each wording
KINDS = ("three keywords", "one keyword", "name with a word left out", "words of two names")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.best_of", description=__doc__.partition("\n")[0]
    )
    add_options(parser, RESULTS)
    parser.add_argument("--count", type=int, default=300, metavar="N", help="wordings a kind (default: %(default)s)")
    args = parser.parse_args(argv)
    files.check_writable(args.csv)
    pipe, data = CoalescerPipeline.from_pretrained(args.model), load(args.data)
    if pipe.scheduler.config.grading is None:
        raise ValueError(f"{args.model} has no grading: run python -m benchmarks.quality.grading --save {args.model}")
    subset = data.without(**exclusions(pipe.description_encoder, data))
    made = draw_wordings(subset, pipe.description_encoder.config.styles, args.count)
    judge, rows = Judge(pipe, subset), []
    for name, wordings in (
        ("made wordings", [wording for wording in split(made)[1] if wording.kind in KINDS]),
        ("free wordings", listed_wordings(wordings_of(args))),
    ):
        if wordings:
            drawn = draw(pipe, judge, wordings, BEST_OF * ROUNDS, 3, prompt_matching=False)
            rows += [
                {"wordings": name, "prompts": len(wordings), "signal": signal, **worth(drawn, score), **environment()}
                for signal, score in signals(pipe, drawn, subset).items()
            ]
    write(args.csv, rows)
    return 0


@torch.no_grad()
def signals(pipe: CoalescerPipeline, drawn: Drawn, data: PictureDataset) -> dict[str, np.ndarray]:
    """What each signal says of each picture, (N,); more is better."""
    latents, seeds = drawn.latents, drawn.seeds
    flat = latents.flatten(1)
    out = dict(
        zip(("|direction|, step 1", "distance, step 1", "|direction|, step 2", "distance, step 2"), columns(drawn))
    )
    out["quality"] = drawn.quality(pipe.scheduler.config.grading)
    conditioning = pipe.condition(drawn.texts, torch.device("cpu"))
    parts = [
        pipe.evaluate(latents[i : i + 250], conditioning.take(torch.arange(i, min(i + 250, len(flat))), len(flat)))
        for i in range(0, len(flat), 250)
    ]
    out["|direction| at the end"] = rms(torch.cat([direction for direction, _ in parts]))
    out["nearness by distance at the end"] = -torch.cat([distance for _, distance in parts]).numpy()
    if conditioning.anchor is not None:
        out["nearness to the anchor"] = -rms(latents - conditioning.anchor)
    groups = flat.unflatten(0, (-1, BEST_OF))
    out["nearness to the other seeds"] = -torch.cdist(groups, groups).sum(2).flatten().numpy()
    encoder = pipe.description_encoder
    matches = [encoder.match(wording.text) for wording in drawn.wordings for _ in range(seeds)]
    matched = ["" if match is None else match.name for match in matches]
    if conditioning.anchor is not None:
        styles = [text.rpartition(", ")[2] for text in drawn.texts]
        out["nearness to the matched name's anchor"] = -rms(
            latents - anchors(pipe, [f"{name}, {style}" for name, style in zip(matched, styles)])
        )
        out["cosine to the name of the nearest anchor"] = nearest_anchor(pipe, drawn, styles)
    classifier = PictureClassifier.from_pretrained(WEIGHTS / "emoji-64" / "classifier").eval()
    pictures = [pipe.decode(part).clamp(-1, 1) for part in latents.split(250)]
    logits = torch.cat([classifier(part)["group"] for part in pictures]).log_softmax(1)
    out["classifier's certainty"] = logits.max(1).values.numpy()
    group_of = {concept.name: concept.group for concept in data.concepts}
    labels = list(classifier.config.labels["group"])
    rows = [labels.index(group) if (group := group_of.get(name, "")) in labels else 0 for name in matched]
    out["classifier's group of the matched name"] = logits[torch.arange(len(rows)), rows].numpy()
    return out


def columns(drawn: Drawn) -> list[np.ndarray]:
    return list(drawn.features().T[:-1])


def rms(x: torch.Tensor) -> np.ndarray:
    return x.square().mean((1, 2, 3)).sqrt().numpy()


def anchors(pipe: CoalescerPipeline, texts: Sequence[str]) -> torch.Tensor:
    """The anchors of texts, (N, C, h, w)."""
    anchor = pipe.condition(list(texts), torch.device("cpu")).anchor
    assert anchor is not None
    return anchor


def nearest_anchor(pipe: CoalescerPipeline, drawn: Drawn, styles: Sequence[str]) -> np.ndarray:
    """The cosine of each wording and the known name whose anchor, in the picture's style, is nearest to the picture."""
    encoder = pipe.description_encoder
    names, flat = encoder.known_names, drawn.latents.flatten(1)
    cosines = encoder([wording.text for wording in drawn.wordings]) @ encoder(names).T / encoder.config.dim
    out = np.zeros(len(flat))
    for style in dict.fromkeys(styles):
        mine = [i for i, each in enumerate(styles) if each == style]
        known = f", {style}" if style.endswith(" style") else ""
        found = torch.cdist(flat[mine], anchors(pipe, [name + known for name in names]).flatten(1)).argmin(1)
        out[mine] = cosines[[i // drawn.seeds for i in mine], found].numpy()
    return out


def worth(drawn: Drawn, score: np.ndarray) -> Row:
    """The columns of a signal."""
    right, shape = drawn.right, (-1, BEST_OF)
    within = [
        area_under_curve(s, r)
        for s, r in zip(score.reshape(-1, drawn.seeds), right.reshape(-1, drawn.seeds))
        if 0 < r.sum() < len(r)
    ]
    groups = right.reshape(shape)
    kept = np.take_along_axis(groups, score.reshape(shape).argmax(1)[:, None], 1)[:, 0]
    # by prompt, whose groups are not independent
    gains = (kept - groups.mean(1)).reshape(-1, drawn.seeds // BEST_OF).mean(1)
    return {
        "within_auc": float(np.mean(within)) if within else float("nan"),
        "one": float(groups.mean()),
        "best_of_4": float(kept.mean()),
        "gain": float(gains.mean()),
        "standard_error": float(gains.std() / len(gains) ** 0.5),
        "any_of_4": float(groups.any(1).mean()),
    }


if __name__ == "__main__":
    raise SystemExit(main())
