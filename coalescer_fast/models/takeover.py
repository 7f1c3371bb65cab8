"""Weights of diffusers' UNets for `CoalescerUNet.from_diffusers`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from .unet import CoalescerUNet, ResidualBlock, SelfAttention, TransformerBlock, TransformerLayer

# E|x - R|, with x and R independent and of RMS 1
DISTANCE = math.sqrt(2)
# settings of diffusers' UNets that a coalescer has one value for
PLAIN: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "downsample_type": ("conv",),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_type": ("positional",),
    "upsample_type": ("conv",),
}
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True, "AttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True, "AttnUpBlock2D": True}


def take_over(
    cls: type[CoalescerUNet],
    unet: nn.Module,
    scheduler: Any,
    timestep: int | None,
    description_dim: int | None,
    embedding_dim: int | None,
    conditions: Mapping[str, Any],
) -> CoalescerUNet:
    """`CoalescerUNet.from_diffusers`."""
    if not isinstance(unet, (UNet2DConditionModel, UNet2DModel)):
        raise TypeError(f"unet is a {type(unet).__name__}; expected a UNet2DConditionModel or UNet2DModel of diffusers")
    settings = _configuration(unet)
    width, cross = unet.config.block_out_channels[0], settings["cross_attention_dim"]
    timestep = _last_timestep(scheduler) if timestep is None else timestep
    factor, residual = _prediction(scheduler, timestep)
    embedded = _time_embedding(unet, timestep, conditions)
    network: CoalescerUNet = cls(
        **settings,
        description_dim=description_dim or cross or 128,
        embedding_dim=embedding_dim or 2 * width,
        sample_residual=residual,
    )
    nn.Module.to(network, unet.device, unet.dtype)
    with torch.no_grad():
        _copy(network.conv_in, unet.conv_in)
        for ours, theirs in zip((*network.down, network.mid, *network.up), _parts(unet)):
            _copy_part(ours, theirs, embedded)
        _copy_norm(network.norm_out, unet.conv_norm_out)
        _copy(network.direction_head, unet.conv_out, factor)
        network.distance_head.bias.fill_(math.log(math.expm1(DISTANCE)))  # softplus of it is the distance
    network.train(unet.training)
    return network


def _prediction(scheduler: Any, timestep: int) -> tuple[float, float]:
    """The factors of conv_out and of R in the direction."""
    if scheduler is None:
        return 1.0, 0.0
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        kind = type(scheduler).__name__
        raise ValueError(f"scheduler is a {kind}, which has no alphas_cumprod; give the DDPM scheduler of the training")
    if not 0 <= timestep < len(alphas):
        raise ValueError(f"timestep is {timestep}; expected one of the scheduler's, 0 to {len(alphas) - 1}")
    kind, alpha_squared = scheduler.config.get("prediction_type", "epsilon"), float(alphas[timestep])
    alpha, sigma = math.sqrt(alpha_squared), math.sqrt(1 - alpha_squared)
    if kind == "epsilon":
        if not alpha > 1e-4:
            raise ValueError(
                f"timestep is {timestep}, where alpha is {alpha:.1g} and epsilon says nothing of the picture; give less"
            )
        of_output, of_sample = -sigma / alpha, 1 / alpha
    elif kind == "v_prediction":
        of_output, of_sample = -sigma, alpha
    elif kind == "sample":
        of_output, of_sample = 1.0, 0.0
    else:
        raise ValueError(f"scheduler has prediction_type {kind!r}; expected epsilon, v_prediction or sample")
    return of_output / DISTANCE, (of_sample - 1) / DISTANCE


def _last_timestep(scheduler: Any) -> int:
    return int(scheduler.config.num_train_timesteps) - 1 if scheduler is not None else 999


def _configuration(unet: Any) -> dict[str, Any]:
    """Arguments of `CoalescerUNet` for a UNet of this layout."""
    config = unet.config
    for name, allowed in PLAIN.items():
        if config.get(name, allowed[0]) not in allowed:
            raise _refused(name, config[name])
    if any(hasattr(module, "base_layer") for module in unet.modules()):
        raise ValueError("unet has adapters (LoRA), which are not taken over: fuse them and unload them first")
    if config.in_channels != config.out_channels:
        raise _refused("in_channels", f"{config.in_channels} and out_channels {config.out_channels}")
    if config.norm_num_groups is None:
        raise _refused("norm_num_groups", None)
    layers = config.layers_per_block
    if not isinstance(layers, int):
        if len(set(layers)) > 1:
            raise _refused("layers_per_block", layers)
        layers = layers[0]
    for names, known in ((config.down_block_types, DOWN_BLOCKS), (config.up_block_types, UP_BLOCKS)):
        for name in names:
            if name not in known:
                raise _refused("a block of type", name)
    attends = [DOWN_BLOCKS[name] for name in config.down_block_types]
    if attends != [UP_BLOCKS[name] for name in reversed(config.up_block_types)]:
        raise _refused("attention at other levels on the way up", tuple(config.up_block_types))

    blocks = [[down, up] for down, up in zip(unet.down_blocks, reversed(unet.up_blocks))]
    if unet.mid_block is not None:
        blocks[-1].append(unet.mid_block)
    found = [[each for block in level for each in getattr(block, "attentions", None) or ()] for level in blocks]
    transformers = isinstance(unet, UNet2DConditionModel)
    heads = [_same("attention_head_dim", map(_heads, level)) for level in found]
    depths = [
        _same("transformer_layers_per_block", (len(each.transformer_blocks) for each in level)) if transformers else 1
        for level in found
    ]
    cross = None
    if transformers:
        widths = {
            layer.attn2.to_k.in_features for level in found for each in level for layer in each.transformer_blocks
        }
        if len(widths) > 1:
            raise _refused("cross_attention_dim", config.cross_attention_dim)
        cross = widths.pop() if widths else None
    size = config.sample_size
    sides = {size} if isinstance(size, int) or size is None else set(size)
    if len(sides) > 1:
        raise _refused("sample_size", tuple(size))
    return {
        "sample_size": sides.pop() or 64,
        "latent_channels": config.in_channels,
        "block_out_channels": tuple(config.block_out_channels),
        "layers_per_block": layers,
        "norm_num_groups": config.norm_num_groups,
        "attention_levels": tuple(i for i, has in enumerate(attends) if has),
        "mid_attention": bool(unet.mid_block is not None and getattr(unet.mid_block, "attentions", None)),
        "num_attention_heads": heads[0] if len(set(heads)) == 1 else tuple(heads),
        "cross_attention_dim": cross,
        "norm_eps": config.norm_eps,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else tuple(depths),
    }


def _heads(attention: Any) -> int:
    return int(attention.heads if hasattr(attention, "heads") else attention.transformer_blocks[0].attn1.heads)


def _same(name: str, values: Iterable[int]) -> int:
    """What all attention blocks of a level have; 1 where there are none."""
    found = set(values)
    if len(found) > 1:
        raise _refused(name, f"{sorted(found)} in one level")
    return found.pop() if found else 1


def _refused(name: str, value: Any) -> ValueError:
    return ValueError(f"unet has {name} {value}, which cannot be taken over: a coalescer has no such part")


class _Embedded(Exception):
    """Carries the time embedding out of a UNet's call."""


