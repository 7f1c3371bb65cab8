"""Code that runs in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def python(code: str, folder: Path) -> str:
    """What a fresh process prints, in a folder without a package of this name that would hide the installed one."""
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout
