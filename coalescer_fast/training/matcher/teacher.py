"""What a sentence transformer says: how near a text is to each known name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ..data import Concept
from .wordnet import WordNet

Vectors = NDArray[np.float32]

OF_NAME, OF_WORDS, OF_ALL = 1.0, 0.5, 1.0  # weights of the three parts of a score
OF_MEANING = 0.7  # weight of a word's most frequent meaning, beside the word itself
OF_SYNONYM, OF_KIND = 0.15, 0.06  # added to the score of a name that WordNet says means the same, or is the kind


class SentenceTransformer:
    """Vectors of sentences: unit(mean of the last states).

    Args:
        folder: of a BERT-like model, such as all-MiniLM-L6-v2.

    Raises:
        ImportError: without the package transformers.
    """

    def __init__(self, folder: Path):
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise ImportError("a matcher needs the package transformers: run 'pip install transformers'") from error
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval().bfloat16()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], batch_size: int = 256) -> Vectors:
        """Vectors (N, D) of length 1."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # so that a batch has little padding
        out: Vectors = np.zeros((len(texts), self.model.config.hidden_size), np.float32)
        starts = range(0, len(texts), batch_size)
        for start in tqdm(starts, desc="sentences", disable=len(starts) < 20):
            some = order[start : start + batch_size]
            given = self.tokenizer(
                [texts[i] for i in some], padding=True, truncation=True, max_length=48, return_tensors="pt"
            )
            states = self.model(**given).last_hidden_state.float()
            mask = given["attention_mask"][..., None].float()
            out[some] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=1).numpy()
        return out


class Teacher:
    """Scores of texts for names.

        score(t, c) = (n + w + a) / (their weights),   n = OF_NAME * cos(t, name),
        w = OF_WORDS * max of cos(t, word) over name, keywords and synonyms,
        a = OF_ALL * max(cos(t, all), (cos(t, all) + cos(t, gloss)) / 2)

    with ``all`` the name and its keywords in one sentence. Synonyms and gloss are those of the meaning of the name in
    WordNet that is nearest to ``all``.

    Args:
        transformer: gives vectors of texts.
        concepts: names and keywords.
        wordnet: meanings.
    """

    def __init__(self, transformer: SentenceTransformer, concepts: Sequence[Concept], wordnet: WordNet):
        self.transformer, self.concepts, self.wordnet = transformer, concepts, wordnet
        self.names = [c.name for c in concepts]
        self.by_name = transformer(self.names)
        self.by_all = transformer([", ".join([c.name, *c.keywords]) for c in concepts])
        meanings = self._meanings()
        self.meaning = {row: key for row, (key, _) in meanings.items()}
        self.with_gloss = np.array(sorted(meanings), np.int64)
        self.by_gloss = np.stack([meanings[row][1] for row in self.with_gloss.tolist()])
        words = [
            (row, word)
            for row, c in enumerate(concepts)
            for word in (c.name, *c.keywords, *(wordnet.synsets[self.meaning[row]].lemmas if row in meanings else ()))
        ]
        self.by_word = transformer([word for _, word in words])
        # words are in order of their names, and each name has one at least
        self.first_word = np.searchsorted(np.array([row for row, _ in words]), np.arange(len(concepts)))

    def _meanings(self) -> dict[int, tuple[str, Vectors]]:
        """Of each name that WordNet has, the key of its meaning, and the vector of that."""
        senses = [
            (row, key)
            for row, name in enumerate(self.names)
            for key in self.wordnet.senses.get(name.lower(), ())
            if key.startswith("n")
        ]
        vectors = self.transformer([self.wordnet.synsets[key].text(self.names[row]) for row, key in senses])
        best: dict[int, tuple[float, str, Vectors]] = {}
        for (row, key), vector in zip(senses, vectors):
            near = float(vector @ self.by_all[row])
            if row not in best or near > best[row][0]:
                best[row] = near, key, vector
        return {row: (key, vector) for row, (_, key, vector) in best.items()}

    def scores(self, vectors: Vectors) -> Vectors:
        """Scores (N, names) of texts by their vectors (N, D)."""
        name, everything = vectors @ self.by_name.T, vectors @ self.by_all.T
        word = np.maximum.reduceat(vectors @ self.by_word.T, self.first_word, axis=1)
        gloss = (everything[:, self.with_gloss] + vectors @ self.by_gloss.T) / 2
        everything[:, self.with_gloss] = np.maximum(everything[:, self.with_gloss], gloss)
        total = (OF_NAME * name + OF_WORDS * word + OF_ALL * everything) / (OF_NAME + OF_WORDS + OF_ALL)
        return total.astype(np.float32)

    def scores_of_words(self, lemmas: Sequence[str], vectors: Vectors, meanings: Vectors) -> Vectors:
        """Scores of WordNet's words, by their vectors, those of their most frequent meanings, and what it says."""
        total: Vectors = self.scores(vectors) + np.float32(OF_MEANING) * self.scores(meanings)
        total /= np.float32(1 + OF_MEANING)
        named: dict[str, list[int]] = {}
        for row, key in self.meaning.items():
            named.setdefault(key, []).append(row)
        for i, lemma in enumerate(lemmas):
            key = self.wordnet.senses[lemma][0]
            total[i, named.get(key, [])] += OF_SYNONYM
            for above in self.wordnet.kinds_of(key, levels=2):
                total[i, named.get(above, [])] += OF_KIND
        return total
