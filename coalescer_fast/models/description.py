"""Descriptions as vectors: a static token table, pooled, with no transformer to run."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """What a description was taken as.

    Attributes:
        prompt: the description.
        name: the known name nearest to it.
        similarity: how near, from -1 to 1: the cosine of the two, or what the lexicon says; 1 for the name itself.
        description: what is drawn: the name, with the art styles that the prompt names.
    """

    prompt: str
    name: str
    similarity: float
    description: str


@dataclass(frozen=True)
class Entry:
    """What an entry of the lexicon means.

    Attributes:
        name: row of the known name.
        similarity: of the entry to it, from 0 to 1.
    """

    name: int
    similarity: float


class DescriptionEncoder(ModelMixin, ConfigMixin):
    r"""Vectors (and token rows) of descriptions, from a table of one row a WordPiece token.

    ``d = s / |s|`` with ``s`` the sum of ``table[t] * scale`` over the description's tokens t and
    ``|s| = ||s||_2 / sqrt(D)``; the empty description, and one of unknown tokens only, is the zero vector. The table is
    distilled from all-MiniLM-L6-v2 (Apache-2.0) and weighted by smooth inverse frequency
    (`coalescer_fast.training.build_text_table`).

    The encoder also knows the art styles, and which of them exist for the names that the model was trained on, see
    `with_styles`.

    `match` finds the known name that is nearest to a description. With ``match_dim`` it has a second table for that,
    and a vector of its own for each name, trained so that wordings are near the name that they mean, and a lexicon of
    words and phrases whose name is told (`coalescer_fast.training.matcher`).

    Args:
        vocab_size: rows of the table.
        dim: D, columns of the table.
        vocab_bytes: length of the vocabulary as UTF-8, its tokens joined by newlines.
        styles: style words; a description names a style as "<word> style".
        num_names: number of known names.
        names_bytes: length of the known names as UTF-8, joined by newlines.
        match_dim: columns of the table that `match` uses; 0 for none, then it uses ``table``.
        lexicon_size: entries of the lexicon.
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
        match_dim: int = 0,
        lexicon_size: int = 0,
    ):
        super().__init__()
        self._kept = _Kept()
        self.register_buffer("table", torch.zeros(vocab_size, dim, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(dim, dtype=torch.float32))
        self.register_buffer("vocab", torch.zeros(vocab_bytes, dtype=torch.uint8))
        self.register_buffer("names", torch.zeros(names_bytes, dtype=torch.uint8))
        self.register_buffer("name_styles", torch.zeros(num_names, len(styles), dtype=torch.uint8))
        if match_dim:
            self.register_buffer("match_table", torch.zeros(vocab_size, match_dim, dtype=torch.int8))
            self.register_buffer("match_scale", torch.ones(match_dim, dtype=torch.float32))
            self.register_buffer("match_names", torch.zeros(num_names, match_dim, dtype=torch.int8))
        if lexicon_size:
            # hashes of the entries, rising; of each the row of its name (two bytes) and its similarity in 255ths
            self.register_buffer("lexicon_keys", torch.zeros(lexicon_size, dtype=torch.int64))
            self.register_buffer("lexicon_values", torch.zeros(lexicon_size, 3, dtype=torch.uint8))

    @classmethod
    def from_table(
        cls,
        table: np.ndarray,
        scale: np.ndarray,
        vocab: np.ndarray,
        styles: Sequence[str] = (),
        names: Sequence[str] = (),
        name_styles: np.ndarray | None = None,
        matcher: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
        lexicon: Mapping[str, Entry] | None = None,
    ) -> DescriptionEncoder:
        """Make an encoder of the arrays that `build_text_table` writes.

        Args:
            table: (vocab_size, D) int8.
            scale: (D,) float32.
            vocab: (vocab_bytes,) uint8.
            styles: style words.
            names: known names.
            name_styles: (len(names), len(styles)), non-zero where a style exists for a name.
            matcher: the table (vocab_size, match_dim) int8 and its scale (match_dim,) float32 that `match` uses, and
                the vectors of the names, (len(names), match_dim) int8, of any length.
            lexicon: words and phrases, as `plain` leaves them, whose name is told.
        """
        names_utf8 = "\n".join(names).encode("utf-8")
        match_dim = 0 if matcher is None else matcher[0].shape[1]
        encoder: DescriptionEncoder = cls(
            *table.shape, len(vocab), tuple(styles), len(names), len(names_utf8), match_dim, len(lexicon or {})
        )
        encoder.table.copy_(torch.from_numpy(table))
        encoder.scale.copy_(torch.from_numpy(scale))
        encoder.vocab.copy_(torch.from_numpy(vocab.copy()))
        encoder.names.copy_(torch.frombuffer(bytearray(names_utf8), dtype=torch.uint8) if names_utf8 else encoder.names)
        if name_styles is not None:
            encoder.name_styles.copy_(torch.from_numpy(np.asarray(name_styles) != 0))
        if matcher is not None:
            for name, array in zip(("match_table", "match_scale", "match_names"), matcher):
                encoder.get_buffer(name).copy_(torch.from_numpy(array))
        if lexicon:
            entries = sorted({_key(text): entry for text, entry in lexicon.items()}.items())
            values = [(e.name % 256, e.name // 256, round(255 * e.similarity)) for _, e in entries]
            encoder.lexicon_keys.copy_(torch.tensor([key for key, _ in entries], dtype=torch.int64))
            encoder.lexicon_values.copy_(torch.tensor(values, dtype=torch.uint8))
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
        no token is an unknown word. All words of an entry of the lexicon are known.
        """
        derived = self._derived
        found = derived.remembered(derived.words, text, lambda: self._words(text))
        return {**found}

    def _words(self, text: str) -> dict[str, bool]:
        is_entry = self._look_up(plain(self._split(spell(text))[0])) is not None
        return {word: is_entry or known for word, known in self._words_of_table(text).items()}

    def _words_of_table(self, text: str) -> dict[str, bool]:
        """`words`, without what the lexicon knows."""
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
        # one by one, so that a vector's bits do not depend on the others; each once, for on a GPU one is ten launches
        descriptions = list(descriptions)
        vectors = {text: self._vector(text) for text in dict.fromkeys(descriptions)}
        return torch.stack([vectors[text] for text in descriptions])

    def _vector(self, text: str) -> torch.Tensor:
        total = self.token_sum(text)
        return total / total.square().mean().sqrt().clamp_min(1e-6)

    def token_sum(self, text: str) -> torch.Tensor:
        """Add up the rows of a text's tokens to (D,), which `forward` scales. A text's sum is that of its parts."""
        return self._rows(self.token_ids(text)).sum(0)

    def token_rows(self, descriptions: Sequence[str], max_length: int = 77) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up the rows of the tokens of N texts, for cross-attention.

        Returns:
            Rows (N, max_length, D), float32, and the mask (N, max_length), True where there is a token. A text without
            tokens has one row of zeros.
        """
        descriptions = list(descriptions)
        place = {text: n for n, text in enumerate(dict.fromkeys(descriptions))}
        device = self.table.device
        rows = torch.zeros(len(place), max_length, self.config.dim, dtype=torch.float32, device=device)
        mask = torch.zeros(len(place), max_length, dtype=torch.bool, device=device)
        for text, n in place.items():
            ids = self.token_ids(text)[:max_length]
            rows[n, : len(ids)] = self._rows(ids)
            mask[n, : max(1, len(ids))] = True
        if len(place) < len(descriptions):
            order = [place[text] for text in descriptions]
            rows, mask = rows[order], mask[order]
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
        return bool(self._split(description)[1])

    def _split(self, description: str) -> tuple[str, list[str]]:
        """A description without its art styles, and the style words."""
        if not self.config.styles:
            return description, []
        words = "|".join(map(re.escape, self.config.styles))
        phrase = re.compile(rf"\b({words}) style\b", re.IGNORECASE)
        return phrase.sub("", description), [word.lower() for word in phrase.findall(description)]

    def match(self, description: str) -> Match | None:
        """Find the known name that says what a description says, whatever the style.

        Returns:
            The match; None for a description without a known token, and if no name is known.
        """
        derived = self._derived
        if not self.config.num_names:
            return None
        found = derived.remembered(derived.matches, description, lambda: (self._match(description),))
        return found[0]

    def _match(self, description: str) -> Match | None:
        derived = self._derived
        text, styles = self._split(description)
        said = plain(spell(text))
        row = derived.name_rows.get(said)
        if row is not None:
            return Match(description, derived.names[row], 1.0, description)
        entry = self._look_up(said)
        if entry is None:
            cosines = self._cosines(text)
            if cosines is None:
                return None
            row = int(cosines.argmax())
            entry = Entry(row, min(1.0, float(cosines[row])))
        name = derived.names[entry.name]
        drawn = ", ".join([name, *(f"{word} style" for word in styles)])
        return Match(description, name, entry.similarity, drawn)

    def closeness(self, description: str) -> tuple[float, float]:
        """Compare a description with the name that it is taken as, by the table of words alone.

        The table knows nothing of `Match.similarity` where that is 1 or the lexicon's, and may contradict it. Where the
        lexicon says what a description means and the table knows none of its words, such as one of another language,
        it is the name that is compared.

        Returns:
            The cosine of the two, and how much more that is than the largest cosine with any other known name. Both are
            0 for a description without a known token, and if no name is known.
        """
        derived = self._derived
        return derived.remembered(derived.closeness, description, lambda: self._closeness(description))

    def _closeness(self, description: str) -> tuple[float, float]:
        match, text = self.match(description), self._split(description)[0]
        is_entry = self._look_up(plain(spell(text))) is not None
        if match is not None and is_entry and not any(self._words_of_table(text).values()):
            text = match.name
        cosines = None if match is None else self._cosines(text)
        if match is None or cosines is None:
            return 0.0, 0.0
        row = self._derived.name_rows[plain(match.name)]
        others = np.delete(cosines, row)
        return float(cosines[row]), float(cosines[row] - others.max()) if len(others) else 0.0

    def _cosines(self, text: str) -> NDArray[np.float32] | None:
        """Those of a text and all known names, by the table that `match` uses; None without a known token."""
        ids = self.token_ids(text)
        if not ids:
            return None
        # not a matrix product, whose bits depend on the number of threads
        found: NDArray[np.float32] = (self._derived.name_vectors(self) * self._match_vector(ids)).sum(1)
        return found

    def _look_up(self, said: str) -> Entry | None:
        """The entry of the lexicon for a text as `plain` leaves it, without an article or an ending of the plural."""
        if not self.config.lexicon_size:
            return None
        keys = self.lexicon_keys.cpu().numpy()
        for form in _forms(said):
            key = _key(form)
            place = int(np.searchsorted(keys, key))
            if place < len(keys) and keys[place] == key:
                low, high, similarity = self.lexicon_values[place].tolist()
                return Entry(low + 256 * high, similarity / 255)
        return None

    def _match_vector(self, ids: list[int]) -> NDArray[np.float32]:
        """The vector of a text, of length 1, that is compared with those of the names."""
        if self.config.match_dim:
            rows = self.match_table[torch.tensor(ids, dtype=torch.long)].float() * self.match_scale.float()
        else:
            rows = self._rows(ids)
        total: NDArray[np.float32] = rows.sum(0).cpu().numpy()
        total /= np.maximum(np.sqrt(np.square(total).sum()), np.float32(1e-12))
        return total

    def styles_of(self, description: str) -> list[str]:
        """The styles that exist for the known name that a description matches; all if there is none."""
        styles, match = list(self.config.styles), self.match(description)
        if match is None:
            return styles
        row = self._derived.name_rows[plain(match.name)]
        return [word for word, exists in zip(styles, self.name_styles[row].tolist()) if exists] or styles

    def with_styles(self, descriptions: Sequence[str], uniform: Sequence[float]) -> list[str]:
        """Add a style to each description that names none; the empty description stays empty.

        Args:
            descriptions: N texts.
            uniform: N numbers u in [0, 1), each of which chooses the ``floor(u * n)``-th of the n styles that exist.
        """
        descriptions = list(descriptions)
        choices = {text: self._styles_to_add(text) for text in dict.fromkeys(descriptions)}
        out = []
        for text, u in zip(descriptions, uniform):
            if styles := choices[text]:
                text = f"{text}, {styles[min(int(u * len(styles)), len(styles) - 1)]} style"
            out.append(text)
        return out

    def _styles_to_add(self, text: str) -> list[str]:
        without = self.config.styles and self.token_ids(text) and not self.names_style(text)
        return self.styles_of(text) if without else []


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
        self.name_words = frozenset(re.findall(r"\w+", "\n".join((*encoder.known_names, *config.styles)).lower()))
        self.names = encoder.known_names
        self.name_rows = {plain(name): row for row, name in reversed([*enumerate(self.names)])}
        # of each text, its token ids, its words, what it matches, and how close that is
        self.ids: dict[str, list[int]] = {}
        self.words: dict[str, dict[str, bool]] = {}
        self.matches: dict[str, tuple[Match | None]] = {}
        self.closeness: dict[str, tuple[float, float]] = {}
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
        """Vectors (names, match_dim) of length 1 of the known names."""
        if self._vectors is None:
            if encoder.config.match_dim:
                vectors = encoder.match_names.float().cpu().numpy()
                length = np.sqrt(np.square(vectors).sum(1, keepdims=True))
                self._vectors = vectors / np.maximum(length, np.float32(1e-12))
            else:
                self._vectors = np.stack([encoder._match_vector(encoder.token_ids(name)) for name in self.names])
        return self._vectors


def plain(text: str) -> str:
    """A description without what does not change it: capitals, further spaces, and punctuation at its ends."""
    return " ".join(text.lower().split()).strip(" ,;.!?")


# of the languages in the lexicon, and what English has in their place
ARTICLE = re.compile(
    "^(a|an|the|some|one|my|ein|eine|einen|der|die|das|un|une|le|la|les|el|los|las|una|il|lo|um|uma|o|een|het|de) "
)


def _forms(said: str) -> Iterator[str]:
    """A text, and what is left of it without an article and without an ending of the plural."""
    bare = ARTICLE.sub("", said)
    for text in dict.fromkeys((said, bare)):
        yield text
        for ending in ("s", "es"):
            if text.endswith(ending):
                yield text.removesuffix(ending)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little", signed=True)


def _lines(utf8: torch.Tensor, name: str) -> list[str]:
    try:
        return bytes(utf8.cpu().numpy()).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no UTF-8 text ({error.reason}): load the description encoder anew") from error
