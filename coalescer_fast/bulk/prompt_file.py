"""A file of prompts: read whole, and checked row by row."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
PROMPT_COLUMN = "prompt"
STRIDE = 2**40  # between the noise of one picture of a prompt and of the next
MOST_PICTURES = 2**10  # of a prompt
FIELD_LIMIT = 2**24  # characters of a field of a CSV file


class Prompt(NamedTuple):
    """One row of a file of prompts.

    Attributes:
        row: its number, from 0.
        id: what the file calls it, else its row.
        number: what its noise is drawn from, see `noise_number`.
        text: what is drawn.
    """

    row: int
    id: str
    number: int
    text: str


@dataclass(frozen=True)
class PromptFile:
    """The rows of a file.

    Attributes:
        path: the file.
        sha256: of its bytes.
        texts: the prompts.
        ids: of each prompt, or None where the file has none.
    """

    path: Path
    sha256: str
    texts: list[str]
    ids: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, start: int, stop: int) -> list[Prompt]:
        """The prompts of these rows."""
        return [self._row(row) for row in range(start, min(stop, len(self)))]

    def _row(self, row: int) -> Prompt:
        if self.ids is None:
            return Prompt(row, str(row), row, self.texts[row])
        return Prompt(row, self.ids[row], hashed(self.ids[row]), self.texts[row])


def hashed(prompt_id: str) -> int:
    """The 64-bit number of an id: the first 8 bytes of its BLAKE2b hash, the lowest first."""
    return int.from_bytes(hashlib.blake2b(prompt_id.encode(), digest_size=8).digest(), "little")


def noise_number(number: int, picture: int) -> int:
    """Which picture of `PhiloxGenerator` is drawn as picture ``picture``, from 0, of the prompt of this number.

    The first one is the prompt's number itself: its row, or the hash of its id. Each further one is 2^40 beyond it, so
    that rows, which are fewer, share none. That hashes share none is checked when a file is read.
    """
    return (number + picture * STRIDE) % 2**64


def read(
    path: str | Path, prompt_column: str = PROMPT_COLUMN, id_column: str | None = None, pictures: int = 1
) -> PromptFile:
    """Read a file of prompts.

    Args:
        path: ``.txt``, a prompt a line; or ``.jsonl``, ``.csv`` or ``.parquet`` with a column of prompts.
        prompt_column: its name.
        id_column: the column of ids, which say what noise a prompt gets; "id" where there is one if None. Without ids
            the number of the row takes their place.
        pictures: so many are drawn of each prompt.

    Returns:
        The rows.

    Raises:
        ValueError: for a file that cannot be read, holds no prompts, or has a row that is none; for ids that are equal.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} is no file of prompts: let its name end in {', '.join(SUFFIXES[:-1])} or .parquet")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({(error.strerror or str(error)).lower()}): name a file") from error
    digest = hashlib.sha256(content).hexdigest()
    if suffix == ".txt":
        if id_column is not None:
            raise ValueError(f"{path} has no columns: leave out the id column, or give a .jsonl, .csv or .parquet file")
        if prompt_column != PROMPT_COLUMN:
            raise ValueError(
                f"{path} has no columns: leave out the prompt column, or give a .jsonl, .csv or .parquet file"
            )
        texts = [_prompt(line, f"{path}, line {i}") for i, line in enumerate(_lines(path, content), 1)]
        return _not_empty(PromptFile(path, digest, texts))
    columns = (prompt_column, id_column)
    rows = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[suffix](path, content, *columns)
    texts, ids, places = [], [], []
    for where, text, prompt_id in rows:
        texts.append(_prompt(text, where))
        ids.append(None if prompt_id is None else _id(prompt_id, where))
        places.append(where)
    named = [prompt_id for prompt_id in ids if prompt_id is not None]
    if not named:
        return _not_empty(PromptFile(path, digest, texts))
    if len(named) < len(ids):
        raise ValueError(f"{places[ids.index(None)]} has no id, and other rows have one: give all rows an id, or none")
    _check_ids(named, places, pictures)
    return PromptFile(path, digest, texts, named)


def _not_empty(found: PromptFile) -> PromptFile:
    if not found.texts:
        raise ValueError(f"{found.path} holds no prompts: write one into it")
    return found


