"""Networks of diffusers as native programs, against themselves in PyTorch."""

from __future__ import annotations

import copy
import os
import pickle
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

import coalescer_fast as cf
from coalescer_fast.networks import runtimes
from coalescer_fast.ops import native_library
from coalescer_fast.runtime import base
from coalescer_fast.runtime.native.module import no_programs, runtime_of
from coalescer_fast.runtime.native.program import Program

from ...helpers import processes
from ...helpers.diffusers_networks import (
    CONDITIONAL,
    NAMES,
    SIZES,
    arguments,
    call,
    error,
    inputs,
    network,
    parts,
    randn,
    residuals,
)
from ...helpers.isa import available

pytestmark = pytest.mark.skipif(
    bool(no_programs(torch.float32)), reason=no_programs(torch.float32) or "programs run here"
)
# |y - y_ref| / |y_ref| in the root mean square
BUDGET = {"float32": 1e-5, "bfloat16": 1.6e-2, "int8": 5e-2}
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}
DTYPES = [name for name, dtype in STORED.items() if not no_programs(dtype)]
bfloat16 = pytest.mark.skipif("bfloat16" not in DTYPES, reason="the processor does not multiply bfloat16 itself")
int8 = pytest.mark.skipif("int8" not in DTYPES, reason="the processor does not multiply int8 itself")


def accelerated(module: Any, dtype: str = "float32", **kwargs: Any) -> Any:
    """The module, which finds the ranges of int8 with inputs of its first size."""
    if dtype == "int8":
        kwargs["inputs"] = [arguments(inputs(module, 2, (16, 16), timestep, seed=9)) for timestep in (10, 500, 990)]
    return cf.accelerate(module, dtype=dtype, **kwargs)


def assert_native(module: nn.Module) -> None:
    """That its last call ran as programs."""
    for name, part in parts(module).items():
        runtime = runtime_of(part)
        assert runtime is not None, name
        assert runtime.refused == "", name


def assert_in_torch(module: nn.Module, *words: str) -> None:
    """That its last call ran in torch, for a reason with these words in it."""
    refused = [runtime_of(part).refused for part in parts(module).values()]
    assert all(refused)
    for word in words:
        assert word in " ".join(refused)
        assert word in cf.explain(module)


def assert_same(module: nn.Module, twin: nn.Module, given: dict[str, Any], budget: float = BUDGET["float32"]) -> None:
    """That an accelerated network gives what its twin gives in torch."""
    assert error(call(module, given), call(twin, given)) < budget


# The same results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_network_runs_natively_and_gives_its_own_results(name, dtype):
    module = network(name)
    small, wide, odd = SIZES[name]
    shapes = ((1, small, 999), (2, wide, 0), (2, odd, 999), (1, odd, 0))
    calls = [inputs(module, n, size, timestep, seed=n) for n, size, timestep in shapes]
    expected = [call(module, given) for given in calls]
    assert accelerated(module, dtype) is module
    for given, own in zip(calls, expected):
        first = call(module, given)
        assert_native(module)
        assert error(first, own) < BUDGET[dtype]
        assert [y.dtype for y in first] == [y.dtype for y in own]
        assert all(torch.equal(*both) for both in zip(call(module, given), first))
    # earlier shapes, when all have their programs
    prepared = base.count
    for given, own in zip(calls, expected):
        assert error(call(module, given), own) < BUDGET[dtype]
    assert base.count == prepared
    assert runtime_of(next(iter(parts(module).values()))).precision == dtype


@pytest.mark.parametrize("name", ["sd15", "lcm", "sdxl_turbo", "ddpm", "scale_shift", "controlnet"])
def test_a_timestep_is_an_input(name):
    module, twin = network(name), network(name)
    accelerated(module)
    ways = (lambda t: t, torch.tensor, lambda t: torch.tensor([t]), lambda t: torch.tensor([t, 300]))
    for way in ways:
        call(module, inputs(module, 2, timestep=way(500)))
        assert_native(module)
    prepared = base.count
    for t in (0, 999):
        for way in ways:
            assert_same(module, twin, inputs(module, 2, timestep=way(t)))
            assert_native(module)
    assert base.count == prepared
    # of a number, UNet2DModel takes the whole part
    fraction = 7.0 if isinstance(module, UNet2DModel) else 0.25
    for timestep in (fraction, torch.tensor(7.5), torch.tensor([7.5, 2.0], dtype=torch.float64)):
        assert_same(module, twin, inputs(module, 2, timestep=timestep))
        assert_native(module)


@pytest.mark.parametrize("name", ["sd15", "scale_shift", "vae_kl", "controlnet"])
def test_later_calls_leave_results_alone(name):
    module = accelerated(network(name))
    results = call(module, inputs(module, 2, SIZES[name][0]))
    kept = [y.clone() for y in results]
    call(module, inputs(module, 2, SIZES[name][0], 3, seed=5))
    call(module, inputs(module, 1, SIZES[name][1], 3, seed=5))
    assert all(torch.equal(*both) for both in zip(results, kept))


@pytest.mark.parametrize("name", ["sd15", "ddpm", "controlnet"])
def test_output_classes_are_the_network_s_own(name):
    module, twin = network(name), network(name)
    accelerated(module)
    given = inputs(module, 1)
    with torch.no_grad():
        for keywords in ({}, {"return_dict": True}, {"return_dict": False}):
            mine, own = module(**given, **keywords), twin(**given, **keywords)
            assert type(mine) is type(own)
            if isinstance(own, dict):
                assert list(mine) == list(own)
        positional = module(given.pop("sample"), given.pop("timestep"), **given)
        assert type(positional) is type(twin(**inputs(twin, 1)))
    assert_native(module)


