"""`Runtime`, what a pipeline's networks are run by, and `PipelineRuntime`, what all accelerated ones have in common."""

from __future__ import annotations

import copy
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import sampling
from ..finite import check_finite, nan_where_not_finite
from ..models.autoencoder import CoalescerAutoencoder
from ..models.unet import Conditioning
from ..nvtx_ranges import span
from .watch import Watch, foreign

if TYPE_CHECKING:
    from ..pipeline import CoalescerPipeline
    from ..prompts import Descriptions
    from ..sampling import Call, OnStep
    from ..scheduler import CoalescerScheduler

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

# How many things this process has prepared that later calls use as they are: packed weights, programs, compiled
# networks, CUDA graphs. A call after a warm-up adds none.
count = 0


def counted(prepared: T) -> T:
    """Count one prepared thing and return it."""
    global count
    count += 1
    return prepared


@dataclass(frozen=True)
class Part:
    """One row of `Runtime.explain`.

    Attributes:
        name: a network ("unet"), an op ("group_norm_silu") or something else that the runtime reports.
        runs_on: what runs it, in words.
        because: why that and nothing faster, in words.
        backend: the backend that an op runs on. None for whatever is not an op, and for an op that other kernels
            compute or whose backend each call chooses.
    """

    name: str
    runs_on: str
    because: str
    backend: str | None = None

    @classmethod
    def of_op(cls, name: str, backend: str, because: str) -> Part:
        """The row of an op that runs on ``backend``, which may be "auto"."""
        return cls(name, backend, because, None if backend == "auto" else backend)


