"""Files and folders that are whole, or as they were before: whatever the package writes goes through here.

A file is written beside its target as ``.NAME.PID.TOKEN.partial``, brought to the disk, and takes the target's name in one step. If that
fails, or is interrupted, the target is as it was and nothing is left beside it; what a process that was killed has left, the next one that
writes there removes. Where the target is a symbolic link, the file that it leads to is written.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LONGEST = 180  # bytes of a target's name that are in that of its partial file: names have 255 at most


@contextmanager
def writing(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file, open for writing and reading, that becomes ``path`` when the block ends without an error.

    Its mode is that of the file that it replaces, else what the umask leaves. Raises OSError, in one sentence that names ``path``, for
    what cannot be written: a folder, a device or a pipe, a full disk.
    """
    with _named(path):
        target = _target(path)
        remove_abandoned(target)
        partial = _partial(target)
        raw = _File(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "w+")
    try:
        file = io.BufferedRandom(raw)
        try:
            yield file
        except Exception as error:
            # libraries have words of their own for a full disk
            if raw.failed is not None:
                with _named(path):
                    raise raw.failed from error
            raise
        with _named(path):
            file.flush()
            if target.exists():
                os.chmod(partial, stat.S_IMODE(target.stat().st_mode))
            os.fsync(raw.fileno())
            raw.close()
            os.replace(partial, target)
            _sync_folder(target.parent)
    finally:
        raw.close()
        partial.unlink(missing_ok=True)


class _File(io.FileIO):
    """failed: the error of a write, if one failed."""

    failed: OSError | None = None

    def write(self, content: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(content)
        except OSError as error:
            self.failed = error
            raise


def write_bytes(path: str | Path, content: bytes) -> None:
    with writing(path) as file:
        file.write(content)


def write_text(path: str | Path, text: str) -> None:
    """As UTF-8, with the newlines that it has."""
    write_bytes(path, text.encode())


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(columns), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def write_picture(path: str | Path, picture: Any) -> None:
    """A PIL image or a figure of matplotlib, in the format that the name ends in."""
    content = io.BytesIO()
    if hasattr(picture, "savefig"):
        picture.savefig(content, format=Path(path).suffix[1:], dpi=150)
    else:
        from PIL import Image

        picture.save(content, Image.registered_extensions()[Path(path).suffix.lower()])
    write_bytes(path, content.getvalue())


@contextmanager
def writing_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder whose files move into ``folder`` when the block ends without an error, each in one step; other files stay there."""
    folder = Path(folder)
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        target = folder.resolve()
        partial = new_folder(target)
    try:
        with _named(folder):
            yield partial
            sync(partial)
            mode = (
                stat.S_IMODE(partial.stat().st_mode) & 0o666
            )  # some libraries write files that their owner alone can read
            for source in sorted(path for path in partial.rglob("*") if path.is_file()):
                place = target / source.relative_to(partial)
                place.parent.mkdir(parents=True, exist_ok=True)
                source.chmod(mode)
                os.replace(source, place)
                _sync_folder(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_writable(path: str | Path) -> None:
    """Raise an OSError that names the fix unless ``path`` can be written; leaves everything as it is."""
    with _named(path):
        target = _target(path)
        partial = _partial(target)
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        partial.unlink()


def new_folder(target: Path) -> Path:
    """An empty folder beside ``target``, which no other process and no other thread has; removes what killed ones have left there."""
    remove_abandoned(target)
    partial = _partial(target)
    partial.mkdir()
    return partial


def remove_abandoned(target: Path) -> None:
    """Remove the partial files and folders of ``target`` that belong to processes which are no more."""
    head = f".{_shortened(target.name)}."
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        found = (
            re.fullmatch(r"(\d{1,10})(\.\w+)?\.partial", path.name[len(head) :]) if path.name.startswith(head) else None
        )
        if found and not alive(int(found[1])):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Bring all files in a folder, and in those in it, to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in (*folder.rglob("*/"), folder):
        _sync_folder(path)


def sha256(file: IO[bytes], size: int | None = None) -> str:
    """Of the next ``size`` bytes of a file, or of all that is left of it, in hexadecimal."""
    digest, left = hashlib.sha256(), sys.maxsize if size is None else size
    while chunk := file.read(min(left, 1 << 20)):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def _target(path: str | Path) -> Path:
    """The file that is written for ``path``. Raises OSError for what is no file, or cannot be one."""
    target = Path(os.path.realpath(path))
    if not target.name or target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if target.exists():
        if not target.is_file():
            raise OSError(errno.EINVAL, "it is a device or a pipe, no file")
        if not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return target


def _partial(target: Path) -> Path:
    return target.with_name(f".{_shortened(target.name)}.{os.getpid()}.{secrets.token_hex(4)}.partial")


def _shortened(name: str) -> str:
    return os.fsencode(name)[:LONGEST].decode("utf-8", "ignore")


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Errors of the system name ``path`` and say what to do."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        fix = "free some space, or name a file elsewhere"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fix = "name a file in a folder that exists and is writable"
        named = type(error)(f"{path} cannot be written ({reason}): {fix}")
        named.errno = error.errno
        raise named from error


def alive(pid: int) -> bool:
    if os.name == "nt":  # there, this would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """So that a file keeps its new name when the machine stops."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
