"""Descriptions as vectors: a static token table, pooled, with no transformer to run."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from numpy.typing import NDArray
from tokenizers import BertWordPieceTokenizer, Encoding

from .emoji import spell

T = TypeVar("T")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_REMEMBERED = 4096  # texts whose tokens, words and nearest name are remembered
# what WordPiece cuts off the end of a word
ENDINGS = frozenset(("s", "es", "d", "ed", "r", "er", "ing", "y", "ly", "ish"))
SHORTEST = 3  # letters of a word that others are made of: shorter pieces are found in any jumble of letters


@dataclass(frozen=True)
class Match:
    """The known name that is nearest to a description.

    Attributes:
        name: the name.
        similarity: its cosine to the description, whatever the style.
    """

    name: str
    similarity: float


class DescriptionEncoder(ModelMixin, ConfigMixin):
    r"""Vectors (and token rows) of descriptions, from a table of one row a WordPiece token.

    ``d = s / |s|`` with ``s`` the sum of ``table[t] * scale`` over the description's tokens t and
    ``|s| = ||s||_2 / sqrt(D)``; the empty description, and one of unknown tokens only, is the zero vector. The table is
    distilled from all-MiniLM-L6-v2 (Apache-2.0) and weighted by smooth inverse frequency
    (`coalescer_fast.training.build_text_table`).

    The encoder also knows the art styles, and which of them exist for the names that the model was trained on, see
    `with_styles`.

    Args:
        vocab_size: rows of the table.
        dim: D, columns of the table.
        vocab_bytes: length of the vocabulary as UTF-8, its tokens joined by newlines.
        styles: style words; a description names a style as "<word> style".
        num_names: number of known names.
        names_bytes: length of the known names as UTF-8, joined by newlines.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 30522,
        dim: int = 128,
        vocab_bytes: int = 0,
        styles: tuple[str, ...] = (),
        num_names: int = 0,
        names_bytes: int = 0,
    ):
        super().__init__()
        self._kept = _Kept()
        self.register_buffer("table", torch.zeros(vocab_size, dim, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(dim, dtype=torch.float32))
        self.register_buffer("vocab", torch.zeros(vocab_bytes, dtype=torch.uint8))
        self.register_buffer("names", torch.zeros(names_bytes, dtype=torch.uint8))
        self.register_buffer("name_styles", torch.zeros(num_names, len(styles), dtype=torch.uint8))

    @classmethod
    def from_table(
        cls,
        table: np.ndarray,
        scale: np.ndarray,
        vocab: np.ndarray,
        styles: Sequence[str] = (),
        names: Sequence[str] = (),
        name_styles: np.ndarray | None = None,
    ) -> DescriptionEncoder:
        """Make an encoder of the arrays that `build_text_table` writes.

        Args:
            table: (vocab_size, D) int8.
            scale: (D,) float32.
            vocab: (vocab_bytes,) uint8.
            styles: style words.
            names: known names.
            name_styles: (len(names), len(styles)), non-zero where a style exists for a name.
        """
        names_utf8 = "\n".join(names).encode("utf-8")
        encoder: DescriptionEncoder = cls(*table.shape, len(vocab), tuple(styles), len(names), len(names_utf8))
        encoder.table.copy_(torch.from_numpy(table))
        encoder.scale.copy_(torch.from_numpy(scale))
        encoder.vocab.copy_(torch.from_numpy(vocab.copy()))
        encoder.names.copy_(torch.frombuffer(bytearray(names_utf8), dtype=torch.uint8) if names_utf8 else encoder.names)
        if name_styles is not None:
            encoder.name_styles.copy_(torch.from_numpy(np.asarray(name_styles) != 0))
        return encoder

    @property
    def tokenizer(self) -> BertWordPieceTokenizer:
        """The WordPiece tokenizer of the vocabulary."""
        return self._derived.tokenizer

    @property
    def _derived(self) -> _Derived:
        """What is derived from the buffers, made anew when they have changed."""
        state = tuple(
            (b.data_ptr(), 0 if b.is_inference() else b._version) for b in self._buffers.values() if b is not None
        )
        found = self._kept.derived
        if found is None or found.state != state:
            found = self._kept.derived = _Derived(self, state)
        return found

    def _encode(self, text: str) -> Encoding:
        found: Encoding = self.tokenizer.encode(re.sub("[,;]", " ", spell(text)), add_special_tokens=False)
        return found

    def token_ids(self, text: str) -> list[int]:
        """WordPiece ids of a description.

        Emoji are read as their names, commas and semicolons only separate, unknown pieces are left out.
        """
        derived = self._derived
        found = derived.remembered(
            derived.ids, text, lambda: [i for i in self._encode(text).ids if i not in derived.special_ids]
        )
        return [*found]

    def words(self, text: str) -> dict[str, bool]:
        """List the words of a description, in order and as the tokenizer has them, and whether each is known.

        A word is known if it is a word of a known name (or its plural), or a token, or made of such words and endings,
        as "snowboarder". Others come apart into pieces that mean nothing. Punctuation is no word, and a symbol that is
        no token is an unknown word.
        """
        derived = self._derived
        found = derived.remembered(derived.words, text, lambda: self._words(text))
        return {**found}

    def _words(self, text: str) -> dict[str, bool]:
        encoding, spelled = self._encode(text), spell(text)
        pieces: dict[int | None, list[tuple[str, int, int]]] = {}
        for word, token, i, (start, end) in zip(encoding.word_ids, encoding.tokens, encoding.ids, encoding.offsets):
            if token == "[UNK]" or i not in self._derived.special_ids:
                pieces.setdefault(word, []).append((token, start, end))
        found: dict[str, bool] = {}
        for parts in pieces.values():
            name, tokens = spelled[parts[0][1] : parts[-1][2]].lower(), [token for token, _, _ in parts]
            symbol = tokens == ["[UNK]"] and unicodedata.category(name[0]).startswith("S")
            if name not in found and (symbol or any(map(str.isalnum, name))):
                found[name] = self._knows(name, tokens)
        return found

    def _knows(self, word: str, tokens: Sequence[str]) -> bool:
        names = self._derived.name_words
        if word in names or word.removesuffix("s") in names or word.removesuffix("es") in names:
            return True
        first, *rest = [token.removeprefix("##") for token in tokens]
        if not rest:
            return first != "[UNK]" and (len(first) > 1 or first in "ai" or not first.isascii() or first.isdecimal())
        return self._is_word(first) and all(self._is_word(part) or part in ENDINGS for part in rest)

    def _is_word(self, text: str) -> bool:
        return len(text) >= SHORTEST and self.tokenizer.token_to_id(text) is not None

    def forward(self, descriptions: Sequence[str]) -> torch.Tensor:
        """Encode N texts as vectors (N, D), float32, of RMS 1 or 0."""
        # one by one, so that a vector's bits do not depend on the others
        sums = [self.token_sum(text) for text in descriptions]
        return torch.stack([s / s.square().mean().sqrt().clamp_min(1e-6) for s in sums])

    def token_sum(self, text: str) -> torch.Tensor:
        """Add up the rows of a text's tokens to (D,), which `forward` scales. A text's sum is that of its parts."""
        return self._rows(self.token_ids(text)).sum(0)

    def token_rows(self, descriptions: Sequence[str], max_length: int = 77) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up the rows of the tokens of N texts, for cross-attention.

        Returns:
            Rows (N, max_length, D), float32, and the mask (N, max_length), True where there is a token. A text without
            tokens has one row of zeros.
        """
        rows = torch.zeros(
            len(descriptions), max_length, self.config.dim, dtype=torch.float32, device=self.table.device
        )
        mask = torch.zeros(len(descriptions), max_length, dtype=torch.bool, device=self.table.device)
        for n, text in enumerate(descriptions):
            ids = self.token_ids(text)[:max_length]
            rows[n, : len(ids)] = self._rows(ids)
            mask[n, : max(1, len(ids))] = True
        return rows, mask

    def _rows(self, ids: list[int]) -> torch.Tensor:
        index = torch.tensor(ids, dtype=torch.long, device=self.table.device)
        rows: torch.Tensor = self.table[index].float() * self.scale.float()
        return rows

    @property
    def known_names(self) -> list[str]:
        """The names that the model was trained on, in the order of ``name_styles``."""
        return _lines(self.names, "names") if self.config.num_names else []

    def names_style(self, description: str) -> bool:
        """Whether the description says "<word> style" with one of the encoder's style words."""
        return any(
            re.search(rf"\b{re.escape(word)} style\b", description, re.IGNORECASE) for word in self.config.styles
        )

    def styles_of(self, description: str) -> list[str]:
        """The styles that exist for the known name nearest to the description, by cosine; all if no name is known."""
        styles = list(self.config.styles)
        if not self.config.num_names:
            return styles
        nearest, _ = self._nearest(description)
        return [word for word, exists in zip(styles, self.name_styles[nearest].tolist()) if exists] or styles

    def match(self, description: str) -> Match | None:
        """Find the known name nearest to a description, whatever the style.

        Returns:
            The match; None for a description without a known token, and if no name is known.
        """
        if self.names_style(description):
            words = "|".join(map(re.escape, self.config.styles))
            description = re.sub(rf",?\s*\b({words}) style\b", "", description, flags=re.IGNORECASE)
        if not self.config.num_names or not self.token_ids(description):
            return None
        row, cosine = self._nearest(description)
        return Match(self._derived.names[row], cosine)

    def _nearest(self, description: str) -> tuple[int, float]:
        """The row of the known name nearest to a description, and their cosine."""
        derived = self._derived

        def find() -> tuple[int, float]:
            # not a matrix product, whose bits depend on the number of threads
            cosines = (derived.name_vectors(self) * self([description])[0].cpu().numpy()).sum(1) / self.config.dim
            return int(cosines.argmax()), float(cosines.max())

        return derived.remembered(derived.nearest, description, find)

    def with_styles(self, descriptions: Sequence[str], uniform: Sequence[float]) -> list[str]:
        """Add a style to each description that names none; the empty description stays empty.

        Args:
            descriptions: N texts.
            uniform: N numbers u in [0, 1), each of which chooses the ``floor(u * n)``-th of the n styles that exist.
        """
        out = []
        for text, u in zip(descriptions, uniform):
            if self.config.styles and self.token_ids(text) and not self.names_style(text):
                styles = self.styles_of(text)
                text = f"{text}, {styles[min(int(u * len(styles)), len(styles) - 1)]} style"
            out.append(text)
        return out


class _Kept:
    """Holds what an encoder has derived, so that the encoder's own attributes stay as they are."""

    derived: _Derived | None = None


class _Derived:
    """What an encoder derives from its buffers in one state: the tokenizer, and what it has found for texts."""

    def __init__(self, encoder: DescriptionEncoder, state: tuple[tuple[int, int], ...]):
        self.state = state
        tokens = _lines(encoder.vocab, "vocab")
        config = encoder.config
        if config.vocab_bytes and len(tokens) != config.vocab_size:
            counts = f"vocab has {len(tokens)} tokens and table {config.vocab_size} rows"
            raise ValueError(f"{counts}: load the description encoder anew")
        self.tokenizer = BertWordPieceTokenizer({token: i for i, token in enumerate(tokens)}, lowercase=True)
        ids = (self.tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
        self.special_ids = frozenset(i for i in ids if i is not None)
        # style words are known, whatever tokens they consist of
        self.names = encoder.known_names
        self.name_words = frozenset(re.findall(r"\w+", "\n".join((*self.names, *config.styles)).lower()))
        # of each text, its token ids, its words, and the known name nearest to it: its row and the cosine
        self.ids: dict[str, list[int]] = {}
        self.words: dict[str, dict[str, bool]] = {}
        self.nearest: dict[str, tuple[int, float]] = {}
        self._vectors: NDArray[np.float32] | None = None

    @staticmethod
    def remembered(table: dict[str, T], text: str, make: Callable[[], T]) -> T:
        """Return ``table[text]``, made if it is not there. A table that is full is emptied."""
        found = table.get(text)
        if found is None:
            if len(table) >= MAX_REMEMBERED:
                table.clear()
            found = table[text] = make()
        return found

    def name_vectors(self, encoder: DescriptionEncoder) -> NDArray[np.float32]:
        """Vectors (names, D) of the known names."""
        if self._vectors is None:
            self._vectors = encoder(self.names).cpu().numpy()
        return self._vectors


def _lines(utf8: torch.Tensor, name: str) -> list[str]:
    try:
        return bytes(utf8.cpu().numpy()).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no UTF-8 text ({error.reason}): load the description encoder anew") from error