def _time_embedding(unet: Any, timestep: int, conditions: Mapping[str, Any]) -> torch.Tensor:
    """What the residual blocks are given at a timestep, (1, E), activated."""

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Embedded(args[1] if len(args) > 1 else kwargs["temb"])

    config, first = unet.config, unet.down_blocks[0].resnets[0]
    side = 2 ** (len(config.block_out_channels) - 1)
    sample = torch.zeros(1, config.in_channels, side, side, dtype=unet.dtype, device=unet.device)
    given = dict(conditions)
    if isinstance(unet, UNet2DConditionModel):
        cross = config.cross_attention_dim
        cross = cross if isinstance(cross, int) else cross[0]
        given["encoder_hidden_states"] = torch.zeros(1, 1, cross, dtype=unet.dtype, device=unet.device)
    handle = first.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        with torch.no_grad():
            type(unet).forward(unet, sample, timestep, **given)  # not what may have been put in the place of forward
    except _Embedded as found:
        embedded: torch.Tensor = first.nonlinearity(found.args[0])
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        fix = "give what else its call takes, such as class_labels or added_cond_kwargs, for one sample"
        raise ValueError(f"unet cannot be evaluated with these conditions ({reason:.200}): {fix}") from error
    finally:
        handle.remove()
    if len(embedded) != 1:
        raise ValueError(f"the conditions are of {len(embedded)} samples; give those of one")
    return embedded