@pytest.mark.parametrize("name", ["vae_kl", "vae_tiny"])
def test_an_autoencoder_called_as_a_whole(name):
    module, twin = network(name), network(name)
    given = inputs(accelerated(module), 2, (8, 8))["pictures"]
    with torch.no_grad():
        mine, own = module(given), twin(given)
        assert type(mine) is type(own)
        assert error([mine.sample], [own.sample]) < BUDGET["float32"]
        assert error(module(given, return_dict=False), twin(given, return_dict=False)) < BUDGET["float32"]
    assert_native(module)


@pytest.mark.parametrize("name", ["vae_kl", "vae_tiny"])
def test_tiling_and_slicing(name):
    module, twin = network(name), network(name)
    accelerated(module)
    for each in (module, twin):
        each.enable_slicing()
        each.enable_tiling()
        each.tile_latent_min_size = 16
        each.tile_sample_min_size = 64 if name == "vae_kl" else 128
    assert_same(module, twin, inputs(module, 2, (24, 20)))
    assert_native(module)


@pytest.mark.parametrize("name", ["sd15", "vae_kl", "controlnet"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_networks_give_their_own_dtype(name, stored):
    module = network(name).to(stored)
    exact = copy.deepcopy(module).float()
    given = inputs(exact, 2, SIZES[name][0], 37)
    half = {key: x.to(stored) if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in given.items()}
    expected = call(exact, {key: x.float() if isinstance(x, Tensor) else x for key, x in half.items()})
    for dtype, budget in {"float32": 4 * torch.finfo(stored).eps, "bfloat16": BUDGET["bfloat16"]}.items():
        if dtype in DTYPES:
            results = call(accelerated(module, dtype), half)
            assert_native(module)
            assert {y.dtype for y in results} == {stored}
            assert error(results, expected) < budget, dtype
    assert {p.dtype for p in module.parameters()} == {stored}


def test_outputs_have_the_dtype_of_the_sample_in_any_order_of_the_arguments():
    module = network("sd15").half()
    given = inputs(module, 1, timestep=torch.tensor(37.0, dtype=torch.float32))
    half = {key: given[key].half() for key in ("sample", "encoder_hidden_states")}
    results = call(accelerated(module), {"timestep": given["timestep"], **half})
    assert_native(module)
    assert [y.dtype for y in results] == [torch.float16]


@pytest.mark.parametrize("name", ["sd15", "ddpm", "vae_kl"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_of_a_float32_network(name, half):
    """PyTorch refuses most of them; what is computed is right."""
    module, twin = network(name), network(name)
    accelerated(module)
    given = inputs(module, 1, SIZES[name][0], 37)
    rounded = {key: x.to(half) if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in given.items()}
    expected = call(twin, {key: x.float() if isinstance(x, Tensor) else x for key, x in rounded.items()})
    try:
        results = call(module, rounded)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            call(twin, rounded)
    else:
        assert {y.dtype for y in results} <= {half, torch.float32}
        assert error(results, expected) < 4 * torch.finfo(half).eps
    assert_same(module, twin, given)
    assert_native(module)


def sliced(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x,
    "sliced": sliced,
    "expanded": lambda x: x[:1].expand(x.shape),
    "negated": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["sdxl_turbo", "vae_kl"])
def test_inputs_of_any_strides(name, layout):
    def laid_out(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: laid_out(value) for key, value in x.items()}
        return LAYOUTS[layout](x) if isinstance(x, Tensor) and x.is_floating_point() else x

    module, twin = network(name), network(name)
    plain = inputs(accelerated(module), 2, SIZES[name][0], torch.tensor([4, 4]))
    prepared = call(module, plain), base.count
    given = laid_out(plain)
    assert_same(module, twin, given)
    assert base.count == prepared[1]
    assert_native(module)


@pytest.mark.parametrize("name", ["sd21", "ddpm", "vae_kl", "vae_tiny"])
def test_networks_in_channels_last(name):
    module, twin = network(name).to(memory_format=torch.channels_last), network(name)
    accelerated(module)
    assert_same(module, twin, inputs(module, 2, SIZES[name][2]))
    assert_native(module)


@pytest.mark.parametrize("name", ["sd15", "ddpm"])
def test_inference_mode_autocast_and_another_default_dtype(name):
    module, twin = network(name), network(name)
    given = inputs(module, 1)
    expected = call(twin, given)
    with torch.inference_mode():
        assert error(call(accelerated(module), given), expected) < BUDGET["float32"]
    assert error(call(module, given), expected) < BUDGET["float32"]
    with torch.inference_mode():
        assert error(call(module, given), expected) < BUDGET["float32"]
    assert_native(module)
    with torch.autocast("cpu", torch.bfloat16):  # to which torch rounds more than a program would
        assert error(call(module, given), expected) < BUDGET["bfloat16"]
    torch.set_default_dtype(torch.float64)
    try:
        assert error(call(accelerated(network(name)), given), expected) < BUDGET["float32"]
    finally:
        torch.set_default_dtype(torch.float32)


def test_any_module_of_known_operations():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(5, 12, 3, padding=1)
            self.norm = nn.GroupNorm(3, 12)
            self.out = nn.Conv2d(12, 5, 1)

        def forward(self, x, scale=None):
            h = F.silu(self.norm(self.conv(x)))
            return {"image": self.out(h) + x, "size": x.shape[-1]}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Block().eval().requires_grad_(False)
    x = randn(2, 5, 9, 7)
    expected = module(x)
    result = cf.accelerate(module, dtype="float32")(x)
    assert list(result) == ["image", "size"]
    assert result["size"] == 7
    assert error([result["image"]], [expected["image"]]) < BUDGET["float32"]
    assert_native(module)


# Conditions


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_residuals_of_a_controlnet_are_inputs(name):
    module, twin = network(name), network(name)
    accelerated(module)
    for n, size in ((1, (16, 16)), (2, (18, 20))):
        assert_same(module, twin, {**inputs(module, n, size), **residuals(module, n, size)})
        prepared = base.count
        assert_same(module, twin, {**inputs(module, n, size), **residuals(module, n, size, seed=1)})
        assert_native(module)
        assert base.count == prepared
    without = inputs(module, 1)
    assert_same(module, twin, without)
    expected = call(twin, without)
    assert error(call(twin, {**without, **residuals(twin, 1)}), expected) > 0.01  # they make a difference


def test_residuals_without_a_mid_block():
    module, twin = network("sdxs"), network("sdxs")
    given = inputs(module, 1)
    shapes = []
    with torch.no_grad():
        h = twin.conv_in(given["sample"])
        shapes.append(h.shape)
        embedding = twin.time_embedding(twin.time_proj(torch.tensor([999])))
        for block in twin.down_blocks:
            keywords = {"encoder_hidden_states": given["encoder_hidden_states"]} if hasattr(block, "attentions") else {}
            h, states = block(h, embedding, **keywords)
            shapes += [state.shape for state in states]
    added = tuple(0.3 * randn(*shape, seed=i) for i, shape in enumerate(shapes))
    given |= {"down_block_additional_residuals": added, "mid_block_additional_residual": randn(*h.shape, seed=99)}
    assert_same(accelerated(module), twin, given)


def mask(n: int, lengths: tuple[int, ...], tokens: int = 11) -> Tensor:
    return (torch.arange(tokens)[None] < torch.tensor(lengths[:n])[:, None]).to(torch.float32)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_mask_of_the_encoder_s_states_is_an_input(name):
    module, twin = network(name), network(name)
    given = {**inputs(accelerated(module), 2), "encoder_attention_mask": mask(2, (11, 4))}
    assert_same(module, twin, given)
    assert_native(module)
    prepared = base.count
    given["encoder_attention_mask"] = mask(2, (3, 9))
    assert_same(module, twin, given)
    assert_same(module, twin, {**given, "encoder_attention_mask": given["encoder_attention_mask"].bool()})
    assert_native(module)
    assert base.count <= prepared + 1  # for another dtype
    assert error(call(twin, given), call(twin, inputs(twin, 2))) > 1e-3  # it makes a difference


@pytest.mark.parametrize("tokens", [1, 8, 77, 154])
def test_other_lengths_of_the_encoder_s_states(tokens):
    module, twin = network("sd15"), network("sd15")
    given = inputs(accelerated(module), 2)
    given["encoder_hidden_states"] = randn(2, tokens, 24, seed=tokens)
    assert_same(module, twin, given)
    assert_native(module)


CONDITIONS = {
    "classes": (network, "scale_shift", {}, {"class_labels": torch.tensor([3, 7])}),
    "simple projection": (
        network,
        "sd15",
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
        {"class_labels": randn(2, 6)},
    ),
    "timestep classes": (network, "sd15", {"class_embed_type": "timestep"}, {"class_labels": torch.tensor([3, 7])}),
    "nine channels, as for inpainting": (network, "sd15", {"in_channels": 9}, {}),
    "projected states": (
        network,
        "sd15",
        {"encoder_hid_dim": 40},
        {"encoder_hidden_states": randn(2, 11, 40)},
    ),
    "conditional scale_shift": (network, "sd21", {"resnet_time_scale_shift": "scale_shift"}, {}),
    "two cross-attentions": (network, "sd21", {"dual_cross_attention": False, "only_cross_attention": True}, {}),
    "guess mode": (network, "controlnet", {}, {"guess_mode": True}),
    "conditioning scale": (network, "controlnet", {}, {"conditioning_scale": 0.3}),
    "pooled conditions": (network, "controlnet", {"global_pool_conditions": True}, {}),
    "channels in the order BGR": (network, "controlnet", {"controlnet_conditioning_channel_order": "bgr"}, {}),
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_other_conditions_are_followed(condition):
    make, name, changes, more = CONDITIONS[condition]
    module, twin = make(name, **changes), make(name, **changes)
    given = {**inputs(accelerated(module), 2), **more}
    assert_same(module, twin, given)
    given["sample"] = randn(*given["sample"].shape, seed=8)
    assert_same(module, twin, given)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("ddpm", {"downsample_type": "resnet", "upsample_type": "resnet"}),
        ("ddpm", {"attn_norm_num_groups": 4, "add_attention": False}),
        ("ddpm", {"time_embedding_type": "fourier"}),
        ("sd15", {"act_fn": "gelu"}),
        ("sd15", {"attention_type": "gated"}),
        ("sd15", {"timestep_post_act": "silu"}),
        ("sd15", {"conv_in_kernel": 5, "conv_out_kernel": 1}),
        ("vae_kl", {"mid_block_add_attention": False}),
        ("vae_kl", {"use_quant_conv": False, "use_post_quant_conv": False}),
        ("vae_tiny", {"act_fn": "gelu"}),
    ],
    ids=str,
)
def test_other_kinds_of_layers_are_right_natively_or_in_torch(name, kinds):
    module, twin = network(name, **kinds), network(name, **kinds)
    given = inputs(accelerated(module), 2, SIZES[name][0])
    for _ in range(2):
        assert_same(module, twin, given)


def test_freeu_and_attention_slicing_are_right():
    module, twin = network("sd15"), network("sd15")
    accelerated(module)
    given = inputs(module, 2)
    changes = (
        (True, lambda unet: unet.fuse_qkv_projections()),
        (True, lambda unet: unet.unfuse_qkv_projections()),
        (False, lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4)),
        (True, lambda unet: unet.disable_freeu()),
        (False, lambda unet: unet.set_attention_slice("auto")),
        (False, lambda unet: unet.set_default_attn_processor()),  # of PyTorch 1
    )
    for runs_natively, change in changes:
        for each in (module, twin):
            change(each)
        assert_same(module, twin, given)
        if runs_natively:
            assert_native(module)


# Changes


def unwatched(weight: Tensor) -> None:
    """A write that no call can see: to elements of a large weight that are not among the samples of a watch."""
    weight.data.view(-1)[5:7] += 30


def doubled(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(2)


def assigned(weight: Tensor) -> None:
    weight.data = 2 * weight.data


WRITES = {"in place": doubled, ".data": assigned, "load_state_dict": None}


def change(module: Any, how: str) -> None:
    """Change weights everywhere in the network."""
    if how == "load_state_dict":
        module.load_state_dict({key: 1.1 * value for key, value in module.state_dict().items()})
        return
    for part in parts(module).values():
        for name, weight in part.named_parameters():
            if name.startswith(("conv_in.", "conv_out.", "mid_block.", "layers.1.")) or "to_k" in name:
                WRITES[how](weight)


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("name", ["sd15", "vae_kl", "controlnet"])
def test_changed_weights_are_seen_in_the_next_call(name, how):
    module, twin = network(name), network(name)
    given = inputs(accelerated(module), 1, SIZES[name][0])
    before = call(module, given)
    for each in (module, twin):
        change(each, how)
    assert_same(module, twin, given)
    assert_native(module)
    assert error(call(module, given), before) > 1e-3


def replaced(unet: UNet2DConditionModel) -> None:
    unet.conv_in = copy.deepcopy(unet.conv_in)
    doubled(unet.conv_in.weight)


CHANGES = {
    "a layer": replaced,
    "eps": lambda unet: setattr(unet.conv_norm_out, "eps", 0.3),
    "an activation": lambda unet: setattr(unet, "conv_act", nn.ReLU()),
    "the time embedding": lambda unet: doubled(unet.time_embedding.linear_1.weight),
    "a patched forward": lambda unet: setattr(unet.mid_block, "forward", lambda h, *args, **kwargs: 2 * h),
    "the number of heads": lambda unet: setattr(unet.mid_block.attentions[0].transformer_blocks[0].attn1, "heads", 4),
    "a processor": lambda unet: unet.set_attn_processor(Doubling()),
    "another dtype and back": lambda unet: unet.bfloat16().float(),
}


class Doubling:
    """An attention processor of the user's."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return 2 * hidden_states


@pytest.mark.parametrize("name", CHANGES)
def test_other_changes_are_seen_in_the_next_call(name):
    module, twin = network("sd15"), network("sd15")
    given = inputs(accelerated(module), 1)
    before = call(module, given)
    for each in (module, twin):
        CHANGES[name](each)
    assert_same(module, twin, given)
    assert error(call(module, given), before) > 1e-4


def test_refresh_takes_over_what_no_call_can_see():
    module, twin = network("sd15"), network("sd15")
    given = inputs(accelerated(module), 1)
    before = call(module, given)
    for each in (module, twin):
        unwatched(each.up_blocks[0].resnets[0].conv1.weight)
    assert all(torch.equal(*both) for both in zip(call(module, given), before))
    assert error(call(twin, given), before) > 1e-3
    assert cf.refresh(module) is module
    assert_same(module, twin, given)
    assert_native(module)


@pytest.mark.parametrize("name", NAMES)
def test_restore_gives_equal_bits(name):
    module = network(name)
    given = inputs(module, 2, SIZES[name][1])
    expected, attributes = call(module, given), {key: set(m.__dict__) for key, m in module.named_modules()}
    state = {key: value.clone() for key, value in module.state_dict().items()}
    call(accelerated(module), given)
    call(accelerated(module), given)  # again
    assert list(module.state_dict()) == list(state)
    assert cf.restore(module) is module
    assert all(torch.equal(*both) for both in zip(call(module, given), expected))
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert {key: set(m.__dict__) for key, m in module.named_modules()} == attributes
    assert all(runtime_of(part) is None for part in parts(module).values())


def test_another_dtype_replaces_the_first():
    module = network("sd15")
    given, expected = inputs(module, 1), call(module, inputs(module, 1))
    for dtype in (*DTYPES, DTYPES[0]):
        assert error(call(accelerated(module, dtype), given), expected) < BUDGET[dtype]
        assert runtime_of(module).precision == dtype
    cf.restore(module)
    assert all(torch.equal(*both) for both in zip(call(module, given), expected))


# Code of the user's


@pytest.mark.parametrize("kind", ["forward", "pre", "of all modules"])
def test_a_hook_runs_and_the_network_is_native_again_without_it(kind):
    module, twin = network("sd15"), network("sd15")
    given = inputs(accelerated(module), 1)
    before = call(module, given)
    assert_native(module)

    def hooked(each: Any) -> Any:
        if kind == "forward":
            return each.mid_block.register_forward_hook(lambda m, args, result: 2 * result)
        if kind == "pre":
            return each.conv_out.register_forward_pre_hook(lambda m, args: (2 * args[0],))
        return nn.modules.module.register_module_forward_hook(
            lambda m, args, result: 2 * result if isinstance(m, nn.Conv2d) and m.out_channels == 4 else None
        )

    hooks = [hooked(module)] if kind == "of all modules" else [hooked(module), hooked(twin)]
    try:
        assert_same(module, twin, given)
        assert_in_torch(module, "hook")
    finally:
        for hook in hooks:
            hook.remove()
    assert all(torch.equal(*both) for both in zip(call(module, given), before))
    assert_native(module)


def test_hooks_of_the_module_itself_run_around_its_program():
    module = network("sd15")
    given, expected = inputs(module, 1), call(module, inputs(module, 1))
    accelerated(module)
    seen = []
    with module.register_forward_hook(lambda m, args, result: seen.append(result)):
        assert error(call(module, given), expected) < BUDGET["float32"]
    assert len(seen) == 1


def adapted(unet: Any, targets: list[str], name: str = "default") -> None:
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets), name)
    with torch.no_grad():
        for i, (key, parameter) in enumerate(sorted(unet.named_parameters())):
            if ".lora_" in key and f".{name}." in key:
                rank = 4 if "lora_B" in key else parameter[0].numel()
                parameter.copy_(0.7 * randn(*parameter.shape, seed=i) / rank**0.5)


def of_layers(change: Any) -> Any:
    def apply(unet: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer in unet.modules():
            if isinstance(layer, BaseTunerLayer):
                change(layer)

    return apply


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ADAPTERS = {
    "attention": ATTENTION,
    "convolutions": ["conv1", "conv2", "conv_shortcut", "conv_in", "proj_in", "proj_out"],
    "all": [*ATTENTION, "conv1", "conv2", "proj_in", "proj_out", "net.0.proj", "net.2", "time_emb_proj", "linear_1"],
}
LORA = {
    "scaled": lambda unet: unet.set_adapters(["default"], weights=[0.4]),
    "scaled by its layers": of_layers(lambda layer: layer.scale_layer(0.5)),
    "scaled back": of_layers(lambda layer: layer.unscale_layer(0.5)),
    "off": lambda unet: unet.disable_adapters(),
    "on": lambda unet: unet.enable_adapters(),
    "retrained": lambda unet: [doubled(p) for key, p in unet.named_parameters() if "lora_A" in key],
    "fused": lambda unet: unet.fuse_lora(lora_scale=0.7),
    "unfused": lambda unet: unet.unfuse_lora(),
    "deleted": lambda unet: unet.delete_adapters("default"),
}


@pytest.mark.parametrize(
    "targets", ["all", *(pytest.param(each, marks=pytest.mark.slow) for each in ("attention", "convolutions"))]
)
def test_lora_is_followed_in_all_that_is_done_to_it(targets):
    pytest.importorskip("peft")
    module, twin = network("sd15"), network("sd15")
    given = inputs(accelerated(module), 2)
    plain = call(module, given)
    for each in (module, twin):
        adapted(each, ADAPTERS[targets])
    assert_same(module, twin, given)
    assert_native(module)
    last = call(module, given)
    assert error(last, plain) > 1e-2
    for what, change in LORA.items():
        for each in (module, twin):
            change(each)
        results = call(module, given)
        assert error(results, call(twin, given)) < BUDGET["float32"], what
        assert_native(module)
        if what != "unfused":
            assert error(results, last) > 1e-3, what
        last = results
    assert error(last, plain) < BUDGET["float32"]


def test_two_adapters_and_the_scale_of_a_call():
    pytest.importorskip("peft")
    module, twin = network("sd_turbo"), network("sd_turbo")
    given = inputs(accelerated(module), 1)
    for each in (module, twin):
        adapted(each, ATTENTION, "one")
        adapted(each, ["conv1", "to_q"], "two")
    states = []
    for names, weights in ((["one"], [0.4]), (["two"], [0.5]), (["one", "two"], [1.0, 1.0])):
        for each in (module, twin):
            each.set_adapters(names, weights)
        assert_same(module, twin, given)
        assert_native(module)
        states.append(call(module, given))
    assert min(error(states[i], states[i - 1]) for i in range(3)) > 1e-3
    for scale in (0.5, 0.0, 1.0):
        assert_same(module, twin, {**given, "cross_attention_kwargs": {"scale": scale}})
        assert_native(module)
    assert error(call(module, {**given, "cross_attention_kwargs": {"scale": 0.0}}), states[-1]) > 1e-3
    assert_same(module, twin, given)


@pytest.mark.parametrize("dtype", [each for each in DTYPES if each == "bfloat16"])
def test_lora_in_other_dtypes(dtype):
    pytest.importorskip("peft")
    module, twin = network("sd15"), network("sd15")
    given = inputs(accelerated(module, dtype), 2)
    call(module, given)
    for each in (module, twin):
        adapted(each, ADAPTERS["all"])
    assert_same(module, twin, given, BUDGET[dtype])
    for each in (module, twin):
        each.fuse_lora()
    assert_same(module, twin, given, BUDGET[dtype])
    assert_native(module)


def test_an_adapter_that_peft_injects_before_accelerate():
    peft = pytest.importorskip("peft")
    module, twin = network("ddpm"), network("ddpm")
    config = peft.LoraConfig(r=2, target_modules=["conv1", "to_q"], init_lora_weights=False)
    for each in (module, twin):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            peft.inject_adapter_in_model(config, each)
    assert_same(accelerated(module), twin, inputs(module, 2))
    assert_native(module)


@pytest.mark.parametrize("name", ["sd15", "ddpm"])
def test_gradients(name):
    module, twin = network(name), network(name)
    accelerated(module)

    def gradients(each: Any) -> list[Tensor]:
        given = inputs(each, 1)
        given["sample"].requires_grad_()
        each(**given).sample.square().mean().backward()
        return [given["sample"].grad, *(p.grad for p in each.parameters() if p.grad is not None)]

    assert error(gradients(module), gradients(twin)) < 1e-4
    given = inputs(module, 1)
    assert_same(module, twin, given)
    assert_native(module)
    for each in (module, twin):
        each.train().requires_grad_(True)
    mine, own = gradients(module), gradients(twin)
    assert len(own) > 10
    assert error(mine, own) < 1e-4
    for each in (module, twin):
        each.eval().requires_grad_(False)
    assert_same(module, twin, given)
    assert_native(module)


def test_training_an_adapter_of_an_accelerated_network():
    pytest.importorskip("peft")
    module = network("sd15")
    given = inputs(accelerated(module), 1)
    adapted(module, ATTENTION)
    trained = [p for key, p in module.named_parameters() if "lora_" in key]
    for parameter in trained:
        parameter.requires_grad_(True)
    module.train()
    before = call(module, given)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    module(**given).sample.square().mean().backward()
    optimizer.step()
    module.eval().requires_grad_(False)
    after = call(module, given)
    assert error(after, before) > 1e-4
    assert_native(module)
    assert error(after, call(cf.restore(module), given)) < BUDGET["float32"]


class Odd(nn.Module):
    """A layer that no step does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.erfinv(x.tanh() / 2))


def test_what_has_no_step_is_named_while_the_module_runs_in_torch():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Odd().eval().requires_grad_(False)
    x = randn(2, 4, 6, 6)
    expected = module(x)
    cf.accelerate(module, dtype="float32")
    assert torch.equal(module(x), expected)
    assert_in_torch(module, "erfinv")


def test_a_layer_of_a_network_that_no_step_does():
    module, twin = network("sd15"), network("sd15")
    for each in (module, twin):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            each.conv_norm_out = nn.Sequential(nn.GroupNorm(8, 32), nn.Hardtanh(-0.7, 0.9)).requires_grad_(False)
    given = inputs(accelerated(module), 1)
    assert_same(module, twin, given)
    assert_in_torch(module, "hardtanh")


# Copies, memory, caches


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["sd15", "ddpm", "vae_kl", "vae_tiny", "controlnet"])
def test_copies_are_accelerated_and_separate(name, how):
    module = accelerated(network(name))
    given = inputs(module, 1, SIZES[name][0])
    before = call(module, given)
    other = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    assert all(torch.equal(*both) for both in zip(call(other, given), before))
    assert_native(other)
    change(other, "in place")
    assert error(call(other, given), before) > 1e-3
    assert all(torch.equal(*both) for both in zip(call(module, given), before))
    cf.restore(other)
    assert_native(module)
    assert error(call(cf.restore(module), given), before) < BUDGET["float32"]


def stored_bytes(module: nn.Module) -> int:
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}.values())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*(("sd15", dtype) for dtype in DTYPES), ("ddpm", "float32"), ("vae_kl", "float32"), ("vae_tiny", "float32")],
)
def test_weights_that_are_not_kept(name, dtype):
    kept, module = accelerated(network(name), dtype), network(name)
    calls = [inputs(kept, n, size) for n, size in zip((1, 2, 1), SIZES[name])]
    expected = [call(kept, given) for given in calls]
    before = sum(stored_bytes(part) for part in parts(module).values())
    accelerated(module, dtype, keep_weights=False)
    # sizes that come later, too
    for given, own in zip(calls, expected):
        assert all(torch.equal(*both) for both in zip(call(module, given), own))
        assert_native(module)
    assert sum(stored_bytes(part) for part in parts(module).values()) < before * 0.3
    with pytest.raises((RuntimeError, ValueError)) as caught:
        cf.restore(module)
    assert "keep_weights" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(*both) for both in zip(call(module, calls[0]), expected[0]))
    assert cf.explain(module)