def _check_ids(ids: list[str], places: list[str], pictures: int) -> None:
    """Raise ValueError for ids that are equal, or whose pictures would have equal noise."""
    first: dict[str, int] = {}
    for row, prompt_id in enumerate(ids):
        if (before := first.setdefault(prompt_id, row)) != row:
            raise ValueError(
                f"{places[row]} has the id {prompt_id!r:.80} of {places[before]}: give each row its own id"
            )
    numbers = np.array([hashed(prompt_id) for prompt_id in ids], np.uint64)
    steps = np.arange(pictures, dtype=np.uint64) * np.uint64(STRIDE)
    streams = (numbers[:, None] + steps).reshape(-1)  # [rows * pictures]
    order = np.argsort(streams, kind="stable")
    same = np.flatnonzero(streams[order][1:] == streams[order][:-1])
    if same.size:
        one, other = (int(order[same[0] + i]) // pictures for i in (0, 1))
        raise ValueError(
            f"{places[one]} and {places[other]} would get the same noise, for the hashes of their ids meet: "
            f"change the id {ids[other]!r:.80}"
        )


def _prompt(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where} has {text!r:.80} as its prompt: give it a text")
    if not text.strip():
        raise ValueError(f"{where} is empty: take it out, or write a prompt")
    return _unicode(text, where)


def _id(prompt_id: Any, where: str) -> str:
    if isinstance(prompt_id, bool) or not isinstance(prompt_id, (str, int)) or prompt_id == "":
        raise ValueError(f"{where} has the id {prompt_id!r:.80}: give it a text or a whole number")
    return _unicode(str(prompt_id), where)


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half a character (a surrogate): write the whole one") from None
    return text


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} is not UTF-8: save the file as UTF-8") from None


def _lines(path: Path, content: bytes) -> list[str]:
    """The lines of a text; what ends the last one may be missing."""
    lines = _decoded(path, content).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _jsonl(path: Path, content: bytes, prompt_column: str, id_column: str | None) -> Iterator[tuple[str, Any, Any]]:
    for i, line in enumerate(_lines(path, content), 1):
        where = f"{path}, line {i}"
        if not line.strip():
            raise ValueError(f"{where} is empty: take it out")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            deep = isinstance(error, RecursionError)
            said = getattr(error, "msg", "it is nested too deeply" if deep else "a number has too many digits")
            raise ValueError(f"{where} is no JSON ({said[:80]}): write one object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f'{where} holds {line!r:.80}: write an object, as in {{"prompt": "octopus"}}')
        if prompt_column not in row:
            raise ValueError(f"{where} has no key {prompt_column!r:.80}: add it, or name the prompt column")
        if id_column is not None and row.get(id_column) is None:
            raise ValueError(f"{where} has no key {id_column!r:.80}: add it, or leave out the id column")
        yield where, row[prompt_column], row.get("id" if id_column is None else id_column)


def _csv(path: Path, content: bytes, prompt_column: str, id_column: str | None) -> Iterator[tuple[str, Any, Any]]:
    csv.field_size_limit(FIELD_LIMIT)
    reader = csv.reader(io.StringIO(_decoded(path, content), newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    while True:
        where, line = f"{path}, line {line}", line
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            fix = f"put fields with quotes and commas in quotes, and at most {FIELD_LIMIT:,} characters in each"
            raise ValueError(f"{where} is no CSV ({error}): {fix}") from None
        line = reader.line_num + 1
        if not row:
            raise ValueError(f"{where} is empty: take it out")
        if header is None:
            header = row
            prompt_at, id_at = _columns(path, header, prompt_column, id_column)
            continue
        if len(row) != len(header):
            raise ValueError(f"{where} has {len(row)} fields and the header {len(header)}: give them the same columns")
        yield where, row[prompt_at], None if id_at is None else row[id_at]


def _columns(path: Path, header: list[str], prompt_column: str, id_column: str | None) -> tuple[int, int | None]:
    """Where the prompts and the ids are among these columns."""
    for name in filter(None, (prompt_column, id_column)):
        if name not in header:
            raise ValueError(
                f"{path} has no column {name!r:.80}, but {', '.join(map(repr, header)):.200}: name one of them"
            )
    name = "id" if id_column is None else id_column
    for each in (prompt_column, name):
        if header.count(each) > 1:
            raise ValueError(f"{path} has several columns {each!r:.80}: rename all but one")
    return header.index(prompt_column), header.index(name) if name in header else None


def _parquet(path: Path, content: bytes, prompt_column: str, id_column: str | None) -> Iterator[tuple[str, Any, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        header = file.schema_arrow.names
        _, id_at = _columns(path, header, prompt_column, id_column)
        row = 0
        for batch in file.iter_batches(columns=[prompt_column, *([] if id_at is None else [header[id_at]])]):
            texts = batch.column(prompt_column).to_pylist()
            ids = [None] * len(texts) if id_at is None else batch.column(header[id_at]).to_pylist()
            for text, prompt_id in zip(texts, ids):
                yield f"{path}, row {row}", text, prompt_id
                row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as Parquet ({said:.120}): write it again") from error
