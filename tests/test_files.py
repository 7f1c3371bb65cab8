from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import coalescer_fast
from coalescer_fast import files

ROOT = Path(__file__).parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def half(path: Path, error: BaseException) -> None:
    with files.writing(path) as file:
        file.write(b"half")
        raise error


def test_it_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with files.writing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), SystemExit(), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("there", [False, True])
def test_nothing_is_left_of_a_failure(tmp_path, error, there):
    path = tmp_path / "a.txt"
    if there:
        path.write_text("old")
    with pytest.raises(type(error)):
        half(path, error)
    assert names(tmp_path) == (["a.txt"] if there else [])
    assert not there or path.read_text() == "old"


SMALL = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
from coalescer_fast import files
path, what = Path(sys.argv[1]), sys.argv[2]
noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    if what == "bytes":
        files.write_bytes(path, bytes(4000))
    elif what == "csv":
        files.write_csv(path, [{"a": "x" * 4000}], ["a"])
    elif what == "picture":
        files.write_picture(path, Image.fromarray(noise))
    else:
        with files.writing(path) as file:
            torch.save({"a": torch.zeros(4000)}, file) if what == "checkpoint" else np.savez(file, a=noise)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
@pytest.mark.parametrize("what", ["bytes", "csv", "picture", "checkpoint", "data set"])
def test_no_room(tmp_path, what):
    """The old file stays, nothing is left beside it, and the message names it and says what to do."""
    path = tmp_path / "a.png"
    path.write_text("old")
    env = {**os.environ, "PYTHONPATH": str(Path(coalescer_fast.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", SMALL, path, what], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{path} cannot be written (file too large): free some space, or name a file elsewhere\n"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.png"]


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "file").write_text("1")
    cases = {
        tmp_path / "folder": "it is a folder",
        tmp_path / "pipe": "it is a device or a pipe, no file",
        tmp_path / "link": "it is a device or a pipe, no file",
        Path("/dev/null"): "it is a device or a pipe, no file",
        tmp_path / "no" / "folder.txt": "no such file or directory",
        tmp_path / "file" / "a.txt": "not a directory",
        tmp_path / ("a" * 300): "file name too long",
        Path("/"): "it is a folder",
    }
    before = names(tmp_path)
    for path, reason in cases.items():
        for write in (lambda path: files.write_bytes(path, b"1"), files.check_writable):
            with pytest.raises(OSError, match="cannot be written") as caught:
                write(path)
            assert (
                str(caught.value)
                == f"{path} cannot be written ({reason}): name a file in a folder that exists and is writable"
            )
    assert names(tmp_path) == before


def test_long_names(tmp_path):
    for name in ("a" * 255, "ä" * 127, "a" * 251 + ".png"):
        files.write_text(tmp_path / name, "1")
    assert len(names(tmp_path)) == 3


def test_a_check_leaves_all_as_it_is(tmp_path):
    (tmp_path / "old").write_text("old")
    before = os.stat(tmp_path / "old")
    for name in ("old", "new"):
        files.check_writable(tmp_path / name)
    assert names(tmp_path) == ["old"]
    assert os.stat(tmp_path / "old") == before


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    for name in ("there", "missing"):
        (tmp_path / name).symlink_to(f"real/{name}.txt")
    (tmp_path / "real" / "there.txt").write_text("old")
    for name in ("there", "missing"):
        files.write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "real" / f"{name}.txt").read_text() == "new"
    assert names(tmp_path / "real") == ["missing.txt", "there.txt"]


def test_mode(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "new", "1")
        (tmp_path / "old").write_text("1")
        (tmp_path / "old").chmod(0o600)
        files.write_text(tmp_path / "old", "2")
        with files.writing_folder(tmp_path / "folder") as folder:
            (folder / "file").write_text("1")
            (folder / "file").chmod(0o600)
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "old", "folder/file")}
    assert modes == {"new": 0o640, "old": 0o600, "folder/file": 0o640}


