"""Writing artefacts: a folder appears under its name when it is complete, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from glob import escape as glob_escape
from pathlib import Path

from ... import files as disk
from .artefact import Artefact, file_sha256, read_manifest
from .manifest import MANIFEST, TOOL, File, Manifest


def write(folder: Path, manifest: Manifest) -> Artefact:
    """Write the manifest of an artefact whose other files are all in its folder.

    Args:
        folder: A folder that `creating` gave, or a folder in it.
        manifest: The manifest; its ``files`` are filled in here.

    Raises:
        ValueError: If a manifest with these fields could not be read again.
    """
    files = {path.name: File(path.stat().st_size, file_sha256(path)) for path in sorted(folder.iterdir())}
    files.pop(MANIFEST, None)
    manifest = replace(manifest, files=files)
    text = manifest.to_json()
    Manifest.from_json(text)
    disk.write_text(folder / MANIFEST, text)
    return Artefact(folder, manifest)


@contextmanager
def creating(folder: Path, force: bool = False) -> Iterator[Path]:
    """A new folder that is renamed to ``folder`` when the block ends, and deleted if it fails or is interrupted.

    Args:
        folder: The name of the folder to make.
        force: Replace an artefact, or a folder of artefacts, that is there. Only files that a manifest lists are
            deleted.

    Raises:
        ValueError: If ``folder`` exists and ``force`` is False, or if it holds anything else. This is checked again
            when the block ends: what appeared meanwhile stays, and what was made is kept beside it.
        OSError: If nothing can be written there.
    """
    if folder.name in ("", ".."):
        raise ValueError(f"{folder} is no name of a folder to make: give one, such as exported")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _recover(folder)
        _check_free(folder, force)
        new = disk.new_folder(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield new
        disk.sync(new)
        _replace(new, folder, force)
    except OSError as error:
        named = error.filename is not None and not str(error.filename).startswith(str(new))
        if named or (error.errno is None and error.filename is None):
            raise
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> OSError:
    reason = (error.strerror or str(error)).lower()
    return OSError(f"{folder} cannot be written ({reason}): free some space, or name a folder elsewhere")


def _check_free(folder: Path, force: bool) -> None:
    """Raise ValueError unless the folder does not exist, or may be replaced."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir() or not _holds_artefacts(folder):
        raise ValueError(f"{folder} exists and is no exported artefact: name another folder")
    if not force:
        raise ValueError(f"{folder} exists: name another folder, or add --force to replace it")
    _listed_files(folder)


def _replace(new: Path, folder: Path, force: bool) -> None:
    """Rename the new folder to ``folder``, and delete what had that name."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.replaced")
    try:
        _check_free(folder, force)
        if force:
            with suppress(FileNotFoundError):
                folder.rename(old)
        if old.exists():
            _listed_files(old)  # again, now that nobody can add a file under the old name
        new.rename(folder)  # fails if a folder with files has appeared
    except BaseException as error:
        if old.exists():
            _put_back(old, folder)
        taken = isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
        if not taken and not isinstance(error, ValueError):
            raise
        reason = f"{folder} exists" if taken else str(error).partition(": ")[0]
        kept = _keep_beside(new, folder)
        changed = f"{folder} changed while this ran ({reason})"
        raise ValueError(f"{changed} and stays as it is: what was made is in {kept}") from error
    if old.exists():
        _remove(old)


def _keep_beside(new: Path, folder: Path) -> Path:
    """Rename the new folder to the first free name among NAME-2, NAME-3, ..., and return that."""
    number = 2
    while True:
        kept = folder.with_name(f"{folder.name}-{number}")
        if not os.path.lexists(kept):
            new.rename(kept)
            return kept
        number += 1


def _recover(folder: Path) -> None:
    """Put back what a process moved aside if it was killed before it could replace the folder."""
    for path in folder.parent.glob(f".{glob_escape(folder.name)}.*.replaced"):
        pid = path.name[len(folder.name) + 2 :].partition(".")[0]
        if pid.isdecimal() and not disk.alive(int(pid)):
            _put_back(path, folder)


def _put_back(old: Path, folder: Path) -> None:
    """Give a folder that was moved aside its name again, or delete it if another artefact has that name now."""
    if not os.path.lexists(folder):
        old.rename(folder)
    else:
        with suppress(ValueError, OSError):
            _remove(old)


def _holds_artefacts(folder: Path) -> bool:
    """Whether the folder is an artefact, holds one, or is empty."""
    parts = list(folder.iterdir())
    return not parts or (folder / MANIFEST).is_file() or any((path / MANIFEST).is_file() for path in parts)


def _listed_files(folder: Path) -> list[Path]:
    """All files of an artefact, or of the artefacts in a folder.

    Raises:
        ValueError: If there is a file that no manifest lists.
    """
    parts, names = sorted(folder.iterdir()), set[str]()
    if (folder / MANIFEST).is_file():
        try:
            names = {*read_manifest(folder).files, MANIFEST}
        except ValueError as error:
            reason = f"{folder / MANIFEST} {error}, and so does not say which files are its own"
            raise ValueError(f"{reason}: remove {folder} yourself") from error
    found = []
    for path in parts:
        if not names and not path.is_symlink() and (path / MANIFEST).is_file():
            found += _listed_files(path)
        elif path.name in names and not path.is_dir():
            found.append(path)
        else:
            reason = f"{folder} holds {path.name}, which {TOOL} did not write"
            raise ValueError(f"{reason}: move it elsewhere, or name another folder")
    return found


def _remove(folder: Path) -> None:
    for path in _listed_files(folder):
        path.unlink()
    for path in (*(each for each in folder.iterdir() if each.is_dir()), folder):
        path.rmdir()
