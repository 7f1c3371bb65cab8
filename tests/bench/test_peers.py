from __future__ import annotations

import pytest

from coalescer_fast.bench.peers import Missing, Peers, attempt


def failing(error: Exception):
    def work():
        raise error

    return work


def test_what_becomes_of_an_attempt():
    assert attempt(lambda: 3) == (3, "ok")
    assert attempt(failing(Missing("it needs the package x"))) == (None, "skipped: it needs the package x")
    assert attempt(failing(RuntimeError("no such kernel"))) == (None, "FAIL: no such kernel")
    with pytest.raises(MemoryError):
        attempt(failing(MemoryError()), MemoryError)
    with pytest.raises(KeyboardInterrupt):
        attempt(failing(KeyboardInterrupt()))


def test_peers_are_registered_by_name():
    peers = Peers()

    @peers.register("eager", "fp32", "bf16")
    def run() -> int:
        return 3

    assert list(peers) == ["eager"]
    assert peers["eager"].dtypes == ("fp32", "bf16")
    assert peers["eager"].prepare() == run() == 3
