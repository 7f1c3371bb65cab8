"""Shared by all tests: no network, no progress bars in the way, and uninitialised memory that shows."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # `pytest -n`: threads of several workers would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the package's ops are imported

try:
    from hypothesis import settings
except ImportError:  # tests/helpers/drawn.py
    pass
else:
    # A submission is judged on the same examples whenever it is tested; other runs draw new ones.
    settings.register_profile("ci", derandomize=True)
    if os.environ.get("CI"):
        settings.load_profile("ci")

ROOT = Path(__file__).parents[1]
# The benchmarks are run from a checkout, not installed: importable, behind what is installed.
sys.path.append(str(ROOT))
sys.path.append(str(ROOT / "tests" / "csrc"))

import emulate  # noqa: E402

import coalescer_fast  # noqa: E402
from coalescer_fast.ops import cuda_library, native_library  # noqa: E402
from tests.helpers.isa import available, using  # noqa: E402

if importlib.util.find_spec("coalescer_fast.export") is None:  # in a checkout, not installed
    coalescer_fast.__path__.append(str(ROOT))


@pytest.fixture(params=[] if native_library.unavailable() else available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set in turn, in use for the test."""
    with using(request.param):
        yield request.param


def emulated_library() -> Path:
    """The library of CUDA kernels compiled for the CPU, built once for these sources."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    read = [
        ROOT / "csrc" / "abi.h",
        *(ROOT / "csrc" / "cuda").iterdir(),
        Path(emulate.__file__),
        *emulate.EMULATION.iterdir(),
    ]
    name = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(read))).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"coalescer_fast-tests-{os.getuid()}" / f"{name}.so"
    library.parent.mkdir(mode=0o700, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):  # one of the workers of `pytest -n` builds it
        if not library.exists():
            unfinished = library.with_suffix(f".{os.getpid()}")
            emulate.build(sources, unfinished, "-Wall", "-Wextra", "-Werror")
            unfinished.rename(library)
    return library


if not torch.cuda.is_available() and sys.platform == "linux" and shutil.which(os.environ.get("CXX", "c++")):
    cuda_library.PATH, cuda_library.INTERPRETED = emulated_library(), True


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
        torch.zeros(
            ()
        )  # torch lists its factory functions when a device context is first used: let it list the real ones
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


@pytest.fixture(autouse=True)
def skip_without_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(
    params=[(network, how) for network in ("unet", "vae") for how in ("load_state_dict", "in place", "data")],
    ids="-".join,
)
def change_weights(request):
    """Changes a weight of a pipeline's network, in every way that there is."""
    network, how = request.param

    def change(pipe) -> None:
        module = getattr(pipe, network)
        weight = module.conv_in.weight if network == "unet" else module.decoder.layers[0].weight
        if how == "load_state_dict":
            module.load_state_dict(
                {name: 1.01 * p if p.is_floating_point() else p for name, p in module.state_dict().items()}
            )
        elif how == "in place":
            with torch.no_grad():
                weight.mul_(1.2)
        else:
            weight.data = 1.2 * weight.data

    return change
