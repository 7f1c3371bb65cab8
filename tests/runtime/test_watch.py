from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from coalescer_fast.models import CoalescerUNet
from coalescer_fast.ops import native_library
from coalescer_fast.runtime import watch
from coalescer_fast.runtime.watch import Watch, foreign

SMALL = dict(
    block_out_channels=(16, 24), norm_num_groups=4, embedding_dim=20, description_dim=12, num_attention_heads=2
)


@pytest.fixture(params=["native", "plain"])
def unet(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native_library, "unavailable", lambda: "not here")
    elif native_library.unavailable():
        pytest.skip(native_library.unavailable())
    torch.manual_seed(0)
    return CoalescerUNet(anchor="mlp", anchor_hidden_dim=40, **SMALL)


class Handles:
    def __init__(self):
        self.all = []

    def append(self, handle):
        self.all.append(handle)

    def remove(self):
        for handle in self.all:
            handle.remove()


def scaled(unet):
    with torch.no_grad():
        unet.conv_in.weight.mul_(1.01)


def replaced(unet):
    unet.conv_in.weight = nn.Parameter(unet.conv_in.weight.detach().clone())


def through_numpy(unet):
    array = unet.conv_in.weight.detach().numpy()
    array *= 1.01


def averaged(unet):
    """As EMAModel.copy_to does."""
    for parameter in unet.parameters():
        parameter.data.copy_((parameter + 0.01).data)


def moved(unet):
    unet.conv_in.weight.data = unet.conv_in.weight.data.clone()


CHANGES = {
    "in place": scaled,
    "another parameter": replaced,
    ".data +=": lambda unet: unet.conv_in.weight.data.add_(0.01),
    ".data.mul_, the last level": lambda unet: unet.mid[0].conv2.weight.data.fill_(0.5),
    "one element of a bias": lambda unet: unet.norm_out.bias.data[3:4].fill_(2),
    "numpy": through_numpy,
    "EMA": averaged,
    "new memory": moved,
    "eps": lambda unet: setattr(unet.norm_out, "eps", 1e-3),
    "num_heads": lambda unet: setattr(unet.down[2][1], "num_heads", 1),
    "activation": lambda unet: unet.embedding.__setitem__(1, nn.GELU()),
    "a layer": lambda unet: setattr(unet, "direction_head", nn.Conv2d(16, 16, 3, padding=1)),
    "a hook": lambda unet: unet.mid[0].conv1.register_forward_hook(lambda *args: None),
    "a hook before": lambda unet: unet.embedding[0].register_forward_pre_hook(lambda *args: None),
    "a patched forward": lambda unet: setattr(unet.conv_in, "forward", lambda x: x),
    "a class": lambda unet: setattr(unet.conv_in, "__class__", type("Other", (type(unet.conv_in),), {})),
    "an adapter's scale": lambda unet: unet.scaling.update(default=0.5),
    "a plain tensor": lambda unet: unet.mid[0].plain.fill_(2),
    "a tensor in a list": lambda unet: unet.mid[0].listed[0].fill_(2),
    "a nested dict": lambda unet: unet.mid[0].nested["a"]["b"].append(3),
    "an attribute of a namespace": lambda unet: setattr(unet.mid[0].space, "gain", 2),
    "an attribute of a class": lambda unet: setattr(type(unet.mid[0].mine), "gain", 2),
    "a hook of all modules": lambda unet: unet.handles.append(register_module_forward_hook(lambda *args: None)),
    "a parameter more": lambda unet: (
        unet.null.__class__ and unet.register_parameter("more", nn.Parameter(torch.ones(3)))
    ),
    "a parameter on a leaf without any": lambda unet: unet.embedding[1].register_buffer("more", torch.ones(3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(unet, change):
    unet.scaling, unet.handles = {"default": 1.0}, Handles()
    block = unet.mid[0]
    block.plain, block.listed, block.nested = torch.ones(3000), (torch.ones(3000),), {"a": {"b": [1, 2]}}
    block.space, block.mine = SimpleNamespace(gain=1), type("Mine", (nn.Module,), {"gain": 1})()
    seen = Watch(unet)
    assert not seen.changed(unet)
    with torch.no_grad():
        unet(torch.ones(1, 16, 8, 8), torch.ones(1, 12))
    assert not seen.changed(unet)  # using it is no change
    CHANGES[change](unet)
    try:
        assert seen.changed(unet)
        assert not Watch(unet).changed(unet)
    finally:
        unet.handles.remove()


def test_another_network_is_a_change(unet):
    assert Watch(unet).changed(CoalescerUNet(**SMALL))
    assert Watch(unet).changed(unet, unet)


def test_what_is_not_seen_is_as_documented(unet):
    weight = unet.mid[0].conv2.weight
    assert weight.nbytes > watch.WHOLE
    seen = Watch(unet)
    weight.data.view(-1)[2:3] += 1  # not among the places: the first two elements, and then far on
    assert not seen.changed(unet)


def test_inference_tensors_are_watched_by_what_they_hold():
    with torch.inference_mode():
        unet = CoalescerUNet(**SMALL)
        seen = Watch(unet)
        assert not seen.changed(unet)
        unet.conv_in.weight.mul_(2)
    assert seen.changed(unet)


def test_views_and_empty_tensors_are_watched():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            flat = torch.randn(4096, generator=torch.Generator().manual_seed(0))
            self.one = nn.Parameter(flat[10:2010].view(50, 40).t())
            self.two = nn.Parameter(torch.ones(1, dtype=torch.float32).expand(2000))
            self.none = nn.Parameter(torch.empty(0, dtype=torch.float32))

    module = Odd()
    seen = Watch(module)
    assert not seen.changed(module)
    module.one.data += 1
    assert seen.changed(module)


def test_foreign():
    unet = CoalescerUNet(**SMALL)
    assert foreign(unet) == ""
    handle = unet.mid[0].conv1.register_forward_hook(lambda *args: None)
    assert foreign(unet) == "mid.0.conv1 has a forward hook"
    handle.remove()
    unet.forward = lambda *args: None
    assert foreign(unet) == "the forward of CoalescerUNet is patched"
    del unet.forward
    assert foreign(unet) == ""