def test_what_needs_weights_that_are_not_kept_is_an_error_of_one_sentence():
    module = accelerated(network("sd15"), keep_weights=False)
    given = inputs(module, 1)
    before = call(module, given)
    with (
        module.mid_block.register_forward_hook(lambda m, args, result: 2 * result),
        pytest.raises((RuntimeError, ValueError)) as caught,
    ):
        call(module, given)
    assert "keep_weights" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(*both) for both in zip(call(module, given), before))
    with pytest.raises(ValueError, match=r"load it anew, and accelerate it with keep_weights=True$"):
        cf.verify(module, [arguments(given)])


def cached(name: str, folder: str, dtype: str = "float32", seed: int = 0) -> tuple[list[Tensor], str]:
    """The results of a network whose packed weights are kept in the folder, and why it ran in torch, if it did."""
    torch.set_num_threads(1)
    module = network(name)
    if seed:
        change(module, "in place")
    accelerated(module, dtype, cache=folder)
    results = call(module, inputs(module, 1, SIZES[name][0]))
    return results, "".join(runtime_of(part).refused for part in parts(module).values())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("name", "dtype"), [*(("sd15", dtype) for dtype in DTYPES), ("vae_kl", "float32")])
def test_packed_weights_are_kept_and_read_by_another_process(name, dtype, tmp_path):
    expected = call(accelerated(network(name), dtype), inputs(network(name), 1, SIZES[name][0]))
    first, refused = cached(name, str(tmp_path), dtype)
    assert refused == ""
    assert all(torch.equal(*both) for both in zip(first, expected))
    written = contents(tmp_path)
    assert sum(map(len, written.values())) > 10000
    second, refused = processes.call(cached, name, str(tmp_path), dtype)
    assert refused == ""
    assert all(torch.equal(*both) for both in zip(second, expected))
    assert contents(tmp_path) == written