def half_folder(target: Path) -> None:
    with files.writing_folder(target) as folder:
        (folder / "config").write_text("half")
        raise ValueError("x")


def test_folders(tmp_path):
    target = tmp_path / "a" / "b"
    target.mkdir(parents=True)
    (target / "letter").write_text("dear")
    (target / "config").write_text("old")
    with pytest.raises(ValueError, match="x"):
        half_folder(target)
    assert (target / "config").read_text() == "old"
    with files.writing_folder(target) as folder:
        (folder / "config").write_text("new")
        (folder / "unet").mkdir()
        (folder / "unet" / "config").write_text("new")
    assert names(target) == ["config", "letter", "unet"]
    assert [(target / name).read_text() for name in ("config", "letter", "unet/config")] == ["new", "dear", "new"]
    assert names(tmp_path / "a") == ["b"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    theirs = [
        f".a.txt.{os.getpid()}.0badcafe.partial",
        f".b.txt.{dead.pid}.partial",
        f".a.txt.x{dead.pid}.partial",
        ".a.txt.partial",
    ]
    for name in (*theirs, f".a.txt.{dead.pid}.partial", f".a.txt.{dead.pid}.0badcafe.partial"):
        (tmp_path / name).write_text("half")
    files.write_text(tmp_path / "a.txt", "1")
    assert names(tmp_path) == sorted([*theirs, "a.txt"])


def test_a_killed_process_leaves_the_old_file(tmp_path):
    code = """
import os, sys
from coalescer_fast import files
with files.writing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), 9)
"""
    (tmp_path / "a.txt").write_text("old")
    env = {**os.environ, "PYTHONPATH": str(Path(coalescer_fast.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "a.txt"], env=env, check=False).returncode == -9
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(names(tmp_path)) == 2
    files.write_text(tmp_path / "a.txt", "new")
    assert names(tmp_path) == ["a.txt"]


def test_pictures(tmp_path):
    for name in ("a.png", "a.JPG", "a.webp"):
        files.write_picture(tmp_path / name, Image.new("RGB", (8, 8)))
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (8, 8)


# in private folders, which appear as a whole: `writing.creating`, `files.writing_folder`, tempfile
PRIVATE = {
    "coalescer_fast/training/embed.py",
    "coalescer_fast/training/coalescer.py",
    "coalescer_fast/training/autoencoder.py",
    "coalescer_fast/training/matcher/__main__.py",
    "coalescer_fast/runtime/engines/onnx.py",
    "export/engine/builder.py",
    "export/engine/layers.py",
    "export/onnx/graph.py",
    "export/quantize/qdq.py",
    "export/quantize/quantizer.py",
    "export/quantize/sensitivity.py",
    "export/quantize/calibration.py",
}


def test_nothing_is_written_past_it():
    """Calls that write a file by its name, anywhere in the package."""
    writers = {
        "write_text",
        "write_bytes",
        "savez",
        "savez_compressed",
        "savefig",
        "save",
        "save_pretrained",
        "save_file",
        "DictWriter",
    }
    found = []
    for path in sorted([*(ROOT / "coalescer_fast").rglob("*.py"), *(ROOT / "export").rglob("*.py")]):
        name = str(path.relative_to(ROOT))
        if name in PRIVATE or name == "coalescer_fast/files.py":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                whose = ast.unparse(node.func.value)
                into_open_file = any(isinstance(each, ast.Name) and each.id == "file" for each in node.args)
                if node.func.attr in writers and not into_open_file and whose not in ("files", "disk", "super()"):
                    found.append(f"{name}:{node.lineno}: {ast.unparse(node)[:80]}")
                modes = [ast.unparse(each) for each in node.args[:1]]
                opens = node.func.attr == "open" and whose not in ("Image", "gzip", "tarfile", "os")
                if opens and any("w" in mode or "a" in mode for mode in modes):
                    found.append(f"{name}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert found == []
