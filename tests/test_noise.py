"""Noise from a counter: known answers of the cipher, the numbers, and calls that draw with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

import coalescer_fast as cf
from coalescer_fast.noise import normal, philox

# the known answers of Random123, the authors' library
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.fixture(scope="module")
def pipe():
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    found = philox(np.array(counter, dtype=np.uint64)[:, None], key)
    assert tuple(found[:, 0].tolist()) == expected


def test_numbers_are_box_and_muller_of_each_block():
    seed, picture = 2**40 + 3, 2**33 + 5
    found = normal(seed, picture, 10)
    for j in range(3):
        counter = np.array([j, 0, 5, 2], dtype=np.uint64)[:, None]
        v = (philox(counter, (3, 2**8))[:, 0].astype(float) + 0.5) / 2**32
        expected = []
        for a, b in ((v[0], v[1]), (v[2], v[3])):
            radius = math.sqrt(-2 * math.log(a))
            expected += [radius * math.cos(2 * math.pi * b), radius * math.sin(2 * math.pi * b)]
        np.testing.assert_allclose(found[4 * j : 4 * j + 4], expected[: len(found) - 4 * j], rtol=1e-6)
    assert found.dtype == np.float32


def test_numbers_are_normal_and_independent():
    found = np.stack([normal(1, picture, 4096) for picture in range(8)])
    assert stats.kstest(found.ravel(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(found) - np.eye(8)).max() < 0.08


@pytest.mark.parametrize("count", [0, 1, 5, 256])
def test_a_shorter_draw_is_the_beginning_of_a_longer_one(count):
    np.testing.assert_array_equal(normal(7, 1, count), normal(7, 1, 300)[:count])


def test_pictures_of_a_call_do_not_depend_on_each_other(pipe):
    batch = pipe.initial_noise(4, cf.PhiloxGenerator(3))
    alone = pipe.initial_noise(1, cf.PhiloxGenerator(3, picture=2))
    listed = pipe.initial_noise(2, [cf.PhiloxGenerator(3, 2), cf.PhiloxGenerator(4)])
    assert torch.equal(batch[2:3], alone)
    assert torch.equal(listed[:1], alone)
    assert torch.equal(listed[1:], pipe.initial_noise(1, cf.PhiloxGenerator(4)))


def test_a_generator_goes_on(pipe):
    generator = cf.PhiloxGenerator(3)
    first, second = pipe.initial_noise(2, generator), pipe.initial_noise(2, generator)
    assert repr(generator) == "PhiloxGenerator(3, picture=4)"
    assert torch.equal(torch.cat([first, second]), pipe.initial_noise(4, cf.PhiloxGenerator(3)))


def test_a_call_draws_with_it(pipe):
    both = [cf.PhiloxGenerator(1), cf.PhiloxGenerator(2)]
    listed = pipe(["cat", "dog"], generator=both, output_type="pt").images
    alone = pipe("dog", generator=cf.PhiloxGenerator(2), output_type="pt").images
    assert torch.allclose(listed[1:], alone, atol=1e-5)
    assert not torch.allclose(listed[1:], pipe("dog", generator=cf.PhiloxGenerator(3), output_type="pt").images)


def test_best_of_draws_others_of_the_same_generator(pipe):
    one = pipe("cat", best_of=3, generator=[cf.PhiloxGenerator(5)], output_type="latent").images
    drawn = pipe("cat", num_images_per_prompt=3, generator=cf.PhiloxGenerator(5), output_type="latent").images
    assert any(torch.allclose(one[0], other, atol=1e-5) for other in drawn)


@pytest.mark.parametrize("number", [-1, 2**64, pytest.param(10**5000, id="huge"), 1.5, True, "3", np.int64(-1)])
@pytest.mark.parametrize("name", ["seed", "picture"])
def test_other_numbers_are_refused(name, number):
    with pytest.raises(ValueError, match=rf"^{name} is .*; expected a whole number from 0 up to 2\^64 - 1$"):
        cf.PhiloxGenerator(**{"seed": 0, name: number})


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.uint8])
def test_numbers_of_numpy_are_taken(kind):
    drawn = cf.PhiloxGenerator(kind(3), picture=kind(7)).normal(kind(5))
    assert np.array_equal(drawn, cf.PhiloxGenerator(3, picture=7).normal(5))


@pytest.mark.parametrize("count", [-1, 2.5])
def test_another_count_is_refused_and_takes_no_picture(count):
    generator = cf.PhiloxGenerator(0)
    with pytest.raises(ValueError, match=r"^count is "):
        generator.normal(count)
    assert generator.picture == 0


def test_two_kinds_of_generators_are_refused(pipe):
    with pytest.raises(TypeError, match="two kinds"):
        pipe.initial_noise(2, [cf.PhiloxGenerator(0), torch.Generator()])
