"""The files of onnxruntime-web: from a folder, from the cache, or, once, from the npm registry. Always checked."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from coalescer_fast import files

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web-{VERSION}.tgz"
URL = f"https://registry.npmjs.org/onnxruntime-web/-/{PACKAGE}"
PACKAGE_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
SHA256 = {
    "ort.wasm.min.js": "faece07e84faa9001f5104bbe4e5c70861d06cb2376a0dea1fa0ad33a67adc81",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
OFFLINE = f"fetch {URL} elsewhere, unpack it, and give its folder package/dist as --runtime"


def cache() -> Path:
    """The folder that the files are kept in."""
    home = os.environ.get("COALESCER_FAST_CACHE_DIR")
    base = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "coalescer_fast"
    return base / f"onnxruntime-web-{VERSION}"


def runtime_files(folder: Path | None = None) -> dict[str, bytes]:
    """Read the files, by name.

    Args:
        folder: where they are; None for the cache, which is filled from the npm registry if it is empty.

    Raises:
        ValueError: if a file is missing, damaged or of another version.
        OSError: if they cannot be fetched.
    """
    if folder is not None:
        return _read(folder, f"give the folder dist of onnxruntime-web {VERSION}")
    folder = cache()
    if not all((folder / name).is_file() for name in SHA256):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in _fetch().items():
            files.write_bytes(folder / name, content)
    return _read(folder, f"delete {folder}, and the next export fetches it anew")


def _read(folder: Path, fix: str) -> dict[str, bytes]:
    found = {}
    for name, expected in SHA256.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} has no {name}: {fix}")
        found[name] = path.read_bytes()
        if hashlib.sha256(found[name]).hexdigest() != expected:
            raise ValueError(f"{path} is not that of onnxruntime-web {VERSION}: {fix}")
    return found


def _fetch() -> dict[str, bytes]:
    try:
        with urlopen(URL, timeout=60) as answer:
            content = answer.read()
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise OSError(f"onnxruntime-web {VERSION} cannot be fetched ({reason}): {OFFLINE}") from error
    if hashlib.sha256(content).hexdigest() != PACKAGE_SHA256:
        raise ValueError(f"what {URL} holds is not the package that this version was tested with: {OFFLINE}")
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        return {name: package.extractfile(f"package/dist/{name}").read() for name in SHA256}  # type: ignore[union-attr]
