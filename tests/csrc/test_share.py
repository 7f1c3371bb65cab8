"""Work shared between threads, csrc/cpu/share.h: everything once, and equally much for each thread.

There is no machine with many cores here, so what is tested is the function of sizes, for the layers of the networks
that benchmarks run.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.networks import models
from benchmarks.sampler.providers import load

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")

THREADS = (1, 2, 4, 8, 16, 64)
TILES = {16: (6, 4), 8: (4, 3)}  # floats in a vector -> positions and vectors of the largest tile
ENOUGH = 16  # blocks at a tile for each thread


@pytest.fixture(scope="module")
def share(tmp_path_factory):
    target = tmp_path_factory.mktemp("share") / "share.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [os.environ.get("CXX", "c++"), *flags, Path(__file__).with_name("share.cpp"), "-o", target], check=True
    )
    function = ctypes.CDLL(str(target)).share
    function.argtypes = [ctypes.c_int64] * 6 + [ctypes.c_void_p] * 3
    function.restype = ctypes.c_int64

    def call(tiles: int, vectors: int, most: int, x_bytes: int, w_bytes: int, threads: int):
        blocks = -(-vectors // most)
        loads, rectangles = np.zeros(threads, np.int64), np.zeros(threads, np.int64)
        covered = np.zeros((tiles, blocks), np.int64)
        bands = function(
            tiles, vectors, most, x_bytes, w_bytes, threads, *(a.ctypes.data for a in (loads, covered, rectangles))
        )
        return bands, loads, covered, rectangles

    return call


def layers() -> set[tuple[int, int, int, int]]:
    """(positions, input channels, output channels, taps) of every layer, for one image."""
    found = set()

    def note(layer, given, result):
        taps = layer.weight[0, 0].numel()
        positions = result.shape[2:].numel() if result.ndim == 4 else result.shape[1:-1].numel()
        found.add((positions, layer.weight.shape[1], layer.weight.shape[0], taps))

    def watch(network: nn.Module) -> None:
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(note)

    with torch.no_grad():
        for name in ("sd-turbo", "sdxs"):
            watch(network := models.on_meta(name))
            given = models.inputs(name)
            models.evaluate(network, {key: value.to("meta") for key, value in given.items()})
        for name in ("emoji-64", "m"):
            pipe = load(name, torch.device("cpu"))
            watch(pipe.unet)
            watch(pipe.vae.decoder)
            pipe("octopus", num_inference_steps=1, output_type="pt" if name == "emoji-64" else "latent")
    return found


@pytest.fixture(scope="module")
def products():
    """The arguments of `share` but the threads."""
    found = set()
    for width, (positions, vectors) in TILES.items():
        for batch in (1, 4):
            for count, inputs, outputs, taps in layers():
                tiles, columns = -(-count * batch // positions), -(-outputs // width)
                x_bytes, w_bytes = 2 * batch * count * inputs, 2 * outputs * inputs * taps
                found.add((tiles, columns, vectors, x_bytes, w_bytes))
    assert len(found) > 150
    return sorted(found)


@pytest.mark.parametrize("threads", THREADS)
def test_no_thread_of_a_layer_has_more_than_a_tenth_above_the_mean(share, products, threads):
    balanced = 0
    for product in products:
        tiles, vectors, most, *_ = product
        _, loads, covered, rectangles = share(*product, threads)
        assert (covered == 1).all(), product
        assert loads.sum() == tiles * vectors
        assert rectangles.max() <= 3
        if covered.size >= ENOUGH * threads:
            balanced += 1
            assert loads.max() <= 1.1 * loads.mean(), product
        assert loads.max() <= 1.05 * loads.mean() + most, product  # also with fewer: a block more
    assert balanced > len(products) / 3


def test_one_and_two_threads_share_the_larger_of_image_and_weights(share, products):
    for product in products:
        tiles, _, _, x_bytes, w_bytes = product
        assert share(*product, 1)[0] == 1
        if tiles > 20:  # else only one of the two may be equal halves
            assert share(*product, 2)[0] == (2 if x_bytes > w_bytes else 1), product


def test_a_grid_reads_less_than_rows_or_columns(share):
    # 64x64 positions of 320 channels, 3x3, by 16 threads: 4 x 4
    bands, loads, _, _ = share(683, 20, 4, 2 * 4096 * 320, 2 * 9 * 320 * 320, 16)
    assert bands == 4
    assert loads.max() <= 1.02 * loads.mean()


def test_random_products_are_covered_once(share):
    generator = np.random.default_rng(0)
    for _ in range(2000):
        tiles, vectors, threads = (int(generator.integers(low, high)) for low, high in ((0, 40), (1, 40), (1, 65)))
        most = int(generator.integers(1, 5))
        x_bytes, w_bytes = (int(2 ** generator.uniform(0, 30)) for _ in range(2))
        _, loads, covered, _ = share(tiles, vectors, most, x_bytes, w_bytes, threads)
        assert (covered == 1).all()
        assert loads.sum() == tiles * vectors