def _parts(unet: Any) -> Iterable[list[nn.Module]]:
    """The UNet's modules in the order and the groups of `CoalescerUNet`: down, mid, up."""
    for block in unet.down_blocks:
        yield from _levels(block)
        if block.downsamplers is not None:
            yield [block.downsamplers[0].conv]
    if unet.mid_block is None:
        yield []
    else:
        blocks: list[nn.Module] = [unet.mid_block.resnets[0]]
        for attention, resnet in zip(getattr(unet.mid_block, "attentions", ()), unet.mid_block.resnets[1:]):
            blocks += [attention, resnet] if attention is not None else [resnet]
        yield blocks
    for block in unet.up_blocks:
        yield from _levels(block)
        if block.upsamplers is not None:
            yield [block.upsamplers[0].conv]


def _levels(block: Any) -> Iterable[list[nn.Module]]:
    attentions: Sequence[nn.Module] = getattr(block, "attentions", None) or ()
    for i, resnet in enumerate(block.resnets):
        yield [resnet, *attentions[i : i + 1]]


def _copy_part(ours: Iterable[nn.Module], theirs: Iterable[nn.Module], embedded: torch.Tensor) -> None:
    # a UNet without a bottom leaves the residual blocks there as they are: without effect
    for mine, its in zip(ours, theirs):
        if isinstance(mine, ResidualBlock):
            _copy_residual(mine, its, embedded)
        elif isinstance(mine, TransformerBlock):
            _copy_transformer(mine, its)
        elif isinstance(mine, SelfAttention):
            _copy_self_attention(mine, its)
        else:
            _copy(mine, its)


def _copy_residual(ours: ResidualBlock, theirs: Any, embedded: torch.Tensor) -> None:
    _copy_norm(ours.norm1, theirs.norm1)
    _copy_norm(ours.norm2, theirs.norm2)
    for mine, its in ((ours.conv1, theirs.conv1), (ours.conv2, theirs.conv2), (ours.shortcut, theirs.conv_shortcut)):
        if mine is not None:
            _copy(mine, its)
    time = theirs.time_emb_proj(embedded)[0]
    if theirs.time_embedding_norm == "scale_shift":
        ours.film.bias.copy_(time)  # scales, then shifts, in both
    else:
        assert ours.conv1.bias is not None
        ours.conv1.bias.add_(time)


def _copy_transformer(ours: TransformerBlock, theirs: Any) -> None:
    _copy_norm(ours.norm, theirs.norm)
    _copy(ours.proj_in, theirs.proj_in)
    _copy(ours.proj_out, theirs.proj_out)
    for mine, its in zip(ours.layers, theirs.transformer_blocks):
        _copy_layer(mine, its)


def _copy_layer(ours: TransformerLayer, theirs: Any) -> None:
    for mine, its in zip((ours.norm1, ours.norm2, ours.norm3), (theirs.norm1, theirs.norm2, theirs.norm3)):
        _copy(mine, its)
    one, two = theirs.attn1, theirs.attn2
    ours.to_qkv.weight.copy_(torch.cat([one.to_q.weight, one.to_k.weight, one.to_v.weight]))
    _copy(ours.to_out1, one.to_out[0])
    _copy(ours.to_q, two.to_q)
    ours.to_kv.weight.copy_(torch.cat([two.to_k.weight, two.to_v.weight]))
    _copy(ours.to_out2, two.to_out[0])
    _copy(ours.ff_in, theirs.ff.net[0].proj)  # value, then gate, in both
    _copy(ours.ff_out, theirs.ff.net[2])


def _copy_self_attention(ours: SelfAttention, theirs: Any) -> None:
    if theirs.group_norm is None:
        raise _refused("attention without", "a GroupNorm")
    _copy_norm(ours.norm, theirs.group_norm)
    for name in ("weight", "bias"):
        joined = torch.cat([getattr(layer, name) for layer in (theirs.to_q, theirs.to_k, theirs.to_v)])
        getattr(ours.to_qkv, name).copy_(joined)
    _copy(ours.to_out, theirs.to_out[0])


def _copy_norm(ours: nn.GroupNorm, theirs: Any) -> None:
    if (ours.num_groups, ours.eps) != (theirs.num_groups, theirs.eps):
        raise _refused("a GroupNorm of", f"{theirs.num_groups} groups and eps {theirs.eps}")
    _copy(ours, theirs)


def _copy(ours: Any, theirs: Any, factor: float = 1.0) -> None:
    """Copy weight and bias; a 1x1 convolution may become a linear layer."""
    if ours.weight.numel() != theirs.weight.numel() or (ours.bias is None) != (theirs.bias is None):
        raise _refused(f"a {type(theirs).__name__} of shape", tuple(theirs.weight.shape))
    ours.weight.copy_(factor * theirs.weight.reshape(ours.weight.shape))
    if ours.bias is not None:
        ours.bias.copy_(factor * theirs.bias)
