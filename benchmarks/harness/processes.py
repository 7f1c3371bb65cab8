"""Processes of the package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from coalescer_fast import console


def same_package() -> dict[str, Any]:
    """Arguments of subprocess, with which Python imports the package that this process has, whatever lies here."""
    return {"cwd": os.sep, "env": {**os.environ, "PYTHONPATH": str(Path(console.__file__).parents[1])}}