class Runtime(ABC):
    """Runs the networks of one pipeline, which it does not keep alive.

    Latents and samples R may be given in any floating-point dtype, with any strides and on any device. Inference mode
    and autocast of the caller change nothing. Directions, distances, latents and pictures are returned in float32,
    whatever the dtype of the networks, and no later call writes to them. Several threads may call at once.

    Attributes:
        name: shown to the user, as by `coalescer_fast.verify`.
        device: where the networks run.
        dtype: what they compute in.
        backend: of the ops that the sampling loop calls, see `coalescer_fast.ops`.
        max_batch: the largest batch of one call, or None for no limit.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    backend: str
    max_batch: int | None = None

    def __init__(self, pipe: CoalescerPipeline):
        self._pipe = weakref.ref(pipe)

    @property
    def pipe(self) -> CoalescerPipeline:
        """The pipeline. Raises RuntimeError if it is gone."""
        pipe = self._pipe()
        if pipe is None:
            raise RuntimeError("the pipeline of this runtime is gone: keep the pipeline that was accelerated")
        return pipe

    @property
    def precision(self) -> str:
        """What the networks multiply in: the name of the dtype, or "int8" where the dtype is that of the rest."""
        return str(self.dtype).removeprefix("torch.")

    def refresh(self) -> None:  # noqa: B027 (nothing to do where nothing is prepared)
        """Take over the pipeline's networks as they are now. The pipeline calls it before every call."""

    def forget(self) -> None:  # noqa: B027
        """Have the next `refresh` take the networks as changed, even if they look the same."""

    @abstractmethod
    def condition(self, texts: Descriptions, device: torch.device) -> Conditioning:
        """Compute what the UNet derives from descriptions alone, on ``device``."""

    @abstractmethod
    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Evaluate the UNet.

        Args:
            sample: R (N, C, h, w).
            conditioning: of N descriptions, from `condition`.

        Returns:
            direction (N, C, h, w) and distance (N,), float32.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w) to pictures (N, 3, H, W), about in [-1, 1], float32."""

    @abstractmethod
    def explain(self) -> list[Part]:
        """Say what runs each part, and why."""

    def generate(
        self,
        scheduler: CoalescerScheduler,
        sample: Tensor,
        conditioning: Conditioning,
        empty: Conditioning | None,
        guidance_scale: float,
        decode: bool,
        on_step: OnStep | None = None,
        call: Call | None = None,
    ) -> Tensor:
        """Run all steps of a call, and the decoder.

        Here the sampling loop. A runtime that can do the whole call at once overrides it, and comes back to this one
        where ``on_step`` is given, which has to see every step.

        Args:
            scheduler: with its steps set.
            sample: R (N, C, h, w), the noise.
            conditioning: of N descriptions.
            empty: of the empty or the negative description, N rows or one; None without guidance.
            guidance_scale: 1 for none.
            decode: whether to decode.
            on_step: see `sampling.sample`.
            call: see `sampling.sample`.

        Returns:
            Latents (N, C, h, w), or with ``decode`` pictures (N, 3, H, W), about in [-1, 1], NaN where the latents are
            not finite.
        """
        latents = sampling.sample(self, scheduler, sample, conditioning, empty, guidance_scale, on_step, call)
        if not decode:
            return latents
        with span("decode"):
            return nan_where_not_finite(self.decode(latents), latents)


class PipelineRuntime(Runtime):
    """A runtime that prepares what it runs from the pipeline's networks, and prepares it anew when they have changed.

    Attributes:
        survives_fork: whether a child process can go on with what its parent prepared.
        runs_own_code: whether a network with hooks or a patched forward is run as it is, instead of refused.
        lock: held while something is prepared.
        watch: tells whether the networks have changed since they were taken over; None before that.
        code: see `own_code`, of the pipeline that was taken over.
    """

    survives_fork: ClassVar[bool] = False
    runs_own_code: ClassVar[bool] = False

    def __init__(self, pipe: CoalescerPipeline):
        super().__init__(pipe)
        self.lock = threading.RLock()
        self.watch: Watch | None = None
        self.code: dict[str, str] = {}
        self._prepared = False  # once in its life
        self._forked = False
        lock_anew_after_fork(self)

    @abstractmethod
    def take_over(self) -> None:
        """Prepare anew, from networks that are not those that were prepared.

        Raises:
            ValueError: if they cannot run.
        """

    def refresh(self) -> None:
        """Take over the pipeline's networks if they are others than at the last call, or have changed since.

        Raises:
            ValueError: if they have moved to another device or cannot run, and in a child process after a fork.
        """
        if self._forked and not self.survives_fork:
            raise ValueError(
                f"backend {self.name!r} was prepared before a fork, and its threads are not here: accelerate again"
            )
        pipe = self.pipe
        if self._prepared:
            self._check_device(pipe)
        with self.lock:
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
            self.watch, self._prepared = watch, True

    def _check_device(self, pipe: CoalescerPipeline) -> None:
        there = pipe.unet.null.device  # not pipe.device, which takes longer than a small network
        if there != self.device and not pipe.is_offloaded:
            raise ValueError(
                f"the pipeline was accelerated on {self.device} and is on {there}: accelerate it again, or restore it"
            )

    def forget(self) -> None:
        self.watch = None


def own_code(pipe: CoalescerPipeline) -> dict[str, str]:
    """Find code of the user's in what a runtime does in the pipeline's place.

    Returns:
        By part ("conditioning", "unet", "decoder"), what the user has replaced there, in words.
    """
    from ..pipeline import CoalescerPipeline

    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return dict.fromkeys(("conditioning", "unet", "decoder"), "there are hooks of all modules")
    kind, vae = type(pipe), pipe.vae
    found = {}
    for part, method, ours in (
        ("conditioning", kind.condition, CoalescerPipeline.condition),
        ("unet", kind.evaluate, CoalescerPipeline.evaluate),
        ("decoder", kind.decode, CoalescerPipeline.decode),
    ):
        if method is not ours or ours.__name__ in pipe.__dict__:
            found[part] = f"{ours.__name__} of the pipeline is another"
    standard = isinstance(vae, CoalescerAutoencoder) and type(vae).decode is CoalescerAutoencoder.decode
    if not standard or "decode" in vae.__dict__:
        found["decoder"] = "decode of vae is another"
    return found


_locking: weakref.WeakSet[Any] = weakref.WeakSet()


def lock_anew_after_fork(owner: Any) -> None:
    """Give the owner another ``lock`` in a child process, where the thread that held it is not, and note the fork."""
    _locking.add(owner)


def _after_fork() -> None:
    for owner in _locking:
        owner.lock = threading.RLock()
        owner._forked = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def channels_last_copy(network: M, dtype: torch.dtype) -> M:
    """Copy a network for inference in ``dtype``, channels innermost."""
    fast = copy.deepcopy(network).eval().requires_grad_(False)
    for parameter in fast.parameters():
        parameter.data = parameter.data.to(dtype)
    fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return fast


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Have torch make ordinary tensors, without gradients, in the dtypes that it is given.

    A context manager and a decorator. Inside, inference mode, gradient mode and autocast of the caller are off.
    """
    with torch.inference_mode(False), torch.no_grad(), _autocast_off("cpu"), _autocast_off("cuda"):
        yield


def _autocast_off(device_type: str) -> AbstractContextManager[object]:
    # made only where it is on: making it takes longer than the rest
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def entered(x: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring a tensor of the caller's to a runtime's device and dtype.

    Strides and offset stay as they are. What lies in memory is the values themselves and not lazily their negatives.
    """
    return x.detach().to(device, dtype).resolve_neg()
