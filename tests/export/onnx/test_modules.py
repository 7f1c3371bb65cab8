from __future__ import annotations

import pytest
import torch

from coalescer_fast.export.measure.reference import trajectories
from coalescer_fast.export.onnx import modules

from ...helpers.pipelines import small_pipeline


@pytest.mark.parametrize("kind", ["unet", "decoder", "generator"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_they_are_the_reference(small, kind, precision):
    before = {name: p.clone() for name, p in small.unet.state_dict().items()}
    module = modules.network(small, kind, precision)
    inputs, outputs = modules.ports(small, kind)
    (trajectory,) = trajectories(small, ["octopus", "pizza"], (2,))
    for given, expected in trajectory.calls(kind):
        assert [(str(x.dtype), x.shape[1:]) for x in given] == [(f"torch.{p.dtype}", p.shape[1:]) for p in inputs]
        with torch.no_grad():
            found = module(*given)
        assert [(str(y.dtype), y.shape[1:]) for y in found] == [(f"torch.{p.dtype}", p.shape[1:]) for p in outputs]
        for y, e in zip(found, expected):
            torch.testing.assert_close(
                y, e, atol=1e-5 if precision == "fp32" else 2e-2, rtol=1e-5 if precision == "fp32" else 2e-2
            )
            assert precision == "fp32" or not torch.equal(y, e)
    assert all(torch.equal(p, before[name]) for name, p in small.unet.state_dict().items())


def test_what_is_half(small):
    module = modules.network(small, "generator", "fp16")
    wide = {name for name, p in module.named_parameters() if p.dtype == torch.float32}
    assert wide == {
        f"unet.{head}.{part}" for head in ("direction_head", "distance_head") for part in ("weight", "bias")
    }
    assert module.empty.anchor.dtype == torch.float32
    assert module.empty.film[0][0].dtype == torch.float16


def test_guidance_is_part_of_a_generator(small):
    assert modules.network(small, "generator", "fp32", guidance=1).empty is None
    assert modules.schedule_of(small, 2, None)[1] == small.scheduler.config.guidance_scale
    scheduler, scale = modules.schedule_of(small, 3, 2.5)
    assert (len(scheduler.etas), scale) == (3, 2.5)
    assert small.scheduler.num_inference_steps == 2


def test_a_norm_in_half_is_one_that_tensorrt_takes_in_one_piece():
    module = modules.network(small_pipeline(block_out_channels=(32, 64), norm_num_groups=8), "unet", "fp16")
    norms = [norm for norm in module.modules() if isinstance(norm, torch.nn.GroupNorm)]
    assert {norm.num_channels for norm in norms} == {32, 64, 96, 128}
    for norm in norms:
        expected = torch.float16 if norm.num_channels in (64, 128) else torch.float32
        assert {norm.weight.dtype, norm.bias.dtype} == {expected}, norm


def changed(change):
    pipe = small_pipeline()
    change(pipe)
    return pipe


def nan(pipe):
    with torch.no_grad():
        pipe.unet.mid[0].conv1.bias[1] = torch.nan


def infinite(pipe):
    with torch.no_grad():
        pipe.unet.mid[0].norm1.weight[0] = torch.inf


def lora(pipe):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["film"], r=2), pipe.unet)


REFUSED = {
    "half": (lambda pipe: pipe.unet.half(), r"\S+ is in float16 on cpu; load the pipeline in float32 on a CPU$"),
    "bfloat16": (lambda pipe: pipe.unet.bfloat16(), r"\S+ is in bfloat16 on cpu; load"),
    "double": (lambda pipe: pipe.unet.double(), r"\S+ is in float64 on cpu; load"),
    "meta": (lambda pipe: pipe.unet.to("meta"), r"CoalescerUNet\.null has no data, on device meta"),
    "nan": (nan, r"mid\.0\.conv1\.bias holds numbers that are not finite; load"),
    "infinite": (infinite, r"mid\.0\.norm1\.weight holds numbers that are not finite; load"),
    "hook": (
        lambda pipe: pipe.unet.mid[0].register_forward_hook(print),
        r"mid\.0 has a forward hook, which no graph would call; remove it$",
    ),
    "pre-hook": (
        lambda pipe: pipe.unet.conv_in.register_forward_pre_hook(print),
        r"conv_in has a forward hook, which no",
    ),
    "forward": (
        lambda pipe: setattr(pipe.unet.mid[0], "forward", print),
        r"the forward of mid\.0 is patched, which no graph",
    ),
    "adapter": (lora, r"\S+\.film has an adapter, which no graph could switch off; merge it first$"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("kind", ["unet", "generator"])
def test_what_no_graph_holds_is_refused(kind, what):
    change, words = REFUSED[what]
    with pytest.raises(ValueError, match=f"^the unet cannot be exported: {words}") as caught:
        modules.network(changed(change), kind, "fp32")
    assert "\n" not in str(caught.value)
    assert modules.network(changed(change), "decoder", "fp32") is not None  # which has none of it


def test_a_decoder_is_refused_likewise():
    with pytest.raises(
        ValueError, match=r"^the decoder cannot be exported: layers\.0\.weight is in float16 on cpu; load"
    ):
        modules.network(changed(lambda pipe: pipe.vae.half()), "generator", "fp32")


def test_beyond_float16():
    def large(pipe):
        with torch.no_grad():
            pipe.vae.decoder.layers[0].weight[0, 0, 0, 0] = -7e4

    pipe = changed(large)
    assert modules.network(pipe, "decoder", "fp32") is not None
    words = (
        r"^the decoder cannot be exported in fp16: layers\.0\.weight has 7e\+04, and float16 ends at 65504; take fp32$"
    )
    with pytest.raises(ValueError, match=words):
        modules.network(pipe, "decoder", "fp16")


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_ports_and_what_is_inside_are_float32_whatever_the_default_dtype(default):
    pipe = small_pipeline(cross_attention_dim=128)
    expected = modules.ports(pipe, "generator")
    torch.set_default_dtype(default)
    try:
        assert modules.ports(pipe, "generator") == expected
        module = modules.network(pipe, "generator", "fp32")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {each.dtype for each in (*module.parameters(), *module.empty.tensors())} == {torch.float32, torch.bool}
