from __future__ import annotations

import pytest
import torch

from coalescer_fast.export import networks
from coalescer_fast.export.figures import trajectories

from .conftest import build


@pytest.mark.parametrize("kind", ["unet", "decoder", "generator"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_they_are_the_reference(small, kind, precision):
    before = {name: p.clone() for name, p in small.unet.state_dict().items()}
    module = networks.network(small, kind, precision)
    inputs, outputs = networks.ports(small, kind)
    (trajectory,) = trajectories(small, ["octopus", "pizza"], (2,))
    for given, expected in trajectory.calls(kind):
        assert [(str(x.dtype), x.shape[1:]) for x in given] == [(f"torch.{p.dtype}", p.shape[1:]) for p in inputs]
        with torch.no_grad():
            found = module(*given)
        assert [(str(y.dtype), y.shape[1:]) for y in found] == [(f"torch.{p.dtype}", p.shape[1:]) for p in outputs]
        for y, e in zip(found, expected):
            torch.testing.assert_close(y, e, atol=1e-5 if precision == "fp32" else 2e-2, rtol=1e-5 if precision == "fp32" else 2e-2)
            assert precision == "fp32" or not torch.equal(y, e)
    assert all(torch.equal(p, before[name]) for name, p in small.unet.state_dict().items())


def test_what_is_half(small):
    module = networks.network(small, "generator", "fp16")
    wide = {name for name, p in module.named_parameters() if p.dtype == torch.float32}
    assert wide == {f"unet.{head}.{part}" for head in ("direction_head", "distance_head") for part in ("weight", "bias")}
    assert module.empty.anchor.dtype == torch.float32
    assert module.empty.film[0][0].dtype == torch.float16


def test_guidance_is_part_of_a_generator(small):
    assert networks.network(small, "generator", "fp32", guidance=1).empty is None
    assert networks.schedule_of(small, 2, None)[1] == small.scheduler.config.guidance_scale
    scheduler, scale = networks.schedule_of(small, 3, 2.5)
    assert (len(scheduler.etas), scale) == (3, 2.5)
    assert small.scheduler.num_inference_steps == 2


def test_a_norm_in_half_is_one_that_tensorrt_takes_in_one_piece():
    module = networks.network(build(block_out_channels=(32, 64), norm_num_groups=8), "unet", "fp16")
    norms = [norm for norm in module.modules() if isinstance(norm, torch.nn.GroupNorm)]
    assert {norm.num_channels for norm in norms} == {32, 64, 96, 128}
    for norm in norms:
        expected = torch.float16 if norm.num_channels in (64, 128) else torch.float32
        assert {norm.weight.dtype, norm.bias.dtype} == {expected}, norm
