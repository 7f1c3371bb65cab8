"""Shared by all tests: no network, no progress bars in the way, and uninitialised memory that shows."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

# A submission is judged on the same examples whenever it is tested; other runs draw new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
# The benchmarks are run from a checkout, not installed: importable, behind what is installed.
sys.path.append(str(Path(__file__).parents[1]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``allocate``, filled with NaN for callers in the package, so that an element which nobody wrote is seen."""

    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():  # no look at frames in a traced graph
            return out
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "coalescer_fast" and (out.is_floating_point() or out.is_complex()):
            with torch.no_grad():
                out.fill_(float("nan"))
        return out

    return wrapper


@pytest.fixture(autouse=True, scope="session")
def poison_uninitialised_memory() -> Iterator[None]:
    with torch.device("cpu"):
        torch.zeros(())  # torch lists its factory functions when a device context is first used: let it list the real ones
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


@pytest.fixture(autouse=True)
def skip_without_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
