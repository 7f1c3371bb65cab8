"""Layers are called as modules: whatever users attach to them, or put in their place, works."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm

from coalescer_fast.models import CoalescerUNet
from coalescer_fast.models.layers import Convolution, is_plain

from ..helpers.networks import seeded

SMALL = dict(
    block_out_channels=(16, 24),
    norm_num_groups=4,
    embedding_dim=20,
    description_dim=12,
    num_attention_heads=2,
    latent_channels=4,
)
MODELS = {
    "anchor": dict(anchor="mlp", anchor_hidden_dim=40, **SMALL),
    "cross-attention": dict(cross_attention_dim=12, attention_levels=(0, 1), **SMALL),
}


@pytest.fixture(params=MODELS)
def unet(request):
    return seeded(CoalescerUNet(**MODELS[request.param]))


def evaluate(unet: CoalescerUNet, scale: float = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, description = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 12, generator=generator)
    rows = [torch.randn(2, 5, 12, generator=generator)] if unet.config.cross_attention_dim else []
    direction, distance = unet(sample, description, *rows, return_dict=False)
    return torch.cat([direction.flatten(), distance])


def test_every_leaf_is_called_and_its_result_is_what_counts(unet):
    expected = evaluate(unet)
    leaves = {name: module for name, module in unet.named_modules() if not list(module.children())}
    called: set[str] = set()
    handles = [module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in leaves.items()]
    torch.testing.assert_close(evaluate(unet), expected, rtol=1e-4, atol=1e-4)  # the bias is added by another layer
    assert called == set(leaves)
    for handle in handles:
        handle.remove()
    for name, module in leaves.items():
        with module.register_forward_hook(lambda _, args, y: y + 0.5 * y.flip(-1)):
            assert not torch.allclose(evaluate(unet), expected, rtol=1e-4, atol=1e-4), name
    assert torch.equal(evaluate(unet), expected)


def test_what_is_plain():
    layer = Convolution(4, 4, 3)
    assert is_plain(layer)
    with layer.register_forward_pre_hook(lambda *args: None):
        assert not is_plain(layer)
    layer.forward = layer.forward
    assert not is_plain(layer)
    assert not is_plain(Convolution(4, 4, 3), type("Other", (nn.Linear,), {})(3, 3))


# on every kind of layer that a forward of ours could go around
TARGETS = [
    "direction_head",
    "distance_head",
    "conv_in",
    "conv1",
    "conv2",
    "shortcut",
    "film",
    "linear_in",
    "to_out",
    "to_kv",
    r"up\.2\.0",
]


@pytest.mark.parametrize("target", TARGETS)
def test_lora_is_the_merged_weight(unet, target):
    peft = pytest.importorskip("peft")
    if not any(name.endswith(target.replace("\\", "")) for name, _ in unet.named_modules()):
        pytest.skip(f"this network has no {target}")
    before = evaluate(unet)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=rf".*{target}", init_lora_weights=False)
    torch.manual_seed(3)
    peft.inject_adapter_in_model(config, unet)
    after = evaluate(unet)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    merged = copy.deepcopy(unet)
    for module in merged.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    torch.testing.assert_close(after, evaluate(merged), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(evaluate(merged), before, rtol=1e-3, atol=1e-3)


def test_pruned_and_normalised_layers(unet):
    prune.l1_unstructured(unet.mid[0].conv1, "weight", 0.5)
    prune.l1_unstructured(unet.direction_head, "weight", 0.5)
    spectral_norm(unet.mid[0].conv2)
    unet.eval()
    twin = copy.deepcopy(unet.state_dict())
    plain = seeded(CoalescerUNet.from_config(unet.config))
    weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for name in ("mid.0.conv1", "direction_head"):
        weights[f"{name}.weight"] = twin[f"{name}.weight_orig"] * twin[f"{name}.weight_mask"]
    weights["mid.0.conv2.weight"] = unet.mid[0].conv2.weight
    plain.load_state_dict(weights)
    torch.testing.assert_close(evaluate(unet), evaluate(plain), rtol=1e-4, atol=1e-4)


def test_layerwise_casting(unet):
    expected = evaluate(unet)
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert unet.mid[0].conv1.weight.dtype == torch.bfloat16
    off = evaluate(unet) - expected
    assert 0 < float(off.norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_offload(unet, to, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    expected = evaluate(unet)
    if to == "cpu":
        accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(unet, tmp_path, execution_device=torch.device("cpu"))
    assert unet.mid[0].conv1.weight.is_meta
    # both ways in: the network by itself, and its conditioning first, as the pipeline does
    torch.testing.assert_close(evaluate(unet), expected, rtol=1e-4, atol=1e-4)
    generator = torch.Generator().manual_seed(1)
    sample, description = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 12, generator=generator)
    rows = [torch.randn(2, 5, 12, generator=generator)] if unet.config.cross_attention_dim else []
    direction, distance = unet(sample, unet.condition(description, *rows), return_dict=False)
    torch.testing.assert_close(torch.cat([direction.flatten(), distance]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:torch:DeprecationWarning", "ignore:torch:UserWarning")
def test_dynamically_quantised(unet):
    expected = evaluate(unet)
    quantised = torch.ao.quantization.quantize_dynamic(unet, {nn.Linear}, dtype=torch.qint8)
    off = evaluate(quantised) - expected
    assert 0 < float(off.norm() / expected.norm()) < 0.1
