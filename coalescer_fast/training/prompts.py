"""Descriptions for training: what is said of a picture, and which pictures fit what is said."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..models.description import DescriptionEncoder
from .data import PictureDataset


@dataclass(frozen=True)
class PromptConfig:
    """What pictures are described by.

    Attributes:
        name_style: share, among the training items, of descriptions by a name, and a style if the picture has one.
        missing_style: share of names with a style that they do not exist in, answered by a picture in another style.
        keyword: share of single words that several concepts share, mostly with a style.
        style: share of styles alone.
        empty: share of empty descriptions.
        with_keywords: share of named concepts that are described by name and keywords.
        keywords_only: share of named concepts that are described by keywords alone.
        group_size: most pictures of one description.
        min_group: fewest, up to which the pictures of a keyword are repeated.
        queue_size: training items that are drawn at a time.
    """

    name_style: float = 0.68
    missing_style: float = 0.05
    keyword: float = 0.17
    style: float = 0.04
    empty: float = 0.06
    with_keywords: float = 0.25
    keywords_only: float = 0.3
    group_size: int = 128
    min_group: int = 24
    queue_size: int = 2048


@dataclass(frozen=True)
class Group:
    """A description, as phrases, and the indices of the pictures that fit it."""

    phrases: tuple[str, ...]
    pictures: list[int]


class PromptSampler:
    """Draws groups of (description, fitting pictures) from a data set."""

    def __init__(self, data: PictureDataset, encoder: DescriptionEncoder, config: PromptConfig):
        self.data, self.encoder, self.config = data, encoder, config
        self._phrases: dict[str, np.ndarray] = {}
        self.pictures_of: dict[int, list[int]] = {}
        self.by_look: dict[tuple[int, int], list[int]] = {}
        self.by_style: dict[int, list[int]] = {}
        for i, (concept, style) in enumerate(zip(data.concept.tolist(), data.style.tolist())):
            self.pictures_of.setdefault(concept, []).append(i)
            self.by_look.setdefault((concept, style), []).append(i)
            if style >= 0:
                self.by_style.setdefault(style, []).append(i)
        by_word: dict[str, list[int]] = {}
        concepts_of: dict[str, set[int]] = {}
        for concept, pictures in self.pictures_of.items():
            c = data.concepts[concept]
            for word in {*c.keywords, c.group.replace("-", " "), c.subgroup.replace("-", " ")} - {""}:
                by_word.setdefault(word, []).extend(pictures)
                concepts_of.setdefault(word, set()).add(concept)
        self.by_word = {word: by_word[word] for word in sorted(by_word) if len(concepts_of[word]) > 1}
        self.concepts = sorted(self.pictures_of)

    def style_phrase(self, style: int) -> str:
        return f"{self.data.styles[style]} style"

    def wording(self, concept: int, rng: random.Random) -> list[str]:
        """Name, name and keywords, or keywords alone."""
        c, draw = self.data.concepts[concept], rng.random()
        if not c.keywords or draw >= self.config.with_keywords + self.config.keywords_only:
            return [c.name]
        keywords = list(c.keywords)
        if draw < self.config.with_keywords:
            return [c.name, *rng.sample(keywords, min(len(keywords), rng.randint(1, 3)))]
        return rng.sample(keywords, min(len(keywords), rng.randint(2, 4)))

    def vectors(self, descriptions: Sequence[Sequence[str]]) -> torch.Tensor:
        """What the encoder gives for the joined phrases, (N, D), from cached sums of the rows of each phrase."""
        dim = self.encoder.config.dim
        sums = np.stack(
            [sum((self._phrase(p) for p in phrases), np.zeros(dim, np.float32)) for phrases in descriptions]
        )
        norm = np.sqrt(np.square(sums).mean(1, keepdims=True))
        return torch.from_numpy((sums / np.maximum(norm, 1e-6)).astype(np.float32))

    def _phrase(self, phrase: str) -> np.ndarray:
        if phrase not in self._phrases:
            self._phrases[phrase] = self.encoder.token_sum(phrase).numpy()
        return self._phrases[phrase]

    def groups(self, rng: random.Random) -> list[Group]:
        """About ``queue_size`` items in groups, the kinds in their shares."""
        out: list[Group] = []
        for kind in ("name_style", "missing_style", "keyword", "style", "empty"):
            wanted = round(getattr(self.config, kind) * self.config.queue_size)
            count = 0
            for group in self._kind(kind, rng):
                if count >= wanted:
                    break
                pictures = group.pictures
                if kind in ("style", "empty"):
                    pictures = rng.sample(pictures, min(len(pictures), wanted - count))
                out.append(Group(group.phrases, self._resize(pictures, kind, rng)))
                count += len(out[-1].pictures)
        return out

    def _resize(self, pictures: list[int], kind: str, rng: random.Random) -> list[int]:
        if len(pictures) > self.config.group_size:
            return rng.sample(pictures, self.config.group_size)
        if kind == "keyword":
            return pictures * -(-self.config.min_group // len(pictures))
        return pictures

    def _kind(self, kind: str, rng: random.Random) -> Iterator[Group]:
        data = self.data
        words, styles = list(self.by_word), sorted(self.by_style)
        everything = list(range(len(data)))
        while True:
            if kind == "name_style":
                i = rng.randrange(len(data))
                concept, style = int(data.concept[i]), int(data.style[i])
                phrases = self.wording(concept, rng)
                same = self.by_look[concept, style]
                yield Group((*phrases, *([self.style_phrase(style)] if style >= 0 else [])), same)
            elif kind == "missing_style":
                concept = rng.choice(self.concepts)
                missing = [s for s in styles if (concept, s) not in self.by_look]
                if not missing:
                    if all((c, s) in self.by_look for c in self.concepts for s in styles):
                        return
                    continue
                phrases = self.wording(concept, rng)
                yield Group((*phrases, self.style_phrase(rng.choice(missing))), [rng.choice(self.pictures_of[concept])])
            elif kind == "keyword":
                if not words:
                    return
                word = rng.choice(words)
                pictures, phrases = self.by_word[word], [word]
                if styles and rng.random() < 0.8:
                    style = rng.choice(styles)
                    in_style = [i for i in pictures if data.style[i] == style]
                    if len(in_style) > 1:
                        pictures, phrases = in_style, [word, self.style_phrase(style)]
                yield Group(tuple(phrases), pictures)
            elif kind == "style":
                if not styles:
                    return
                style = rng.choice(styles)
                yield Group((self.style_phrase(style),), self.by_style[style])
            else:
                yield Group((), everything)
