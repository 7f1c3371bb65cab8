"""The table of calls is what the networks really call."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks.kernels import shapes
from coalescer_fast import CoalescerScheduler, CoalescerUNet, ops
from coalescer_fast.models.unet import CONFIGURATIONS


def recorded(monkeypatch: pytest.MonkeyPatch, name: str) -> Counter[shapes.Call]:
    """The calls of one evaluation of the network, on tensors without data."""
    calls: Counter[shapes.Call] = Counter()
    real = {op: getattr(ops, op) for op in ("group_norm_silu", "bias_residual", "dual_head")}

    def group_norm_silu(
        x, num_groups, weight, bias, eps, *, scale=None, shift=None, skip=None, pre_bias=None, activation="silu", **kw
    ):
        assert (scale is None) == (shift is None)
        assert x.shape[2] == x.shape[3]
        has = {
            "film": scale is not None,
            "pre_bias": pre_bias is not None,
            "skip": 0 if skip is None else skip.shape[1],
        }
        calls[shapes.GroupNorm(x.shape[1], x.shape[2], groups=num_groups, activation=activation, eps=eps, **has)] += 1
        given = {"scale": scale, "shift": shift, "skip": skip, "pre_bias": pre_bias, "activation": activation}
        return real["group_norm_silu"](x, num_groups, weight, bias, eps, **given, **kw)

    def bias_residual(x, bias, residual, **kw):
        assert bias is not None
        assert residual is not None
        calls[shapes.BiasResidual(x.shape[1], x.shape[2])] += 1
        return real["bias_residual"](x, bias, residual, **kw)

    def dual_head(h, direction_weight, *heads, anchor=None, **kw):
        calls[
            shapes.DualHead(h.shape[1], h.shape[2], latent=direction_weight.shape[0], anchored=anchor is not None)
        ] += 1
        return real["dual_head"](h, direction_weight, *heads, anchor=anchor, **kw)

    for function in (group_norm_silu, bias_residual, dual_head):
        monkeypatch.setattr(ops, function.__name__, function)
    with torch.device("meta"), torch.no_grad():
        unet = CoalescerUNet.named(name)
        config = unet.config
        inputs = [
            torch.empty(1, config.latent_channels, config.sample_size, config.sample_size),
            torch.empty(1, config.description_dim),
        ]
        if config.cross_attention_dim is not None:
            inputs.append(torch.empty(1, 7, config.cross_attention_dim))
        unet(*inputs)
    return calls


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_table_is_what_the_network_calls(name, monkeypatch):
    calls = recorded(monkeypatch, name)
    for mode in CoalescerScheduler().modes:
        calls[
            shapes.CoalesceStep(CONFIGURATIONS[name]["latent_channels"], CONFIGURATIONS[name]["sample_size"], mode=mode)
        ] += 1
    assert shapes.CALLS[name] == calls


def test_no_network_is_missing():
    assert list(shapes.CALLS) == list(CONFIGURATIONS)


def every_call() -> list[shapes.Call]:
    return list({type(call): call for calls in shapes.CALLS.values() for call in calls}.values()) + list(
        shapes.CALLS["emoji-64"]
    )


@pytest.mark.parametrize("call", every_call(), ids=str)
def test_inputs_are_what_the_table_says(call):
    call = type(call)(**{**vars(call), "size": min(call.size, 8)})  # large ones take long
    inputs = call.inputs(2, torch.bfloat16, torch.device("cpu"))
    images = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.ndim == 4]
    assert all(x.is_contiguous(memory_format=torch.channels_last) and x.dtype == torch.bfloat16 for x in images)
    assert all(x.shape[0] == 2 for name, x in inputs.items() if name in shapes.BATCHED)
    result = getattr(ops, call.op)(**inputs)
    outputs = result[:1] if isinstance(result, tuple) else (result,)
    read = [x for x in images if x.shape[-1] == call.size and x.shape[0] == 2]
    if call.op == "dual_head":
        assert call.elements * 2 == inputs["h"].numel()
        read = [inputs["h"]]
    else:
        assert call.elements * 2 == outputs[0].numel()
    assert call.moved * 2 == sum(x.numel() for x in (*read, *outputs))
