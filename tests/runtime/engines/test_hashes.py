from __future__ import annotations

import torch

import coalescer_fast as cf
from coalescer_fast.runtime.engines.hashes import network_hashes, network_sha256, structure_sha256


def test_a_configuration_is_part_of_a_network():
    layer = torch.nn.Linear(2, 2)
    assert network_sha256(layer, {"heads": 1, "_name": "a"}) == network_sha256(layer, {"heads": 1, "_name": "b"})
    assert network_sha256(layer, {"heads": 1}) != network_sha256(layer, {"heads": 2})
    half = network_sha256(layer.half(), {"heads": 1})
    assert half != network_sha256(layer.float(), {"heads": 1})
    assert network_sha256(layer.bfloat16(), {"heads": 1}) != half


def test_the_structure_is_part_of_a_network():
    def build() -> torch.nn.Sequential:
        norm, act = torch.nn.GroupNorm(2, 4, affine=False), torch.nn.LeakyReLU(0.1)
        return torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), norm, act)

    same = structure_sha256(build())
    network = build()
    assert structure_sha256(network.train().double()) == same  # these are not of the structure
    network.backend, network.gradient_checkpointing = "cpu", True
    assert structure_sha256(network) == same
    seen = {same}
    for place, name, value in (
        (0, "padding", (0, 0)),
        (0, "stride", (2, 2)),
        (0, "padding_mode", "circular"),
        (1, "eps", 1e-3),
        (1, "num_groups", 4),
    ):
        network = build()
        setattr(network[place], name, value)
        seen.add(structure_sha256(network))
    network = build()
    network[2] = torch.nn.ELU(0.1)
    seen.add(structure_sha256(network))
    network[2] = torch.nn.LeakyReLU(0.2)
    seen.add(structure_sha256(network))
    network[2] = torch.nn.Sequential(torch.nn.LeakyReLU(0.1))
    seen.add(structure_sha256(network))
    assert len(seen) == 9
    torch.manual_seed(0)
    first = build()
    torch.manual_seed(0)
    second = build()
    second[1].eps = 1e-3
    assert network_sha256(first, {}) != network_sha256(second, {})


def test_a_saved_network_is_the_same_when_it_is_loaded(tmp_path):
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.save_pretrained(tmp_path)
    assert network_hashes(cf.CoalescerPipeline.from_pretrained(tmp_path), "generator") == network_hashes(
        pipe, "generator"
    )
    fresh = type(pipe.unet)(**{name: value for name, value in pipe.unet.config.items() if not name.startswith("_")})
    assert structure_sha256(fresh) == structure_sha256(pipe.unet)