@pytest.mark.parametrize("damage", ["truncated", "emptied", "a bit", "the end", "other bytes"])
def test_a_damaged_cache_is_made_anew(damage, tmp_path):
    expected, _ = cached("sd15", str(tmp_path))
    written = contents(tmp_path)
    for name, data in written.items():
        path = tmp_path / name
        path.unlink()  # it may be mapped
        if damage == "truncated":
            path.write_bytes(data[: len(data) // 2])
        elif damage == "emptied":
            path.write_bytes(b"")
        elif damage == "other bytes":
            path.write_bytes(b"\xff" * len(data))
        else:
            at = len(data) - 3 if damage == "the end" else len(data) // 2
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
    results, refused = cached("sd15", str(tmp_path))
    assert refused == ""
    assert all(torch.equal(*both) for both in zip(results, expected))
    assert contents(tmp_path) == written


def test_a_cache_of_other_weights_is_not_used(tmp_path):
    first, _ = cached("sd15", str(tmp_path))
    other, refused = cached("sd15", str(tmp_path), seed=1)
    assert refused == ""
    twin = network("sd15")
    change(twin, "in place")
    assert error(other, call(twin, inputs(twin, 1))) < BUDGET["float32"]
    again, _ = cached("sd15", str(tmp_path))
    assert all(torch.equal(*both) for both in zip(again, first))


@pytest.mark.parametrize("isa", [each for each in available() if each not in ("portable", available()[-1])])
def test_a_cache_for_another_instruction_set_is_not_used(isa, tmp_path):
    expected, _ = cached("sd15", str(tmp_path))
    native_library.set_isa(isa)
    try:
        results, refused = cached("sd15", str(tmp_path))
        assert refused == ""
        assert error(results, expected) < BUDGET["float32"]
    finally:
        native_library.set_isa(available()[-1])
    again, _ = cached("sd15", str(tmp_path))
    assert all(torch.equal(*both) for both in zip(again, expected))


def test_a_cache_and_weights_that_are_not_kept(tmp_path):
    expected, _ = cached("sd15", str(tmp_path))
    module = accelerated(network("sd15"), cache=tmp_path, keep_weights=False)
    for _ in range(2):
        assert all(torch.equal(*both) for both in zip(call(module, inputs(module, 1)), expected))
    assert_native(module)


def test_weights_that_change_after_they_were_read_from_a_cache(tmp_path):
    cached("sd15", str(tmp_path))
    module, twin = network("sd15"), network("sd15")
    given = inputs(accelerated(module, cache=tmp_path), 1)
    call(module, given)
    for each in (module, twin):
        change(each, "in place")
    assert_same(module, twin, given)
    assert_native(module)


# The public functions


def test_two_threads_at_once():
    module = accelerated(network("sd15"))
    calls = [inputs(module, 1 + i % 2, SIZES["sd15"][i % 2], 100 * i, seed=i) for i in range(4)]
    expected = [call(module, given) for given in calls]
    again = accelerated(network("sd15"))  # nothing is prepared
    wrong = []

    def run(order: range) -> None:
        for i in order:
            if not all(torch.equal(*both) for both in zip(call(again, calls[i]), expected[i])):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(order,)) for order in (range(4), range(3, -1, -1), range(4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert_native(again)


def test_results_do_not_depend_on_the_batch():
    module = accelerated(network("sd15"))
    given = inputs(module, 3, (16, 16), torch.tensor([999, 0, 37]))
    (together,) = call(module, given)
    for i in range(3):
        one = {key: x[i : i + 1] for key, x in given.items()}
        assert torch.equal(call(module, one)[0], together[i : i + 1])


@pytest.mark.parametrize("name", ["sdxl_turbo", "vae_kl", "controlnet"])
def test_warmup_prepares_the_calls_to_come(name):
    module = accelerated(network(name))
    calls = [inputs(module, n, size) for n, size in zip((1, 2), SIZES[name])]
    cf.warmup(module, inputs=[arguments(given) for given in calls])
    prepared = base.count
    with torch.no_grad():
        for given in calls:
            if "pictures" in given:
                module(given["pictures"])
            else:
                module(**given)
    assert base.count == prepared
    assert_native(module)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sd15", "vae_kl", "controlnet"])
def test_verify_compares_with_the_network_in_torch(name, dtype):
    module = accelerated(network(name), dtype)
    given = [arguments(inputs(module, 1, SIZES[name][0], 500))]
    found = cf.verify(module, given)
    assert found.passed, str(found)
    assert found.dtype == dtype
    assert str(found)


def test_what_warmup_and_verify_of_a_module_miss():
    module = accelerated(network("sd15"))
    with pytest.raises(ValueError, match=r"^inputs are missing: .*, warmup\(module, inputs=\[...\]\)$"):
        cf.warmup(module)
    with pytest.raises(ValueError, match=r"^inputs are missing: .*, verify\(module, \[...\]\)$"):
        cf.verify(module)


def test_the_steps_of_an_accelerated_module_can_be_profiled():
    module = accelerated(network("sd15"))
    given = inputs(module, 1)
    assert runtimes(module)["UNet2DConditionModel"].programs.last is None
    call(module, given)
    steps = runtimes(module)["UNet2DConditionModel"].programs.last.profile(rounds=1)
    assert len(steps) > 100
    assert all(seconds > 0 and step.kind for step, seconds in steps)


def test_verify_finds_a_wrong_network(monkeypatch):
    module = accelerated(network("sd15"))
    given = [arguments(inputs(module, 1))]
    assert cf.verify(module, given).passed
    unwatched(module.conv_in.weight)  # the program goes on with the old weights
    assert not cf.verify(module, given).passed


def test_explain_names_what_runs_natively():
    unet, vae = accelerated(network("sd15")), accelerated(network("vae_kl"))
    call(unet, inputs(unet, 1))
    call(vae, inputs(vae, 1, (8, 8)))
    assert "float32" in cf.explain(unet)
    for word in ("encoder", "decoder"):
        assert word in cf.explain(vae)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"backend": "nowhere"}, "backend is 'nowhere'"),
        ({"dtype": "int8"}, "inputs"),
        ({"dtype": "int8", "inputs": []}, "inputs"),
        ({"dtype": "float32", "prompts": ["a cat"]}, "prompts"),
        ({"winogradmemory": 0}, "accelerate has no argument winogradmemory: leave it out; "),
    ],
    ids=str,
)
def test_arguments_of_accelerate(kwargs, words):
    module = network("sd15")
    with pytest.raises((ValueError, TypeError)) as caught:
        cf.accelerate(module, **kwargs)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert runtime_of(module) is None


