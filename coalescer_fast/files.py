"""Atomic writes of files and folders. Whatever the package writes goes through here.

A file is written beside its target as ``.NAME.PID.TOKEN.partial``, synchronised to the disk, and renamed to the target
in one step. If that fails or is interrupted, the target is as it was and nothing is left beside it. What a killed
process has left is removed by the next one that writes there. Where the target is a symbolic link, the file that it
leads to is written.
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

MAX_NAME = 180  # bytes of the target's name in that of its partial file, for a name has at most 255 bytes


@contextmanager
def writing(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file, for writing and reading, that becomes ``path`` when the block ends without an error.

    Its mode is that of the file that it replaces, else what the umask leaves.

    Raises:
        OSError: for what cannot be written: a folder, a device or a pipe, a full disk. The message names ``path``.
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
            # libraries that write raise errors of their own for a full disk
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
    """A file that remembers the error of a write.

    Attributes:
        failed: the error, if a write has failed.
    """

    failed: OSError | None = None

    def write(self, content: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(content)
        except OSError as error:
            self.failed = error
            raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file. Raises OSError, see `writing`."""
    with writing(path) as file:
        file.write(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, with the newlines that it has. Raises OSError, see `writing`."""
    write_bytes(path, text.encode())


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write rows as CSV with a header. Raises OSError, see `writing`."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(columns), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def write_picture(path: str | Path, picture: Any) -> None:
    """Write a PIL image or a matplotlib figure, in the format that the name ends in. Raises OSError, see `writing`."""
    from PIL import Image

    content = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(content, Image.registered_extensions()[Path(path).suffix.lower()])
    else:
        picture.savefig(content, format=Path(path).suffix[1:], dpi=150)
    write_bytes(path, content.getvalue())


@contextmanager
def writing_folder(folder: str | Path) -> Iterator[Path]:
    """Make an empty folder whose files move into ``folder`` when the block ends without an error, each in one step.

    Other files in ``folder`` stay there. Raises OSError, see `writing`.
    """
    folder = Path(folder)
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        target = folder.resolve()
        partial = new_folder(target)
    try:
        with _named(folder):
            yield partial
            sync(partial)
            # some libraries write files that their owner alone can read
            mode = stat.S_IMODE(partial.stat().st_mode) & 0o666
            for source in sorted(path for path in partial.rglob("*") if path.is_file()):
                place = target / source.relative_to(partial)
                place.parent.mkdir(parents=True, exist_ok=True)
                source.chmod(mode)
                os.replace(source, place)
                _sync_folder(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_writable(path: str | Path) -> None:
    """Raise OSError, see `writing`, unless ``path`` can be written. Everything stays as it is."""
    with _named(path):
        target = _target(path)
        partial = _partial(target)
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        partial.unlink()


def new_folder(target: Path) -> Path:
    """Make an empty folder beside ``target``, for this thread alone, and remove what killed processes have left."""
    remove_abandoned(target)
    partial = _partial(target)
    partial.mkdir()
    return partial


def remove_abandoned(target: Path) -> None:
    """Remove the partial files and folders of ``target`` whose processes have ended."""
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
    """Synchronise all files in a folder and its subfolders to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in (*folder.rglob("*/"), folder):
        _sync_folder(path)


def sha256(file: IO[bytes], size: int | None = None) -> str:
    """Hash the next ``size`` bytes of a file, or all that is left of it; in hexadecimal."""
    digest, left = hashlib.sha256(), sys.maxsize if size is None else size
    while chunk := file.read(min(left, 1 << 20)):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def _target(path: str | Path) -> Path:
    """The file that a write to ``path`` replaces. Raises OSError for what is not, and cannot be, a file."""
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
    return os.fsencode(name)[:MAX_NAME].decode("utf-8", "ignore")


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Inside, an OSError is raised again with a message that names ``path`` and a fix."""
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
    """Whether there is a process of this number."""
    if os.name == "nt":  # there, os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Synchronise a folder, so that a renamed file keeps its name when the machine stops."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
