"""New processes: fresh interpreters, and forks of one that has imported torch and the package, which start in
milliseconds."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

# What takes seconds to import. A module that is not installed is left out.
PRELOADED = [
    "torch._dynamo",
    "coalescer_fast.pipeline",
    "coalescer_fast.scheduler",
    "coalescer_fast.training.coalescer",
    "onnxruntime",
]
T = TypeVar("T")


@cache
def context() -> BaseContext:
    """What processes are started by: a fork server, or new interpreters where the system has no fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    # The server looks for modules where it is started: at the root, so that it imports the package that is installed.
    home = os.getcwd()
    os.chdir(os.sep)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(home)
    return found


def call(function: Callable[..., T], *arguments: Any) -> T:
    """What the function returns in a new process, by itself; raises what it raises, or BrokenProcessPool if it crashes.

    Args:
        function: a function of a module, found by its name.
    """
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        return pool.submit(function, *arguments).result()


def python(code: str, folder: Path) -> str:
    """What a fresh process prints, in a folder without a package of this name that would hide the installed one."""
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def workers(pid: int) -> list[int]:
    """The processes that multiprocessing has spawned from a process, on Linux."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:  # one that has ended
        return []