@pytest.mark.parametrize("function", ["restore", "refresh", "warmup", "explain", "verify", "accelerate"])
def test_what_is_no_network_is_refused(function):
    with pytest.raises(TypeError):
        getattr(cf, function)(3)


def test_wrong_inputs_raise_what_the_network_raises():
    module, twin = network("sd15"), network("sd15")
    given = inputs(accelerated(module), 1)
    call(module, given)
    for wrong in (
        {**given, "sample": randn(1, 5, 16, 16)},
        {**given, "encoder_hidden_states": randn(1, 11, 25)},
        {"sample": given["sample"]},
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError)) as own:
            call(twin, wrong)
        with pytest.raises(type(own.value)):
            call(module, wrong)
    assert_same(module, twin, given)
    assert_native(module)


@int8
def test_int8_multiplies_in_8_bits():
    module = network("sd15")
    given = inputs(module, 1)
    (expected,) = call(module, given)
    (wide,) = call(accelerated(module, "bfloat16"), given)
    (narrow,) = call(accelerated(module, "int8"), given)
    assert not torch.equal(wide, narrow)
    assert error([narrow], [expected]) > error([wide], [expected])
    assert re.search(r"(\d+) of 132 products in int8", str(cf.explain(module)))


@int8
def test_ranges_are_found_once_for_all_sizes_and_orders_of_calls(monkeypatch):
    given, batches = [], []
    observe = Program.observe
    monkeypatch.setattr(Program, "observe", lambda self, ranges: (batches.append(1), observe(self, ranges))[1])
    for order in ((0, 1, 2), (2, 1, 0)):
        module = accelerated(network("sd15"), "int8")
        found = {i: call(module, inputs(module, 1, SIZES["sd15"][i])) for i in order}
        given.append([found[i] for i in range(3)])
    assert len(batches) == 2 * 3  # the inputs
    assert all(torch.equal(*both) for one, two in zip(*given) for both in zip(one, two))


