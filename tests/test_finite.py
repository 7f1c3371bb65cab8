from __future__ import annotations

import pytest
import torch
from torch import nn

from coalescer_fast.finite import check_finite, first_not_finite, is_finite

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_finite(dtype, value):
    x = torch.zeros(3, 4, dtype=dtype)
    assert is_finite(x)
    x[2, 1] = value
    assert not is_finite(x)


def test_what_is_always_finite():
    for x in (
        torch.zeros(0, dtype=torch.float32),
        torch.ones(3, dtype=torch.int8),
        torch.empty(3, dtype=torch.float32, device="meta"),
    ):
        assert is_finite(x)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_var"])
def test_the_tensor_is_named(name):
    module = network()
    check_finite(module, "unet")
    module.state_dict()[name].view(-1)[-1] = torch.nan
    with pytest.raises(ValueError, match=f"^unet.{name} holds a number that is not finite: "):
        check_finite(module, "unet")


def test_weights_of_8_bits_and_elsewhere():
    check_finite(network().to(torch.float8_e4m3fn), "unet")
    check_finite(network().to("meta"), "unet")


def test_the_first_sample():
    x = torch.zeros(4, 2, 3, 3, dtype=torch.float32)
    assert first_not_finite(x) is None
    x[2, 1, 0, 0] = torch.inf
    x[3] = torch.nan
    assert first_not_finite(x) == 2
