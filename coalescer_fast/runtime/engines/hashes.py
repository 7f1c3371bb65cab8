"""SHA-256 hashes of networks: an artefact runs in a pipeline only if they are equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from ...pipeline import CoalescerPipeline


def network_hashes(pipe: CoalescerPipeline, kind: str) -> dict[str, str]:
    """`network_sha256` of each network in an artefact of this kind.

    Args:
        pipe: The pipeline that holds the networks.
        kind: "unet", "decoder" or "generator".

    Returns:
        Hashes by name: "unet", "decoder", or both.
    """
    hashes = {}
    if kind in ("unet", "generator"):
        hashes["unet"] = network_sha256(pipe.unet, pipe.unet.config)
    if kind in ("decoder", "generator"):
        names = ("patch_size", "latent_channels", "width", "decoder_blocks")
        hashes["decoder"] = network_sha256(pipe.vae.decoder, {name: pipe.vae.config[name] for name in names})
    return hashes


def network_sha256(network: nn.Module, config: Mapping[str, Any]) -> str:
    """Hash of a network's configuration, its structure, and the name, dtype, shape and bytes of each of its tensors."""
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode())
    digest.update(structure_sha256(network).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().resolve_neg().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def structure_sha256(network: nn.Module) -> str:
    """Hash of what a forward depends on beside the tensors.

    That is the name and class of every module, and its public attributes that are numbers, strings or sequences of them
    (eps, num_heads, stride, negative_slope, ...). A module that is used in two places counts in both.
    """
    digest = hashlib.sha256()
    for name, module in network.named_modules(remove_duplicate=False):
        settings = {
            key: value for key, value in module.__dict__.items() if not key.startswith("_") and _is_setting(value)
        }
        for not_structure in ("training", "backend", "gradient_checkpointing"):
            settings.pop(not_structure, None)
        digest.update(json.dumps([name, type(module).__qualname__, settings], sort_keys=True).encode())
    return digest.hexdigest()


def _is_setting(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, (bool, int, float, str))
