"""The host emulation of CUDA in emulation/: its features, and that it finds what it is there to find."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from emulate import build

HERE = Path(__file__).parent
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation runs on Linux"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    target = tmp_path_factory.mktemp("emulation") / "features.so"
    build([HERE / "emulated_features.cu"], target, "-Wall", "-Wextra", "-Werror")
    return ctypes.CDLL(str(target))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return array.ctypes.data_as(ctypes.c_void_p)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (32, 1), (45, 1), (16, 16), (1000, 1), (1024, 1)])
def test_a_block_sums_a_row(kernels, width, height):
    x = np.random.default_rng(0).integers(-50, 50, (7, 999)).astype(np.float32)
    sums = np.full(7, np.nan, np.float32)
    assert kernels.sum_rows(pointer(x), pointer(sums), 7, 999, width, height) == 0
    np.testing.assert_array_equal(sums, x.sum(1))


@pytest.mark.parametrize("cluster", [1, 4, 8])
@pytest.mark.parametrize("threads", [64, 40])
def test_a_cluster_reads_the_shared_memory_of_its_blocks(kernels, cluster, threads):
    x = np.random.default_rng(0).integers(-50, 50, (3, cluster, threads)).astype(np.float32)
    sums = np.full((3, cluster), np.nan, np.float32)
    assert kernels.cluster_sums(pointer(x), pointer(sums), 3, threads, cluster) == 0
    x[..., -1] = 0  # zero fill
    np.testing.assert_array_equal(sums, x.sum((1, 2))[:, None] + 1000 * np.arange(cluster))


@pytest.mark.parametrize("threads", [64, 256, 50])
def test_warp_functions(kernels, threads):
    out = np.zeros((11, threads), np.uint32)
    assert kernels.warps(pointer(out), threads) == 0
    t = np.arange(threads)
    first, lane, last = t - t % 32, t % 32, np.minimum(t - t % 32 + 32, threads) - 1

    def ballot(predicate, lanes=lambda i: i == i):
        return [sum(1 << (j - f) for j in range(f, e + 1) if predicate(j) and lanes(j)) for f, e in zip(first, last)]

    def sent(source):  # by a lane that does not exist: all bits set
        return np.where(source <= last, source, 2**32 - 1)

    np.testing.assert_array_equal(out[0], ballot(lambda j: j % 3 == 0))
    np.testing.assert_array_equal(out[1], 2 * (first == 32) + (first == 0))
    np.testing.assert_array_equal(out[2], first + 5)
    np.testing.assert_array_equal(out[3], sent(first + lane // 8 * 8 + 1))
    np.testing.assert_array_equal(out[4], np.where(t % 16 < 3, t, t - 3))
    np.testing.assert_array_equal(out[5], np.where(t % 16 > 12, t, sent(t + 3)))
    np.testing.assert_array_equal(out[6], sent(t ^ 5))
    np.testing.assert_array_equal(out[7].view(np.float32), first + 1)
    np.testing.assert_array_equal(out[8], 2)
    odd, even = ballot(lambda j: j > 9, lambda j: j % 2 == 1), ballot(lambda j: j > 20, lambda j: j % 2 == 0)
    np.testing.assert_array_equal(out[9], np.where(t % 2, odd, even))
    np.testing.assert_array_equal(out[10], t ^ 1)


def test_halves_round_as_torch_rounds(kernels):
    rng = np.random.default_rng(0)
    every_half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    every_bfloat = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    finite = every_half[np.isfinite(every_half)]
    middles = (np.sort(finite)[1:] + np.sort(finite)[:-1]) / 2  # ties
    edges = np.float32(
        [65519.9, 65520, -65520, 65536, 3.4e38, 2**-25, 2**-25 * 1.0001, 2**-14, 2**-126, 1e-45, np.inf, np.nan]
    )
    bits = np.concatenate([rng.integers(0, 2**32, 100_000), (np.arange(1 << 16) << 16) + 0x8000]).astype(np.uint32)
    x = np.concatenate(
        [every_half, every_bfloat, middles, np.nextafter(middles, np.float32(0)), edges, bits.view(np.float32)]
    )
    x = np.concatenate([x, np.zeros(-len(x) % 256, np.float32)])

    half, bfloat = np.zeros(len(x), np.uint16), np.zeros(len(x), np.uint16)
    from_half, from_bfloat = np.zeros_like(x), np.zeros_like(x)
    assert kernels.convert(pointer(x), *map(pointer, (half, bfloat, from_half, from_bfloat)), len(x)) == 0
    nan = np.isnan(x)
    for got, back, dtype in [(half, from_half, torch.float16), (bfloat, from_bfloat, torch.bfloat16)]:
        expected = torch.from_numpy(x).to(dtype)
        np.testing.assert_array_equal(got[~nan], expected.view(torch.int16).numpy().view(np.uint16)[~nan])
        np.testing.assert_array_equal(got[nan], 0x7FFF)
        np.testing.assert_array_equal(
            back[~nan].view(np.uint32), expected.float().numpy()[~nan].view(np.uint32)
        )  # the sign of zero too
        assert np.isnan(back[nan]).all()


@pytest.mark.parametrize("cluster", [0, 2])
def test_every_thread_of_every_block_runs_once(kernels, cluster):
    x, y, z, threads = 4, 3, 2, 6
    out = np.full((z, y, x, threads), -1, np.int32)
    assert kernels.positions(pointer(out), x, y, z, threads, cluster) == 0
    expected = np.arange(x) % cluster if cluster else np.zeros(x)
    np.testing.assert_array_equal(out, np.broadcast_to(expected[:, None], out.shape))


def test_launches_that_a_device_refuses(kernels):
    out = np.zeros(4096, np.int32)
    for x, y, z, threads, cluster, error in [
        (4, 1, 1, 1024, 4, 0),
        (4, 1, 1, 1026, 0, INVALID_CONFIGURATION),
        (6, 1, 1, 32, 4, INVALID_CONFIGURATION),
        (16, 1, 1, 32, 16, INVALID_CONFIGURATION),
        (0, 1, 1, 32, 0, INVALID_CONFIGURATION),
        (1, 0, 1, 32, 0, INVALID_CONFIGURATION),
        (1, 1, 1, 0, 0, INVALID_CONFIGURATION),
        (1, 65536, 1, 32, 0, INVALID_CONFIGURATION),
    ]:
        assert kernels.positions(pointer(out), x, y, z, threads, cluster) == error
        assert kernels.last_error() == error
        assert kernels.last_error() == 0


def test_shared_memory_is_limited_and_starts_as_nan(kernels):
    out = np.zeros(64, np.float32)
    assert kernels.read_shared(pointer(out), 64, 48 << 10) == 0
    assert np.isnan(out).all()
    assert kernels.read_shared(pointer(out), 64, (48 << 10) + 1) == INVALID_VALUE
    assert kernels.raise_shared_limit((227 << 10) + 1) == INVALID_VALUE
    assert kernels.raise_shared_limit(227 << 10) == 0
    assert kernels.read_shared(pointer(out), 64, 227 << 10) == 0
    kernels.emulation_device(80, 163 << 10)
    assert kernels.read_shared(pointer(out), 64, 227 << 10) == INVALID_VALUE
    assert kernels.raise_shared_limit(164 << 10) == INVALID_VALUE
    assert (
        kernels.positions(pointer(np.zeros(64, np.int32)), 2, 1, 1, 32, 2) == 801
    )  # no clusters before compute capability 9.0
    kernels.emulation_device(90, 227 << 10)
    assert kernels.last_error() != 0


# Faults


class Faults:
    def __init__(self, folder: Path, *flags: str):
        self.program = folder / "faults"
        try:
            build([HERE / "emulated_faults.cu"], self.program, "-pie", *flags)
        except RuntimeError as error:
            if "cannot find" in str(error):
                pytest.skip("the compiler has no such sanitizer")
            raise

    def run(self, name: str, kind: str, seed: int = 1) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.program, name, kind, str(seed)], capture_output=True, text=True, check=False, timeout=300
        )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Faults(tmp_path_factory.mktemp("plain"), "-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return Faults(tmp_path_factory.mktemp("address"), "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def thread(tmp_path_factory):
    return Faults(tmp_path_factory.mktemp("thread"), "-fsanitize=thread")


# What shows in a plain build: wrong values ("wrong"), or the launch's error.
SHOWN = {
    "sync_block": "wrong",
    "sync_block_again": "wrong",
    "sync_warp": "wrong",
    "sync_cluster": "wrong",
    "sync_cluster_at_end": "wrong",
    "wait_for_copy": "256 wrong; no error",
    "set_static": "256 wrong; no error",
    "read_shared": "4 wrong; no error",
    "misaligned_copy": "__pipeline_memcpy_async of 16 bytes, 0 of them zero, from",
    "misaligned_load": "a misaligned access of 16 bytes at",
    "misaligned_store": "a misaligned access of 8 bytes at",
    "write_shared": "a write at byte 256 of shared memory, which has 256",
    "divergent_sync": "threads 0-39 at __syncthreads (FILE:LINE), threads 40-63 ended",
    "two_syncs": "while others are at FILE:LINE",
    "sync_or_warp": "threads 0-2 at __syncthreads (FILE:LINE), "
    "threads 3-31 at __syncwarp of lanes ffffffff (FILE:LINE)",
    "sync_some_blocks": "block (2,0,0) ended; block (3,0,0) threads 0-63 at cluster_group.sync",
}
ADDRESS = ["sync_cluster_at_end", "write_shared", "read_shared", "read_global"]
UNDEFINED = ["misaligned_load", "misaligned_store"]  # found by UBSan as well
RACES = ["sync_block", "sync_block_again", "sync_warp", "sync_cluster", "sync_cluster_at_end", "write_same"]
ALL = sorted({*SHOWN, *ADDRESS, *RACES})


@pytest.mark.parametrize("name", SHOWN)
def test_a_plain_build_shows(plain, name):
    for seed in range(10):
        output = plain.run(name, "faulty", seed).stdout
        output = re.sub(re.escape(str(HERE / "emulated_faults.cu")) + r":\d+", "FILE:LINE", output)
        if SHOWN[name] == "wrong":
            assert "no error" in output
            assert not output.startswith("0 wrong")
        else:
            assert SHOWN[name] in output


@pytest.mark.parametrize("name", ALL)
def test_a_plain_build_passes_sound_kernels(plain, name):
    for seed in range(10):
        assert plain.run(name, "sound", seed).stdout == "0 wrong; no error\n"


def test_a_seed_fixes_the_schedule(plain):
    outputs = [[plain.run("sync_cluster", "faulty", seed).stdout for seed in range(10)] for _ in range(2)]
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) > 1


@pytest.mark.parametrize("name", ADDRESS)
def test_address_sanitizer_finds(address, name):
    result = address.run(name, "faulty")
    assert result.returncode != 0
    assert "ERROR: AddressSanitizer" in result.stderr
    assert "emulated_faults.cu" in result.stderr


def test_address_sanitizer_passes_sound_kernels_and_failed_launches(address):
    for name, kind in itertools.product(ALL, ("sound", "faulty")):
        if kind == "sound" or name not in (*ADDRESS, *UNDEFINED):
            result = address.run(name, kind)
            assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", RACES)
def test_thread_sanitizer_finds(thread, name):
    result = thread.run(name, "faulty")
    assert result.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in result.stderr
    assert "emulated_faults.cu" in result.stderr


def test_thread_sanitizer_passes_sound_kernels_and_failed_launches(thread):
    for name, kind in itertools.product(ALL, ("sound", "faulty")):
        if kind == "sound" or name not in (*RACES, "read_global"):
            result = thread.run(name, kind)
            assert result.returncode == 0, result.stderr
