"""python -m coalescer_fast.training.matcher"""

from __future__ import annotations

import argparse
import logging
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ... import files
from ...models import DescriptionEncoder
from ...models.description import plain
from ..data import Concept, load
from . import __doc__ as about
from .lexicon import of_cldr, of_wordnet
from .phrases import compositions
from .student import targets, train
from .teacher import SentenceTransformer, Teacher, Vectors
from .wordnet import read

COMPOSITIONS, RARE, GLOSSES = 60_000, 40_000, 15_000
SHARES = {"compositions": 0.35, "common": 0.3, "rare": 0.15, "glosses": 0.05, "keywords": 0.15}
OF_KEYWORD = 0.08  # added to the score of a name that has the keyword

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m coalescer_fast.training.matcher", description=(about or "").partition("\n")[0]
    )
    parser.add_argument("--data", required=True, help="the data set that the model was trained on")
    parser.add_argument("--model-dir", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder of WordNet 3.0's files")
    parser.add_argument("--cldr", type=Path, help="annotations of npm's cldr-annotations-full: other languages")
    parser.add_argument("--encoder", type=Path, required=True, help="saved description encoder that gets the matcher")
    parser.add_argument("--out", type=Path, required=True, help="folder of the encoder that is written")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    encoder = DescriptionEncoder.from_pretrained(args.encoder)
    with files.writing_folder(args.out) as folder:
        build(encoder, args.data, args.model_dir, args.wordnet, args.cldr).save_pretrained(folder)
    return 0


def build(
    encoder: DescriptionEncoder, data: str, model_dir: Path, wordnet: Path, cldr: Path | None
) -> DescriptionEncoder:
    """Make an encoder with a matcher of its known names.

    Args:
        encoder: as it was trained with, whose tables are kept.
        data: the data set, for the keywords of the names.
        model_dir: of the sentence transformer.
        wordnet: folder of WordNet's files.
        cldr: folder of CLDR's annotations, or None for English alone.

    Raises:
        ValueError: if the data set lacks a known name.
    """
    rng = random.Random(0)
    by_name = {c.name.replace("\n", " "): c for c in load(data).concepts}
    if missing := [name for name in encoder.known_names if name not in by_name]:
        raise ValueError(f"the data set has no {missing[0]!r}, which the encoder knows: give the model's own data set")
    concepts = [by_name[name] for name in encoder.known_names]
    words, transformer = read(wordnet), SentenceTransformer(model_dir)
    teacher = Teacher(transformer, concepts, words)

    usual = [w for w in sorted(words.senses) if re.fullmatch(r"[a-z][a-z' -]*", w) and len(w.split()) <= 3]
    common = [w for w in usual if w in words.common]
    rare = sorted(rng.sample([w for w in usual if w not in words.common and len(w) < 24], RARE))
    things = [word for c in concepts for word in (c.name, *c.keywords)]
    meanings = [s for key, s in sorted(words.synsets.items()) if key[0] in "nv" and len(s.gloss) < 70]
    texts = {
        "compositions": compositions(things, words, COMPOSITIONS, rng),
        "common": common,
        "rare": rare,
        "glosses": sorted({s.gloss for s in rng.sample(meanings, GLOSSES)}),
        "keywords": sorted({word for c in concepts for word in c.keywords}),
    }
    vectors = {kind: transformer(some) for kind, some in texts.items()}
    scores = {kind: teacher.scores(vectors[kind]) for kind in texts}
    for kind in ("common", "rare"):
        meant = transformer([words.synsets[words.senses[w][0]].text(w) for w in texts[kind]])
        scores[kind] = teacher.scores_of_words(texts[kind], vectors[kind], meant)
    _add_keywords(scores["keywords"], texts["keywords"], concepts)
    english = {*map(plain, words.senses), *texts["keywords"], *map(plain, encoder.known_names)}
    entries = {} if cldr is None else of_cldr(cldr, encoder.known_names, english)
    for kind in ("rare", "common"):
        entries |= of_wordnet(texts[kind], scores[kind])
    logger.info("%d entries of the lexicon", len(entries))

    every = np.concatenate([vectors[kind] for kind in texts])
    _, _, axes = np.linalg.svd(every - every.mean(0), full_matrices=False)
    centre, axes = every.mean(0), axes[: encoder.config.dim].T
    pools = [(targets(texts[kind], scores[kind], vectors[kind] - centre, axes), SHARES[kind]) for kind in texts]
    matcher = train(encoder, concepts, pools)
    return DescriptionEncoder.from_table(
        encoder.table.numpy(),
        encoder.scale.numpy(),
        encoder.vocab.numpy(),
        encoder.config.styles,
        encoder.known_names,
        encoder.name_styles.numpy(),
        matcher,
        entries,
    )


def _add_keywords(scores: Vectors, words: Sequence[str], concepts: Sequence[Concept]) -> None:
    for i, word in enumerate(words):
        scores[i, [row for row, c in enumerate(concepts) if word in c.keywords]] += OF_KEYWORD


if __name__ == "__main__":
    sys.exit(main())
