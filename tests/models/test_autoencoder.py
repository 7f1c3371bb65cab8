from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from coalescer_fast import CoalescerAutoencoder
from coalescer_fast.training.autoencoder import encode, set_latent_statistics
from coalescer_fast.training.data import Concept, PictureDataset

SMALL = {"patch_size": 2, "latent_channels": 5, "width": 8, "encoder_blocks": (1, 1), "decoder_blocks": (1, 1)}


def small(**changes) -> CoalescerAutoencoder:
    torch.manual_seed(0)
    return CoalescerAutoencoder(**{**SMALL, **changes}).eval()


def pictures(n: int = 2, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def dataset(n: int = 24, size: int = 16) -> PictureDataset:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (n, 1, 1, 3)) * random.random((n, size, size, 1))
    return PictureDataset(images.astype(np.uint8), (Concept("noise"),), np.zeros(n, int))


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 4),
        ({"patch_size": 1}, 2),
        ({"patch_size": 4}, 8),
        ({"encoder_blocks": (2,), "decoder_blocks": (1,)}, 2),
        ({"encoder_blocks": (1, 1, 1), "decoder_blocks": (2, 1, 1)}, 8),
    ],
)
@torch.no_grad()
def test_shapes(changes, factor):
    model = small(**changes)
    assert model.scale_factor == factor
    x = pictures(2, 16, 32)
    latents = model.encode(x).latents
    assert latents.shape == (2, 5, 16 // factor, 32 // factor)
    assert model.decode(latents).sample.shape == x.shape
    assert model(x).sample.shape == x.shape


def test_the_default_makes_8x8_latents_of_64x64_pictures():
    with torch.device("meta"):
        model = CoalescerAutoencoder()
        latents = model.eval().encode(torch.empty(1, 3, 64, 64)).latents
    assert latents.shape == (1, 16, 8, 8)
    assert model.scale_factor == 8


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches_are_undone(patch_size):
    """With nothing between them, the two shuffles are the identity, and a patch holds the pixels of one block."""
    model = small(patch_size=patch_size)
    model.encoder, model.decoder, model.latent_norm = nn.Identity(), nn.Identity(), nn.Identity()
    x = pictures()
    patches = model.encode(x).latents
    side = 16 // patch_size
    assert patches.shape == (2, 3 * patch_size**2, side, side)
    block = x[:, :, :patch_size, :patch_size].flatten(1)
    assert torch.equal(patches[:, :, 0, 0].sort().values, block.sort().values)
    assert torch.equal(model.decode(patches).sample, x)


@torch.no_grad()
def test_forward_decodes_what_is_encoded_with_noise():
    model, x = small(), pictures()
    latents = model.encode(x).latents
    noise = 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(x).sample, model.decode(latents).sample)
    assert torch.equal(model(x, noise).sample, model.decode(latents + noise).sample)


@torch.no_grad()
def test_tuples():
    model, x = small(), pictures()
    (latents,) = model.encode(x, return_dict=False)
    assert torch.equal(latents, model.encode(x).latents)
    (sample,) = model.decode(latents, return_dict=False)
    assert torch.equal(sample, model.decode(latents).sample)
    assert torch.equal(model(x, return_dict=False)[0], sample)


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_neighbours():
    model, x = small(), pictures(4)
    for i in range(4):
        torch.testing.assert_close(model(x[i : i + 1]).sample[0], model(x).sample[i], rtol=1e-5, atol=1e-5)


def test_latents_are_standardised_after_the_statistics_are_set():
    model, data = small(), dataset()
    before = encode(model, data)
    assert not torch.allclose(before.var((0, 2, 3), correction=0), torch.ones(5), atol=0.1)
    set_latent_statistics(model, data, batch_size=7)
    raw_variance = model.latent_norm.running_var.double()
    latents = encode(model, data, batch_size=5).double()
    torch.testing.assert_close(
        latents.mean((0, 2, 3)), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-5
    )  # float32 means
    # the norm divides by sqrt(var + 1e-5), so the variance is a little below 1
    torch.testing.assert_close(
        latents.var((0, 2, 3), correction=0), raw_variance / (raw_variance + 1e-5), rtol=1e-4, atol=1e-4
    )


def test_statistics_do_not_depend_on_the_batch_size():
    a, b = small(), small()
    set_latent_statistics(a, dataset(), batch_size=24)
    set_latent_statistics(b, dataset(), batch_size=5)
    torch.testing.assert_close(a.latent_norm.running_mean, b.latent_norm.running_mean)
    torch.testing.assert_close(a.latent_norm.running_var, b.latent_norm.running_var)


def test_statistics_run_along_in_training_only():
    model, x = small(), pictures()
    before = model.latent_norm.running_mean.clone()
    model.encode(x)
    assert torch.equal(model.latent_norm.running_mean, before)
    model.train()
    model.encode(x)
    assert not torch.equal(model.latent_norm.running_mean, before)


def test_saved_and_loaded(tmp_path):
    model, x = small(), pictures()
    set_latent_statistics(model, dataset())
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert {k for k in config if not k.startswith("_")} == SMALL.keys()
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}.items() >= SMALL.items()
    loaded = CoalescerAutoencoder.from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(x).sample, model(x).sample)


def test_levels_must_agree():
    with pytest.raises(ValueError, match=r"encoder_blocks \(1, 1\) and decoder_blocks \(1,\)"):
        small(decoder_blocks=(1,))
