"""What is exported: the pipeline's own networks and sampling loop as modules of plain tensors, float32 in and out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coalescer_fast import sampling
from coalescer_fast.models.unet import CoalescerUNet, Conditioning
from coalescer_fast.runtime.base import quiet_torch
from coalescer_fast.runtime.engines.manifest import BATCH, Port, Schedule
from coalescer_fast.runtime.engines.per_shape import Decoding, traceable
from coalescer_fast.runtime.watch import foreign
from coalescer_fast.scheduler import CoalescerScheduler

HEADS = ("direction_head", "distance_head")
RECIPES = {
    "fp32": "all in float32",
    "fp16": "weights and activations in float16; inputs, outputs, both heads, norms of directions, the update and the empty description's "
    "anchor in float32; statistics of normalisations in float32, by the operators' own definition (stash_type 1), and all of a GroupNorm "
    "with its SiLU whose channels are an odd multiple of 32",
}


class Evaluation(nn.Module):
    """(R (N, Cz, h, w), description (N, D), with cross-attention token rows and mask) -> direction (N, Cz, h, w), distance (N,).

    It takes the description's vector and not the `Conditioning` made of it: one small input, the same for every model, that needs nothing
    of this package at run time but the token table. What the network derives from it is then computed again in every evaluation; in
    `Generator`, once.
    """

    def __init__(self, unet: CoalescerUNet):
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, *description: Tensor) -> tuple[Tensor, Tensor]:
        direction, distance = self.unet(sample, *description, return_dict=False)
        return direction.float(), distance.float()


class Generator(nn.Module):
    """(noise (N, Cz, h, w), description as of `Evaluation`) -> pictures (N, 3, H, W) in [0, 1]: `sampling.sample` and the decoder.

    ``empty``: what the UNet derives of the empty description, one row, or None for no guidance; it is part of the graph.
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
        # expanded here, where nobody asks whether n is 1, which would fix it
        empty = None if self.empty is None else self.empty.map(lambda x: x.expand(n, *x.shape[1:]))
        latents = sampling.sample(self, self.scheduler, noise, self.unet.condition(*description), empty, self.scale)
        (pictures,) = self.decoding(latents)
        return ((pictures / 2 + 0.5).clamp(0, 1),)


def schedule_of(pipe: Any, steps: int, guidance: float | None) -> tuple[CoalescerScheduler, float]:
    """The pipeline's scheduler with ``steps`` set, and the guidance scale, the model's own if None."""
    scheduler = copy.copy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    return scheduler, scheduler.config.guidance_scale if guidance is None else guidance


@quiet_torch()
def network(pipe: Any, kind: str, precision: str, steps: int = 2, guidance: float | None = None) -> nn.Module:
    """A module to export, of copies; steps and guidance are a generator's.

    Raises: ValueError for networks that are not in float32 on a CPU, hold numbers that are not finite, or something of the user's that a
    graph would not follow: hooks, a patched forward, adapters that can be switched off.
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


def _unet(pipe: Any, precision: str) -> Any:
    unet = _copied(pipe.unet, "unet")
    unet.set_backend("reference")
    if precision == "fp16":
        norms = [(name, each.num_channels) for name, each in unet.named_modules() if isinstance(each, nn.GroupNorm)]
        # TensorRT-RTX 1.7 makes one kernel of a GroupNorm and its SiLU of halves for multiples of 64 channels, else three or four; in
        # float32, the casts included, for multiples of 32 (found by trying; with 1, 3 or all channels to a group it never does)
        wide = [name for name, channels in norms if channels % 64 == 32]
        _halve(
            {n: p for n, p in unet.named_parameters() if not n.startswith(HEADS) and n.rpartition(".")[0] not in wide},
            "unet",
        )
        features = unet.features
        unet.features = lambda *args: features(*args).float()  # what the heads read
    return unet


def _decoder(pipe: Any, precision: str) -> Any:
    decoder = _copied(pipe.vae.decoder, "decoder")
    if precision == "fp16":
        _halve(dict(decoder.named_parameters()), "decoder")
    return decoder


def _copied(network: nn.Module, name: str) -> Any:
    """See `network`."""
    if reason := foreign(network):
        raise ValueError(f"the {name} cannot be exported: {reason}, which no graph would call; remove it")
    if adapted := [where for where, module in network.named_modules() if hasattr(module, "base_layer")]:
        raise ValueError(
            f"the {name} cannot be exported: {adapted[0]} has an adapter, which no graph could switch off; merge it first"
        )
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
    """Round to float16. Raises ValueError for what that does not hold."""
    for where, parameter in parameters.items():
        half = parameter.data.half()
        if not half.isfinite().all():
            largest = float(parameter.abs().max())
            raise ValueError(
                f"the {name} cannot be exported in fp16: {where} has {largest:.3g}, and float16 ends at 65504; take fp32"
            )
        parameter.data = half


def ports(pipe: Any, kind: str) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs of `network`."""
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
    """Tensors to trace a network with."""
    return tuple(
        torch.ones([batch if size == BATCH else int(size) for size in p.shape], dtype=getattr(torch, p.dtype))
        for p in inputs
    )
