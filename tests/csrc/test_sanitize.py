"""The native kernels under the sanitizers; the scripts here are for hand use as well."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_random_calls_are_clean():
    script = Path(__file__).with_name("sanitize.sh")
    result = subprocess.run(["bash", str(script), "60"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("portable: 60 rounds") == 2