@int8
def test_a_change_finds_the_ranges_anew():
    module, twin = accelerated(network("sd15"), "int8"), network("sd15")
    given = inputs(module, 1)
    call(module, given)
    for each in (module, twin):
        with torch.no_grad():
            each.down_blocks[0].attentions[0].transformer_blocks[0].norm3.weight.mul_(5)
    assert error(call(module, given), call(twin, given)) < BUDGET["int8"]
    assert all(torch.equal(*both) for both in zip(call(module, given), call(accelerated(twin, "int8"), given)))


@pytest.mark.parametrize("isa", [each for each in available() if each not in ("portable", available()[-1])])
@pytest.mark.parametrize("name", ["sdxl_turbo", "ddpm", "vae_kl"])
def test_other_instruction_sets(name, isa):
    module, twin = network(name), network(name)
    native_library.set_isa(isa)
    try:
        assert_same(accelerated(module), twin, inputs(module, 2, SIZES[name][2]))
        assert_native(module)
    finally:
        native_library.set_isa(available()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_child_process_goes_on():
    module = accelerated(network("sd15"))
    given = inputs(module, 1)
    (expected,) = call(module, given)
    runtime = runtime_of(module)
    with runtime.lock:  # as if another thread were in a call
        child = os.fork()
        if child == 0:
            same = torch.equal(call(module, given)[0], expected) and runtime.refused == ""
            os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
