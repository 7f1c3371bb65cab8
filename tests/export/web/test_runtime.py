from __future__ import annotations

import hashlib
import io
import tarfile
from urllib.error import URLError

import pytest

from coalescer_fast.export.web import runtime


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """A registry whose package has other files, with their hashes; its calls are counted."""
    contents = {name: name.encode() for name in runtime.SHA256}
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as package:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"package/dist/{name}")
            info.size = len(content)
            package.addfile(info, io.BytesIO(content))
    calls = []

    def urlopen(url, timeout):
        calls.append(url)
        return io.BytesIO(raw.getvalue())

    monkeypatch.setenv("COALESCER_FAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(runtime, "urlopen", urlopen)
    monkeypatch.setattr(runtime, "PACKAGE_SHA256", hashlib.sha256(raw.getvalue()).hexdigest())
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(runtime, "SHA256", hashes)
    return contents, calls


def test_files_are_fetched_once(registry):
    contents, calls = registry
    assert runtime.runtime_files() == contents
    assert runtime.runtime_files() == contents
    assert calls == [runtime.URL]


def test_a_folder_needs_no_network(registry, tmp_path):
    contents, calls = registry
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert runtime.runtime_files(tmp_path) == contents
    assert not calls


def test_what_is_not_the_tested_version_is_refused(registry, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"has no ort\.wasm\.min\.js"):
        runtime.runtime_files(tmp_path / "nothing")
    runtime.runtime_files()
    damaged = runtime.cache() / "ort.wasm.min.js"
    damaged.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"ort\.wasm\.min\.js is not that of onnxruntime-web .*: delete"):
        runtime.runtime_files()
    damaged.unlink()
    monkeypatch.setattr(runtime, "PACKAGE_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"not the package that this version was tested with: fetch .* --runtime"):
        runtime.runtime_files()
    assert not damaged.exists()


def test_without_a_network_the_error_names_the_way(registry, monkeypatch):
    def urlopen(url, timeout):
        raise URLError("no route to host")

    monkeypatch.setattr(runtime, "urlopen", urlopen)
    with pytest.raises(OSError, match=r"cannot be fetched \(no route to host\): fetch .* --runtime"):
        runtime.runtime_files()
