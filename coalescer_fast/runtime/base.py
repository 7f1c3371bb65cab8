"""What every runtime of an accelerated pipeline is, and the count of what they have prepared."""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..finite import check_finite
from ..models.autoencoder import CoalescerAutoencoder
from ..models.unet import Conditioning
from .watch import Watch, foreign

if TYPE_CHECKING:
    from ..pipeline import CoalescerPipeline
    from ..prompts import Descriptions

T = TypeVar("T")

# How often something has been prepared in this process that later calls use as it is, a packed weight or a network for new shapes: a call
# after a warm-up adds nothing.
count = 0


def counted(prepared: T) -> T:
    global count
    count += 1
    return prepared


def channels_last_copy(network: nn.Module, dtype: torch.dtype) -> Any:
    """A copy for inference in this dtype, channels innermost."""
    fast = copy.deepcopy(network).eval().requires_grad_(False)
    for parameter in fast.parameters():
        parameter.data = parameter.data.to(dtype)
    return fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Inside, or as a decorator: torch makes ordinary tensors, without gradients, in the dtypes that it is given, whatever inference mode,
    gradient mode and autocast the caller has chosen."""
    with torch.inference_mode(False), torch.no_grad(), _autocast_off("cpu"), _autocast_off("cuda"):
        yield


def _autocast_off(device_type: str) -> Any:
    # made only where it is on: making it takes longer than the rest
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def entered(x: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of the caller's as a runtime reads it: on its device, in its dtype, and what lies in memory is its values, not lazily their
    negatives. Strides and offset stay as they are."""
    return x.detach().to(device, dtype).resolve_neg()


def precision(runtime: Any) -> str:
    """What a runtime's networks multiply in: "int8", or the name of its dtype, which is then that of the rest."""
    return "int8" if getattr(runtime, "quantised", False) else str(runtime.dtype).removeprefix("torch.")


class OfPipeline:
    """What every runtime has of its pipeline: ``pipe``, which it does not keep alive, and `refresh`. ``lock``: a new
    one after a fork, for the thread that held it is not in the child; code: see `own_code`."""

    pipe: CoalescerPipeline
    name: str
    # whether a child process can go on with what was prepared in its parent
    survives_fork = False
    # whether a network with hooks, or with a patched forward, is run as it is
    runs_own_code = False

    def __init__(self, pipe: CoalescerPipeline):
        self._pipe = weakref.ref(pipe)
        self.lock = threading.RLock()
        self.forked = False
        self.watch: Watch | None = None
        self.code: dict[str, str] = {}
        _runtimes.add(self)

    @property  # type: ignore[no-redef]
    def pipe(self) -> CoalescerPipeline:
        found = self._pipe()
        if found is None:
            raise RuntimeError("the pipeline of this runtime is gone: keep the pipeline that was accelerated")
        return found

    def refresh(self) -> None:
        """Take over the pipeline's networks if they are others than at the last call, or have changed since."""
        if self.forked and not self.survives_fork:
            raise ValueError(
                f"backend {self.name!r} was prepared before a fork, and its threads are not here: accelerate again"
            )
        with self.lock:
            pipe = self.pipe
            networks = pipe.unet, pipe.vae.decoder, pipe.description_encoder
            code = own_code(pipe)
            if self.watch is not None and not self.watch.changed(*networks) and code == self.code:
                return
            self.watch = None  # until all of it is taken over
            for name, network in zip(("unet", "vae.decoder", "description_encoder"), networks):
                check_finite(network, name)
                if not self.runs_own_code and name != "description_encoder" and (what := foreign(network)):
                    raise ValueError(
                        f"backend {self.name!r} cannot run the {name}: {what}; remove it, or restore the pipeline"
                    )
            if code and not self.runs_own_code:
                what = "; ".join(dict.fromkeys(code.values()))
                raise ValueError(
                    f"backend {self.name!r} cannot run the pipeline: {what}; remove it, or restore the pipeline"
                )
            watch, self.code = Watch(*networks), code
            self.take_over()
            self.watch = watch

    def take_over(self) -> None:
        """Prepare for the networks as they are, which are not those that were prepared for. Raises ValueError if they cannot run."""
        raise NotImplementedError

    def forget(self) -> None:
        """Take the networks as changed, whatever they look like."""
        self.watch = None


def own_code(pipe: CoalescerPipeline) -> dict[str, str]:
    """Of what a runtime does in the pipeline's place, by part, what has been given code of the user's, in words."""
    from ..pipeline import CoalescerPipeline

    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return dict.fromkeys(("conditioning", "unet", "decoder"), "there are hooks of all modules")
    found = {}
    for part, method in (("conditioning", "condition"), ("unet", "evaluate"), ("decoder", "decode")):
        if getattr(type(pipe), method) is not getattr(CoalescerPipeline, method) or method in pipe.__dict__:
            found[part] = f"{method} of the pipeline is another"
    vae = pipe.vae
    if getattr(type(vae), "decode", None) is not CoalescerAutoencoder.decode or "decode" in vae.__dict__:
        found["decoder"] = "decode of vae is another"
    return found


_runtimes: weakref.WeakSet[OfPipeline] = weakref.WeakSet()


def _after_fork() -> None:
    for runtime in _runtimes:
        runtime.lock = threading.RLock()
        runtime.forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Runtime(Protocol):
    """What runs a pipeline's networks in their place. name: the runtime's; device: the pipeline's; dtype: what the networks compute in;
    backend: of the ops that the pipeline itself calls.

    What is given, R and latents, may have any floating-point dtype, strides and device (`entered`), and the caller be in inference mode or
    under autocast, which changes nothing (`quiet_torch`). R, directions, distances and pictures are float32, whatever the dtype, and a
    result is not written to by a later call. Several threads may call at once.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    backend: str

    def refresh(self) -> None:
        """Take over the pipeline's networks if they have changed; comes before every call of the pipeline."""

    def forget(self) -> None:
        """Take the networks as changed at the next `refresh`."""

    def condition(self, texts: Descriptions, device: torch.device) -> Conditioning:
        """What the UNet derives from descriptions alone."""

    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Direction (N, C, h, w) and distance (N,) at R."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (N, 3, H, W), about in [-1, 1]."""

    def explain(self) -> list[dict[str, str]]:
        """Rows of "part", "runs on" and "because"."""
