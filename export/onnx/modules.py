"""What is exported: the pipeline's networks and sampling loop, as modules of plain tensors, float32 in and out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from coalescer_fast import sampling
from coalescer_fast.models.unet import CoalescerUNet, Conditioning
from coalescer_fast.runtime.base import quiet_torch
from coalescer_fast.runtime.engines.manifest import BATCH, Port, Schedule
from coalescer_fast.runtime.engines.per_shape import Decoding, traceable
from coalescer_fast.runtime.watch import foreign
from coalescer_fast.scheduler import CoalescerScheduler

if TYPE_CHECKING:
    from coalescer_fast.pipeline import CoalescerPipeline

M = TypeVar("M", bound=nn.Module)
HEADS = ("direction_head", "distance_head")
RECIPES = {
    "fp32": "all in float32",
    "fp16": "weights and activations in float16; inputs, outputs, both heads, norms of directions, the update and the "
    "empty description's anchor in float32; statistics of normalisations in float32, by the operators' own definition "
    "(stash_type 1), and all of a GroupNorm with its SiLU whose channels are an odd multiple of 32",
}


class Evaluation(nn.Module):
    """One evaluation of the UNet.

    Takes R (N, C, h, w) and the description: vectors (N, D), and for cross-attention also token rows and their mask.
    Returns direction (N, C, h, w) and distance (N,).

    The description is an input, and not the `Conditioning` that is made from it: a small input, the same for every
    model, for which a deployment needs nothing from this package but the token table. The conditioning is then computed
    again in every evaluation; in `Generator`, only once.

    Args:
        unet: The UNet.
    """

    def __init__(self, unet: CoalescerUNet):
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, *description: Tensor) -> tuple[Tensor, Tensor]:
        direction, distance = self.unet(sample, *description, return_dict=False)
        return direction.float(), distance.float()


class Generator(nn.Module):
    """A whole call: `sampling.sample` and the decoder.

    Takes noise (N, C, h, w) and the description, as `Evaluation` does. Returns pictures (N, 3, H, W) in [0, 1].

    Args:
        unet: The UNet.
        decoding: The decoder.
        scheduler: The scheduler, its steps set.
        scale: Guidance scale.
        empty: Conditioning of the empty description, one row, or None without guidance. It becomes a constant.
    """

    backend = "reference"

    def __init__(
        self,
        unet: CoalescerUNet,
        decoding: Decoding,
        scheduler: CoalescerScheduler,
        scale: float,
        empty: Conditioning | None,
    ):
        super().__init__()
        self.unet, self.decoding, self.scheduler, self.scale, self.empty = unet, decoding, scheduler, scale, empty

    def evaluate(self, sample: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        return self.unet(sample, conditioning, return_dict=False)

    def forward(self, noise: Tensor, *description: Tensor) -> tuple[Tensor]:
        n = noise.shape[0]
        # expanded here: `sampling.sample` would compare n with 1, and the exporter would take n for a constant
        empty = None if self.empty is None else self.empty.map(lambda x: x.expand(n, *x.shape[1:]))
        latents = sampling.sample(self, self.scheduler, noise, self.unet.condition(*description), empty, self.scale)
        (pictures,) = self.decoding(latents)
        return ((pictures / 2 + 0.5).clamp(0, 1),)


def schedule_of(pipe: CoalescerPipeline, steps: int, guidance: float | None) -> tuple[CoalescerScheduler, float]:
    """The pipeline's scheduler with ``steps`` set, and the guidance scale, the model's own if None."""
    scheduler = copy.copy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    return scheduler, scheduler.config.guidance_scale if guidance is None else guidance


@quiet_torch()
def network(
    pipe: CoalescerPipeline, kind: str, precision: str, steps: int = 2, guidance: float | None = None
) -> nn.Module:
    """A module to export, made from copies of the pipeline's networks.

    Args:
        pipe: The pipeline.
        kind: "unet", "decoder" or "generator".
        precision: "fp32" or "fp16".
        steps: Number of steps of a generator.
        guidance: Guidance scale of a generator; the model's own if None.

    Raises:
        ValueError: If a network is not in float32 on a CPU, holds numbers that are not finite, or has what a graph
            could not follow: hooks, a patched forward, adapters that can be switched off.
    """
    if kind == "unet":
        return Evaluation(_unet(pipe, precision)).eval()
    decoding = Decoding(_decoder(pipe, precision), pipe.vae.patch_size)
    if kind == "decoder":
        return decoding.eval()
    unet = _unet(pipe, precision)
    scheduler, scale = schedule_of(pipe, steps, guidance)
    empty = None
    if Schedule.of(scheduler, scale).guided:
        exact = pipe.condition([""], pipe.device)
        empty = exact.map(lambda x: x.to(unet.null.dtype) if x.is_floating_point() else x)
        empty.anchor = exact.anchor
    return Generator(unet, decoding, scheduler, scale, empty).eval()


def _unet(pipe: CoalescerPipeline, precision: str) -> CoalescerUNet:
    unet = _copied(pipe.unet, "unet")
    unet.set_backend("reference")
    if precision == "fp16":
        norms = [(name, each.num_channels) for name, each in unet.named_modules() if isinstance(each, nn.GroupNorm)]
        # TensorRT-RTX 1.7 fuses a GroupNorm with its SiLU into one kernel, instead of three or four, in float16 for
        # multiples of 64 channels, and in float32, the casts included, for multiples of 32. (Found by trying; never
        # with 1, 3 or all channels in a group.)
        wide = [name for name, channels in norms if channels % 64 == 32]
        parameters = dict(unet.named_parameters())
        in_float = [n for n in parameters if n.startswith(HEADS) or n.rpartition(".")[0] in wide]
        _halve({n: p for n, p in parameters.items() if n not in in_float}, "unet")
        features = unet.features
        unet.features = lambda *args: features(*args).float()  # input of the heads
    return unet


def _decoder(pipe: CoalescerPipeline, precision: str) -> nn.Module:
    decoder = _copied(pipe.vae.decoder, "decoder")
    if precision == "fp16":
        _halve(dict(decoder.named_parameters()), "decoder")
    return decoder


def _copied(network: M, name: str) -> M:
    """A copy to trace. Raises ValueError as `network` does."""
    if reason := foreign(network):
        raise ValueError(f"the {name} cannot be exported: {reason}, which no graph would call; remove it")
    if adapted := [where for where, module in network.named_modules() if hasattr(module, "base_layer")]:
        reason = f"{adapted[0]} has an adapter, which no graph could switch off"
        raise ValueError(f"the {name} cannot be exported: {reason}; merge it first")
    for where, tensor in network.state_dict().items():
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            here = f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
            raise ValueError(
                f"the {name} cannot be exported: {where} is in {here}; load the pipeline in float32 on a CPU"
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"the {name} cannot be exported: {where} holds numbers that are not finite; load weights that are"
            )
    return traceable(network)


def _halve(parameters: Mapping[str, nn.Parameter], name: str) -> None:
    """Round parameters to float16. Raises ValueError if one of them is too large for it."""
    for where, parameter in parameters.items():
        half = parameter.data.half()
        if not half.isfinite().all():
            largest = float(parameter.abs().max())
            reason = f"{where} has {largest:.3g}, and float16 ends at 65504"
            raise ValueError(f"the {name} cannot be exported in fp16: {reason}; take fp32")
        parameter.data = half


def ports(pipe: CoalescerPipeline, kind: str) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs of the graph that `network` becomes."""
    config, factor = pipe.unet.config, pipe.vae.scale_factor
    side = config.sample_size
    latents: tuple[int | str, ...] = (BATCH, config.latent_channels, side, side)
    picture = Port("picture", "float32", (BATCH, 3, side * factor, side * factor))
    if kind == "decoder":
        return (Port("latents", "float32", latents),), (picture,)
    names = ("description", "token_rows", "token_mask")
    described = tuple(
        Port(name, str(x.dtype).removeprefix("torch."), (BATCH, *x.shape[1:]))
        for name, x in zip(names, pipe.describe([""], pipe.device))
    )
    if kind == "generator":
        return (Port("noise", "float32", latents), *described), (picture,)
    heads = Port("direction", "float32", latents), Port("distance", "float32", (BATCH,))
    return (Port("sample", "float32", latents), *described), heads


def example(inputs: tuple[Port, ...], batch: int) -> tuple[Tensor, ...]:
    """Tensors of ones to trace a network with."""
    return tuple(
        torch.ones([batch if size == BATCH else int(size) for size in p.shape], dtype=getattr(torch, p.dtype))
        for p in inputs
    )
