"""What a row of results says of the machine and of versions."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

import torch

from ..collect_env import cpu_name
from . import Row


def environment() -> Row:
    """Versions of torch and Python, the CPU, torch's threads, and the GPU or "none"."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions: Row = {"torch": str(torch.__version__), "python": platform.python_version()}
    return {**versions, "cpu": cpu_name(), "threads": torch.get_num_threads(), "gpu": gpu}


def versions(*packages: str) -> dict[str, str]:
    """Versions of packages by name; "" for one that is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def timestamp() -> str:
    """The time in UTC to the second, by which the rows of one run are told from those of another."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def driver() -> str:
    """The version of the GPU's driver; "" where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
