"""A pipeline's networks by a compiler or an inference engine that prepares each for one batch size and resolution."""

from __future__ import annotations

import copy
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.unet import CoalescerUNet, Conditioning
from ...ops import native_library
from ..base import Part, PipelineRuntime, counted, entered, quiet_torch

if TYPE_CHECKING:
    from ...pipeline import CoalescerPipeline
    from ...prompts import Descriptions

LIMIT = 16  # prepared networks that a runtime keeps: the UNet and the decoder for eight sizes

Tensors = tuple[Tensor, ...]
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
# runs a prepared network on its first argument
Call = Callable[[Tensor], Tensors]
# takes the other arguments of a prepared network, once, and returns its `Call`
Bind = Callable[[Sequence[Tensor]], Call]
# (module, args, dtype, folder) -> Bind: prepares a module for the shapes of ``args``, to compute in ``dtype``. The
# module is in float32 and may be changed. ``args`` are contiguous, ordinary tensors; the first is in float32. Files may
# be written into the folder, which is deleted afterwards.
Prepare = Callable[[nn.Module, Tensors, torch.dtype, Path], Bind]


def traceable(network: M) -> M:
    """A copy for compilers and exporters: in eval mode and float32, every tensor contiguous in memory of its own."""
    with quiet_torch():
        traced = copy.deepcopy(network).eval().requires_grad_(False)
        for tensor in (*traced.parameters(), *traced.buffers()):
            values = tensor.data.float() if tensor.is_floating_point() else tensor.data
            tensor.data = values.resolve_neg().contiguous()
    return traced


class Evaluation(nn.Module):
    """One evaluation of the UNet that takes its conditioning as plain tensors. Inputs and outputs are in float32.

    Args:
        unet: The UNet.
        like: A conditioning with the same parts as those that will be given.
    """

    def __init__(self, unet: CoalescerUNet, like: Conditioning):
        super().__init__()
        self.unet = unet
        self.film, self.anchored, self.masked = len(like.film), like.anchor is not None, like.mask is not None

    @staticmethod
    def flatten(conditioning: Conditioning, dtype: torch.dtype) -> Tensors:
        """The tensors of a conditioning, contiguous and in ``dtype``.

        The anchor stays in float32, because both heads are relative to it.
        """
        rounded = conditioning.rounded(dtype)
        rounded.anchor = None if rounded.anchor is None else rounded.anchor.float()
        return tuple(t.clone(memory_format=torch.contiguous_format) for t in rounded.tensors())

    def forward(self, sample: Tensor, *flat: Tensor) -> Tensors:
        given = list(flat)
        mask = given.pop() if self.masked else None
        anchor = given.pop() if self.anchored else None
        pairs = list(zip(given[::2], given[1::2]))
        conditioning = Conditioning(pairs[: self.film], anchor, pairs[self.film :], mask)
        direction, distance = self.unet(sample, conditioning, return_dict=False)
        return direction.float(), distance.float()


class Decoding(nn.Module):
    """The decoder. Inputs and outputs are in float32."""

    def __init__(self, decoder: nn.Module, patch_size: int):
        super().__init__()
        self.decoder, self.patch_size = decoder, patch_size

    def forward(self, latents: Tensor) -> Tensors:
        x = latents.to(next(self.decoder.parameters()).dtype)
        return (F.pixel_shuffle(self.decoder(x).float(), self.patch_size),)


class PerShapeRuntime(PipelineRuntime):
    """Runs copies of the pipeline's networks, each prepared for a batch size and resolution at its first use.

    Everything is prepared anew after a weight has changed. One call runs at a time.

    Args:
        pipe: The pipeline.
        name: Name of the runtime.
        prepare: Prepares a network.
        dtype: What the networks compute in.
        takes: Dtype of the conditioning that the networks are given; ``dtype`` if None.
    """

    def __init__(
        self, pipe: CoalescerPipeline, name: str, prepare: Prepare, dtype: torch.dtype, takes: torch.dtype | None = None
    ):
        super().__init__(pipe)
        self.name, self.prepare, self.dtype, self.takes = name, prepare, dtype, takes or dtype
        self.device = pipe.device
        self.backend = "auto" if self.device.type != "cpu" else "reference" if native_library.unavailable() else "cpu"
        self.networks: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        # by id of a conditioning and shape of R: a conditioning is bound once and used in every step
        self.bound: dict[tuple[int, torch.Size], Call] = {}
        self.refresh()

    def take_over(self) -> None:
        """Drop everything that was prepared."""
        self.networks.clear()
        self.bound.clear()

    @quiet_torch()
    def condition(self, texts: Descriptions, device: torch.device) -> Conditioning:
        """Compute the conditioning as the reference does: it is cheap, and is then rounded only once."""
        return self.pipe.condition(texts, device)

    @quiet_torch()  # compilers guard against another mode, and freeze no weights in inference mode
    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        x = entered(sample, self.device).contiguous()
        key = id(conditioning), x.shape
        with self.lock:
            call = self.bound.get(key)
            if call is None:
                args = (x, *Evaluation.flatten(conditioning, self.takes))
                shapes = ("UNet", *(a.shape for a in args))
                bind = self._kept(shapes, lambda: self._prepare(lambda: self._evaluation(conditioning), args))
                call = self.bound[key] = bind(args[1:])
                weakref.finalize(conditioning, self.bound.pop, key, None)
            direction, distance = call(x)
        return direction, distance

    @quiet_torch()
    def decode(self, latents: Tensor) -> Tensor:
        x = entered(latents, self.device).contiguous()
        with self.lock:
            return self._kept(("decoder", x.shape), lambda: self._prepare(self._decoding, (x,))(()))(x)[0]

    def _evaluation(self, like: Conditioning) -> Evaluation:
        unet = traceable(self.pipe.unet)
        unet.set_backend("reference")
        return Evaluation(unet, like)

    def _decoding(self) -> Decoding:
        return Decoding(traceable(self.pipe.vae.decoder), self.pipe.vae.patch_size)

    def _kept(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """What was made for this key before, or is made now. Drops the least recently used above `LIMIT`."""
        found: T = self.networks.get(key) or make()
        self.networks[key] = found
        self.networks.move_to_end(key)
        if len(self.networks) > LIMIT:
            self.networks.popitem(last=False)
        return found

    def _prepare(self, make: Callable[[], nn.Module], args: Tensors) -> Bind:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                return counted(self.prepare(make().eval(), args, self.dtype, Path(folder)))
            except Exception as error:  # compilers and exporters raise anything; keep the first paragraph
                reason = " ".join(str(error).partition("\n\n")[0].split()) or type(error).__name__
                raise ValueError(f"backend {self.name!r} cannot prepare the networks: {reason}") from error

    def explain(self) -> list[Part]:
        """What runs each part, and for which sizes it is ready."""
        rows = []
        for part in ("UNet", "decoder"):
            sizes = ["x".join(map(str, key[1])) for key in self.networks if key[0] == part]
            ready = (
                f"it was asked for; prepared for inputs {', '.join(sorted(sizes))}"
                if sizes
                else "it was asked for; not prepared yet"
            )
            rows.append(Part(part, f"{self.name}, {self.dtype}", ready))
        return [*rows, Part.of_op("coalesce_step", self.backend, native_library.unavailable() or "it can run")]
