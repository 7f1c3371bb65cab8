"""A run that is killed at random moments ends with the bytes of one that is not; see `kills`, which can do more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds workers in /proc"),
]
KILLS = [sys.executable, "-m", "tests.bulk.kills"]
ROOT = Path(__file__).parents[2]
LOOPBACK = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]  # a network of its own


def test_processes():
    subprocess.run([*KILLS, "--prompts", "60", "--kills", "3"], cwd=ROOT, check=True)


def test_ray():
    pytest.importorskip("ray")
    if subprocess.run([*LOOPBACK, "true"], capture_output=True).returncode:
        pytest.skip("Ray asks addresses beyond this machine, and unshare -n, which keeps it from that, cannot run here")
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}  # no token in the home folder
    subprocess.run([*LOOPBACK, *KILLS, "--prompts", "60", "--kills", "2", "--ray"], cwd=ROOT, check=True, env=env)
