"""Calls of diffusers' networks: the arguments that a configuration asks for, and what takes them as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 77  # of CLIP
TIME_IDS = 6  # of SDXL: sizes and crops of the original and of the target
NESTED = "added_cond_kwargs"


def inputs(
    kind: str,
    config: Mapping[str, Any],
    batch: int,
    size: int,
    timestep: int = 999,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The arguments of a call of a UNet, drawn anew for each timestep.

    Args:
        kind: diffusers' class.
        config: of the network; what it does not name has the default of the class.
        batch: number of images.
        size: height and width of the latents.
        timestep: of the call.
        seed: of the numbers.
        dtype: of all but the timestep.

    Raises:
        ValueError: for a network that takes what this does not know.
    """
    generator = torch.Generator().manual_seed(seed + timestep)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32, generator=generator).to(dtype)

    for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if config.get(name) is not None:
            raise ValueError(f"{name} is {config[name]!r}; expected a UNet without it, whose calls are known")
    given: dict[str, Any] = {
        "sample": drawn(batch, config.get("in_channels", 4), size, size),
        "timestep": torch.tensor(timestep, dtype=torch.int64),
    }
    if kind == "UNet2DModel":
        return given
    given["encoder_hidden_states"] = drawn(batch, TOKENS, config["cross_attention_dim"])
    if config.get("time_cond_proj_dim") is not None:
        given["timestep_cond"] = drawn(batch, config["time_cond_proj_dim"])
    if (embedding := config.get("addition_embed_type")) is not None:
        if embedding != "text_time":
            raise ValueError(f"addition_embed_type is {embedding!r}; expected text_time, as of SDXL, or None")
        pooled = config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
        ids = torch.tensor([8 * size, 8 * size, 0, 0, 8 * size, 8 * size], dtype=dtype).repeat(batch, 1)
        given[NESTED] = {"text_embeds": drawn(batch, pooled), "time_ids": ids}
    return given


def evaluate(module: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """The result of a call: the prediction of a UNet, the image of a decoder."""
    structured = isinstance(getattr(module, "config", None), dict)  # as results of a whole model of diffusers are
    result: Tensor = module(**arguments, return_dict=False)[0] if structured else module(**arguments)
    return result


def flat(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call by name, for what takes no nested arguments."""
    found = dict(arguments)
    return {**{key: value for key, value in found.items() if key != NESTED}, **found.get(NESTED, {})}


class Flat(nn.Module):
    """A network for exporters and compilers: it takes the tensors of `flat` by position and returns one tensor.

    Args:
        module: the network.
        arguments: of one of its calls.
    """

    def __init__(self, module: nn.Module, arguments: dict[str, Any]):
        super().__init__()
        self.module = module
        self.outer = [key for key in arguments if key != NESTED]
        self.inner = list(arguments.get(NESTED, {}))

    def forward(self, *tensors: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(self.outer, tensors))
        if self.inner:
            given[NESTED] = dict(zip(self.inner, tensors[len(self.outer) :]))
        return evaluate(self.module, given)
