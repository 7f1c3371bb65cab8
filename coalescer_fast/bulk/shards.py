"""Shards: a tar in the layout of webdataset, and a Parquet file beside it, which says that the tar is whole.

The tar is written first. The Parquet file holds its size, its SHA-256 and that of the run file, so where there is one,
there was the whole tar. Both have the same bytes whenever and wherever they are written: no times, no owners, one
order.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

from .. import files
from ..schema import Sha256, between, build, table
from .prompt_file import Prompt, noise_number
from .settings import RUN_FILE, Settings

SEAL = b"coalescer_fast"  # the key, in the Parquet file's metadata, of what `Seal` holds
NAME = re.compile(r"\d{5,}\.(tar|parquet)")
PARTIAL = re.compile(rf"\.({NAME.pattern}|{re.escape(RUN_FILE)})\.\d+\.[0-9a-f]+\.partial")  # see files.writing
COLUMNS = {
    "key": "string",
    "id": "string",
    "prompt": "string",
    "picture": "int32",
    "seed": "uint64",
    "noise": "uint64",
    "drawn": "string",
    "matched": "string",
    "similarity": "float64",
    "quality": "float64",
    "width": "int32",
    "height": "int32",
    "sha256": "string",
}


@dataclass(frozen=True)
class Sample:
    """A picture with what is known of it.

    Attributes:
        record: a value for each of `COLUMNS`.
        png: the file.
    """

    record: dict[str, Any]
    png: bytes


@dataclass(frozen=True)
class Seal:
    """What a shard's Parquet file says of its tar.

    Attributes:
        run_sha256: of the run file of the folder that the shard was made for.
        tar_bytes: size of the tar.
        tar_sha256: of the tar.
    """

    run_sha256: Sha256
    tar_bytes: Annotated[int, between(0, 2**63)]
    tar_sha256: Sha256


def name(shard: int) -> str:
    """The name of a shard's files, without their endings."""
    return f"{shard:05d}"


def key(row: int, picture: int, settings: Settings) -> str:
    """The key of a sample: the name of its members in the tar, without their endings."""
    several = f"_{picture:0{len(str(settings.pictures - 1))}d}" if settings.pictures > 1 else ""
    return f"{row:09d}{several}"


def write(folder: Path, shard: int, samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Write a shard's files, first the tar. Returns the records. Raises OSError, see `files.writing`."""
    records = []
    with files.writing(folder / f"{name(shard)}.tar") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                for ending, content in _members(sample):
                    member = tarfile.TarInfo(f"{sample.record['key']}.{ending}")  # of time 0 and owner 0
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                records.append(sample.record)
        size = file.tell()
        file.seek(0)
        digest = files.sha256(file)
    seal = Seal(_run_sha256(folder), size, digest)
    files.write_bytes(folder / f"{name(shard)}.parquet", _parquet(records, seal))
    return records


def _members(sample: Sample) -> list[tuple[str, bytes]]:
    text = json.dumps(sample.record, ensure_ascii=False)
    return [("png", sample.png), ("txt", sample.record["prompt"].encode()), ("json", text.encode())]


def _parquet(records: list[dict[str, Any]], seal: Seal) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [(column, getattr(pa, kind)()) for column, kind in COLUMNS.items()]
    content = io.BytesIO()
    schema = pa.schema(fields, {SEAL: json.dumps(table(seal)).encode()})
    pq.write_table(pa.Table.from_pylist(records, schema), content, compression="zstd")
    return content.getvalue()


def is_there(folder: Path, shard: int) -> bool:
    """Whether a shard's two files are there, of this run, and fit by their sizes; what they hold is not read."""
    try:
        seal, size = _seal(folder, shard), (folder / f"{name(shard)}.tar").stat().st_size
        return seal.tar_bytes == size and seal.run_sha256 == _run_sha256(folder)
    except (OSError, ValueError):
        return False


def damage(folder: Path, shard: int, prompts: list[Prompt], settings: Settings) -> str:
    """What is wrong with a shard, every byte of which is read; "" if nothing is.

    The tar has the hash that the Parquet file says, and the Parquet file is what is written for the records in the tar,
    in this run. The records are those of the prompts, and their pictures have the hashes that they say.
    """
    path = folder / f"{name(shard)}.tar"
    try:
        seal = _seal(folder, shard)
        if seal.run_sha256 != _run_sha256(folder):
            return f"{name(shard)} is of another run"
        with path.open("rb") as file:
            if files.sha256(file) != seal.tar_sha256:
                return f"{path.name} is not the file that was written"
            file.seek(0)
            records = _records(file)
        if _parquet(records, seal) != path.with_suffix(".parquet").read_bytes():
            return f"{name(shard)}.parquet is not the file that was written"
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError) as error:
        return f"{name(shard)} cannot be read ({' '.join(str(error).split()):.100})"
    wanted = {(each.id, each.text): each for each in prompts}
    for record in records:
        prompt = wanted.get((record["id"], record["prompt"]))
        if (
            prompt is None
            or record["key"] != key(prompt.row, record["picture"], settings)
            or record["picture"] not in range(settings.pictures)
            or record["seed"] != settings.seed
            or record["noise"] != noise_number(prompt.number, record["picture"])
        ):
            return f"{name(shard)} holds a picture of another prompt"
    if len({record["key"] for record in records}) != len(records):
        return f"{name(shard)} holds a picture twice"
    if len(records) != len(prompts) * settings.kept:
        return f"{name(shard)} holds {len(records)} pictures, not {len(prompts) * settings.kept}"
    return ""


def _records(file: IO[bytes]) -> list[dict[str, Any]]:
    """The records in a tar. Raises ValueError for a picture that is not the one of its record."""
    found = []
    hashes = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is None:
                raise ValueError(f"{member.name} is no file")
            sample, _, ending = member.name.partition(".")
            if ending == "png":
                hashes[sample] = files.sha256(content)
            elif ending == "json":
                found.append(json.load(content))
    for record in found:
        if hashes.get(record["key"]) != record["sha256"]:
            raise ValueError(f"{record['key']}.png is not the picture of its record")
    return found


def _run_sha256(folder: Path) -> str:
    with (folder / RUN_FILE).open("rb") as file:
        return files.sha256(file)


def _seal(folder: Path, shard: int) -> Seal:
    """What a shard's Parquet file says of its tar. Raises OSError or ValueError where it says nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        said = json.loads((pq.read_schema(folder / f"{name(shard)}.parquet").metadata or {})[SEAL])
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(said, dict):
        raise ValueError("it does not say what its tar holds")
    seal: Seal = build(said, Seal)
    return seal


def withdraw(folder: Path, shard: int) -> None:
    """Remove the Parquet file of a shard, so that the next run makes the shard again."""
    (folder / f"{name(shard)}.parquet").unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes have left half written. Nobody else may be writing."""
    for path in folder.iterdir():
        if PARTIAL.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def any_there(folder: Path) -> bool:
    """Whether there is a file of a shard."""
    return any(NAME.fullmatch(path.name) for path in folder.iterdir())
