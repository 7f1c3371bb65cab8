from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

from benchmarks.networks import models

SMALL = {"scale": 0.1, "size": 16}


@pytest.mark.parametrize(
    ("name", "parameters"),  # of the public checkpoints
    [
        ("sd15", 859_520_964),
        ("sd-turbo", 865_910_724),
        ("sdxl-turbo", 2_567_463_684),
        ("ddpm", 35_746_307),
        ("kl-vae", 49_490_179),
    ],
)
def test_networks_are_those_of_public_checkpoints(name, parameters):
    assert models.parameters(models.on_meta(name)) == parameters


def test_decoder_of_the_tiny_autoencoder_is_that_of_diffusers():
    with torch.device("meta"):
        decoder = diffusers.AutoencoderTiny().decoder
    shapes = [parameter.shape for parameter in decoder.parameters()]
    assert [parameter.shape for parameter in models.on_meta("tiny-vae").parameters()] == shapes


def test_an_evaluation_is_counted_with_its_attention():
    one = models.gflop("sd-turbo", 1, 64)
    assert one == pytest.approx(804, rel=0.01)  # by hand: 2 x multiplications of convolutions, products and attention
    # attention grows with the square of the area, all else with the area or not at all
    assert models.gflop("sd-turbo", 1, 128) > 4.2 * one
    assert models.gflop("sd-turbo", 2, 64) == pytest.approx(2 * one, rel=1e-3)


@pytest.mark.parametrize("name", models.NETWORKS)
def test_small_networks_run_and_their_numbers_stay_near_one(name):
    module = models.make(name, SMALL["scale"])
    arguments = models.inputs(name, 2, SMALL["size"], SMALL["scale"])
    with torch.no_grad():
        y = models.evaluate(module, arguments)
        assert torch.equal(models.Flat(module, arguments)(*models.flat(arguments).values()), y)
        assert torch.equal(models.evaluate(models.make(name, SMALL["scale"]), arguments), y)
    assert len(y) == 2
    assert 0.2 < y.std() < 2


@pytest.mark.parametrize("scale", [0.05, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("name", models.NETWORKS)
def test_every_scale_is_a_network(name, scale):
    small, large = models.parameters(models.on_meta(name, scale)), models.parameters(models.on_meta(name))
    assert 0 < small < large


def test_weights_in_half_precision_are_the_same_ones_rounded():
    exact, rounded = (models.make("sdxs", 0.1, dtype) for dtype in (torch.float32, torch.bfloat16))
    pairs = list(zip(exact.parameters(), rounded.parameters()))
    assert all(torch.equal(a.bfloat16(), b) and b.dtype == torch.bfloat16 for a, b in pairs)
    other = models.make("sdxs", 0.1, seed=1)
    assert not any(torch.equal(a, b) for (a, _), b in zip(pairs, other.parameters()))


def test_there_is_never_a_copy_of_all_weights(monkeypatch):
    most = 0
    drawn = torch.randn

    def randn(*args, **kwargs):
        nonlocal most
        most = max(most, (made := drawn(*args, **kwargs)).numel())
        return made

    monkeypatch.setattr(torch, "randn", randn)
    module = models.make("sdxs", 0.1, torch.bfloat16)
    assert most == max(parameter.numel() for parameter in module.parameters())


def test_matrices_keep_the_size_of_what_they_multiply():
    module = models.fill(nn.Linear(4096, 512))
    with torch.no_grad():
        y = module(torch.randn(64, 4096))
    assert float(y.std()) == pytest.approx(1, rel=0.05)


def test_inputs_differ_between_timesteps_and_are_the_same_again():
    first, again, other = (models.inputs("sdxl-turbo", 1, 8, 0.1, timestep=t) for t in (999, 999, 19))
    for name, x in models.flat(first).items():
        assert torch.equal(x, models.flat(again)[name])
        assert name == "time_ids" or not torch.equal(x, models.flat(other)[name])
