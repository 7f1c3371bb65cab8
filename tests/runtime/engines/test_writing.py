from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from coalescer_fast import files
from coalescer_fast.runtime.engines import artefact, writing

from ...helpers.manifests import make, manifest


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_it_is_whole(tmp_path):
    with writing.creating(tmp_path / "some" / "folder") as new:
        (new / "file").write_text("1")
        assert not (tmp_path / "some" / "folder").exists()
    assert names(tmp_path / "some") == ["folder"]
    assert names(tmp_path / "some" / "folder") == ["file"]


def fail(folder, error):
    with writing.creating(folder, force=True) as new:
        (new / "half").write_text("1")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    make(tmp_path / "a")
    for folder in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(error):
            fail(folder, error)
    assert names(tmp_path) == ["a"]
    artefact.read(tmp_path / "a")


def test_one_that_is_there_is_replaced_by_force_alone(tmp_path):
    make(tmp_path / "a")
    with (
        pytest.raises(ValueError, match="exists: name another folder, or add --force"),
        writing.creating(tmp_path / "a"),
    ):
        pass
    with writing.creating(tmp_path / "a", force=True) as new:
        (new / "file").write_text("1")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["file"]


def dead_process() -> int:
    """The number of a process that is no more."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def create(folder, force=False, meanwhile=lambda: None) -> None:
    with writing.creating(folder, force) as new:
        (new / "file").write_text("1")
        meanwhile()


def test_what_comes_meanwhile_stays(tmp_path):
    def come() -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "letter").write_text("dear")

    with pytest.raises(
        ValueError, match=r"a changed while this ran .*stays as it is: what was made is in .*a-2"
    ) as caught:
        create(tmp_path / "a", meanwhile=come)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["a", "a-2"]
    assert (tmp_path / "a" / "letter").read_text() == "dear"
    assert names(tmp_path / "a-2") == ["file"]


@pytest.mark.parametrize("several", [False, True])
def test_force_takes_nothing_that_no_manifest_lists(tmp_path, several):
    folder = tmp_path / "a"
    inner = make(folder / "unet", "unet").folder if several else make(folder).folder
    (inner / "letter").write_text("dear")
    with pytest.raises(
        ValueError, match=rf"{inner} holds letter, which coalescer-export did not write: move it elsewhere"
    ):
        create(folder, force=True)
    assert "letter" in names(inner)
    artefact.read(inner)
    (inner / "letter").unlink()
    with pytest.raises(ValueError, match=r"a changed while this ran \(.* holds letter"):
        create(folder, force=True, meanwhile=lambda: (inner / "letter").write_text("dear"))
    assert (inner / "letter").read_text() == "dear"
    artefact.read(inner)
    assert names(tmp_path) == ["a", "a-2"]


def test_force_takes_nothing_of_a_damaged_manifest(tmp_path):
    folder = make(tmp_path / "a").folder
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=rf"does not say which files are its own: remove {folder} yourself"):
        create(folder, force=True)
    assert names(folder) == ["manifest.json", "model.onnx", "model.onnx.data"]


def test_a_damaged_artefact_is_replaced_by_force(tmp_path):
    """As its own message says."""
    folder = make(tmp_path / "a").folder
    (folder / "model.onnx").write_bytes(b"")
    (folder / "model.onnx.data").unlink()
    with writing.creating(folder, force=True) as new:
        (new / "file").write_text("1")
    assert names(folder) == ["file"]


@pytest.mark.parametrize("attempt", range(20))
@pytest.mark.parametrize("force", [False, True])
def test_of_two_at_once_one_wins_and_the_other_says_so(tmp_path, force, attempt):
    if force:
        make(tmp_path / "a")
    both, errors = threading.Barrier(2), []

    def export(word: str) -> None:
        try:
            with writing.creating(tmp_path / "a", force) as new:
                (new / "model.onnx").write_text(word)
                (new / "model.onnx.data").write_text(word)
                writing.write(new, manifest(model=word))
                both.wait()
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=export, args=(word,)) for word in ("one", "two")]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    # by force the later one may replace the earlier, whole
    assert len(errors) in ((0, 1) if force else (1,))
    for name in names(tmp_path):
        found = artefact.read(tmp_path / name)
        assert found.graph.read_text() == found.manifest.model
    assert names(tmp_path) == ["a", "a-2"][: 1 + len(errors)]


def test_what_a_killed_process_left_is_removed(tmp_path):
    dead, old = dead_process(), make(tmp_path / "a").folder
    for name in (
        f".a.{dead}.partial",
        f".a.{dead}.0badcafe.partial",
        f".a.{os.getpid()}.0badcafe.partial",
        f".b.{dead}.partial",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("1")
    old.rename(tmp_path / f".a.{dead}.0badcafe.replaced")  # between the two steps of a replacement
    with pytest.raises(ValueError, match="exists"), writing.creating(tmp_path / "a"):
        pass
    artefact.read(tmp_path / "a")
    with writing.creating(tmp_path / "a", force=True) as new:
        (new / "file").write_text("1")
    assert names(tmp_path) == [f".a.{os.getpid()}.0badcafe.partial", f".b.{dead}.partial", "a"]


def test_a_disk_that_is_full(tmp_path):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(
        OSError, match=r"a cannot be written \(no space left on device\): free some space, or name a folder"
    ):
        fail(tmp_path / "a", error)
    assert names(tmp_path) == []


def test_everything_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(files, "sync", lambda folder: seen.append(names(folder)))
    with writing.creating(tmp_path / "a") as new:
        (new / "file").write_text("1")
    assert seen == [["file"]]


@pytest.mark.parametrize("name", [".", "/", "..", "a/.."])
def test_no_name(name):
    with pytest.raises(ValueError, match="is no name of a folder"), writing.creating(Path(name), force=True):
        pass


def test_what_is_no_artefact_is_not_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to(make(tmp_path / "a").folder)
    for name in ("home", "file", "link"):
        with (
            pytest.raises(ValueError, match="exists and is no exported artefact"),
            writing.creating(tmp_path / name, force=True),
        ):
            pass
    assert names(tmp_path) == ["a", "file", "home", "link"]
    assert (tmp_path / "home" / "letter").read_text() == "dear"
