"""Scripts in a page of a browser."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

STATIC = Path(str(files("coalescer_fast.export.web") / "static"))


def open_scripts(page: Any, folder: Path, names: Iterable[str], **data: Any) -> None:
    """Open a page from disk that loads scripts of the export, with ``data`` as global constants."""
    said = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in data.items())
    (folder / "data.js").write_text(said, "utf-8")
    sources = [(folder / "data.js").as_uri(), *((STATIC / name).as_uri() for name in names)]
    scripts = "".join(f'<script src="{source}"></script>' for source in sources)
    (folder / "scripts.html").write_text(f"<!doctype html><meta charset=utf-8>{scripts}", "utf-8")
    page.problems.clear()
    page.open((folder / "scripts.html").as_uri())
    assert not page.problems
