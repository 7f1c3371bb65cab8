"""Descriptions as vectors: a static token table, pooled, with no transformer to run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from tokenizers import BertWordPieceTokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class DescriptionEncoder(ModelMixin, ConfigMixin):
    r"""Vectors (and token rows) of descriptions, from a table of one row a WordPiece token.

    ``d = s / |s|`` with ``s`` the sum of ``table[t] * scale`` over the description's tokens t and ``|s| = ||s||_2 / sqrt(D)``; the empty
    description, and one of unknown tokens only, is the zero vector. The table is distilled from all-MiniLM-L6-v2 (Apache-2.0) and
    weighted by smooth inverse frequency (`coalescer_fast.training.build_text_table`).

    The encoder also knows the art styles, and which of them exist for the names that the model was trained on, see `with_styles`.

    Args:
        vocab_size, dim: rows and columns of the table.
        vocab_bytes: length of the vocabulary as UTF-8, its tokens joined by newlines.
        styles: style words; a description names a style as "<word> style".
        num_names, names_bytes: number of known names, and their length as UTF-8, joined by newlines.
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
        self.register_buffer("table", torch.zeros(vocab_size, dim, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(dim))
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
        """An encoder of the arrays that `build_text_table` writes.

        ``name_styles``: (len(names), len(styles)), non-zero where a style exists for a name.
        """
        names_utf8 = "\n".join(names).encode("utf-8")
        encoder = cls(*table.shape, len(vocab), tuple(styles), len(names), len(names_utf8))
        encoder.table.copy_(torch.from_numpy(table))
        encoder.scale.copy_(torch.from_numpy(scale))
        encoder.vocab.copy_(torch.from_numpy(vocab.copy()))
        encoder.names.copy_(torch.frombuffer(bytearray(names_utf8), dtype=torch.uint8) if names_utf8 else encoder.names)
        if name_styles is not None:
            encoder.name_styles.copy_(torch.from_numpy(np.asarray(name_styles) != 0))
        return encoder

    @cached_property
    def tokenizer(self) -> BertWordPieceTokenizer:
        tokens = bytes(self.vocab.cpu().numpy()).decode("utf-8").split("\n")
        return BertWordPieceTokenizer({token: i for i, token in enumerate(tokens)}, lowercase=True)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for token in SPECIAL_TOKENS if (i := self.tokenizer.token_to_id(token)) is not None)

    def token_ids(self, text: str) -> list[int]:
        """WordPiece ids of a description; commas and semicolons only separate, unknown pieces are left out."""
        ids = self.tokenizer.encode(re.sub("[,;]", " ", text), add_special_tokens=False).ids
        return [i for i in ids if i not in self._special_ids]

    def forward(self, descriptions: Sequence[str]) -> torch.Tensor:
        """Description vectors (N, D), float32, of RMS 1 or 0."""
        pooled = torch.stack([self.token_sum(text) for text in descriptions])
        return pooled / pooled.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)

    def token_sum(self, text: str) -> torch.Tensor:
        """The sum of the rows of a text's tokens, (D,): what `forward` scales; sums of phrases add up to that of the whole."""
        return self._rows(self.token_ids(text)).sum(0)

    def token_rows(self, descriptions: Sequence[str], max_length: int = 77) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (N, max_length, D), float32, for cross-attention, and the mask (N, max_length), True where there is a token.

        A description without tokens attends to one row of zeros.
        """
        rows = torch.zeros(len(descriptions), max_length, self.config.dim, dtype=torch.float32, device=self.table.device)
        mask = torch.zeros(len(descriptions), max_length, dtype=torch.bool, device=self.table.device)
        for n, text in enumerate(descriptions):
            ids = self.token_ids(text)[:max_length]
            rows[n, : len(ids)] = self._rows(ids)
            mask[n, : max(1, len(ids))] = True
        return rows, mask

    def _rows(self, ids: list[int]) -> torch.Tensor:
        index = torch.tensor(ids, dtype=torch.long, device=self.table.device)
        return self.table[index].float() * self.scale.float()

    @property
    def known_names(self) -> list[str]:
        """The names that the model was trained on, in the order of ``name_styles``."""
        return bytes(self.names.cpu().numpy()).decode("utf-8").split("\n") if self.config.num_names else []

    def names_style(self, description: str) -> bool:
        """Whether the description says "<word> style" with one of the encoder's style words."""
        return any(re.search(rf"\b{re.escape(word)} style\b", description, re.IGNORECASE) for word in self.config.styles)

    def styles_of(self, description: str) -> list[str]:
        """The styles that exist for the known name nearest to the description (largest cosine); all styles if no name is known."""
        styles = list(self.config.styles)
        if not self.config.num_names:
            return styles
        nearest = int((self._name_vectors @ self([description])[0].cpu()).argmax())
        return [word for word, exists in zip(styles, self.name_styles[nearest].tolist()) if exists] or styles

    def with_styles(self, descriptions: Sequence[str], uniform: Sequence[float]) -> list[str]:
        """Each description, with a style added where it names none: the ``floor(u * n)``-th of its n styles, u in [0, 1).

        The empty description stays empty.
        """
        out = []
        for text, u in zip(descriptions, uniform):
            if self.config.styles and self.token_ids(text) and not self.names_style(text):
                styles = self.styles_of(text)
                text = f"{text}, {styles[min(int(u * len(styles)), len(styles) - 1)]} style"
            out.append(text)
        return out

    @cached_property
    def _name_vectors(self) -> torch.Tensor:
        return self(self.known_names).cpu()
