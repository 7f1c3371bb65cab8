"""The chunked GroupNorm in Triton, a rival, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.harness import results as common
from benchmarks.kernels import benchmark as kernels
from benchmarks.kernels import chunked, peers, shapes
from coalescer_fast.ops import triton_launch

interpreted = pytest.mark.skipif(not triton_launch.INTERPRETED, reason="needs Triton's interpreter")
CALLS = [
    shapes.GroupNorm(12, size=6, groups=3),
    shapes.GroupNorm(20, skip=12, size=5, groups=8, film=True, pre_bias=True),
    shapes.GroupNorm(6, size=7, groups=1, activation=None, film=True),
    shapes.GroupNorm(4, size=1, groups=2),
]


@interpreted
@pytest.mark.parametrize("chunk", [8, 64, 8192])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_it_is_a_group_norm(call, chunk, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    monkeypatch.setattr(chunked, "BLOCK", 8)
    inputs = call.inputs(2, torch.float32, torch.device("cpu"))
    inputs = {key: x.contiguous() if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    y, expected = chunked.group_norm_silu(**inputs), peers.group_norm_silu(**inputs)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_no_group_has_more_chunks_than_there_may_be(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 8)
    monkeypatch.setattr(chunked, "BLOCK", 8)
    monkeypatch.setattr(chunked, "MOST_CHUNKS", 3)
    inputs = shapes.GroupNorm(8, size=5, groups=2).inputs(1, torch.float32, torch.device("cpu"))
    inputs["x"] = inputs["x"].contiguous()
    torch.testing.assert_close(chunked.group_norm_silu(**inputs), peers.group_norm_silu(**inputs))


@interpreted
def test_it_is_measured_where_it_has_the_op(tmp_path):
    path = tmp_path / "kernels.csv"
    argv = ["--shapes", "emoji-64", "--calls", "160x2x2 g8", "160x2x2", "--peers", "eager,chunked", "--batch", "1"]
    argv += ["--backends", "reference", "--dtypes", "fp32", "--cache", "warm", "--budget", "0.001"]
    argv += ["--op", "group_norm_silu", "bias_residual", "--csv", str(path)]
    assert kernels.main(argv) == 0
    rows = {(row["kernel_name"], row["kernel_provider"]): row for row in common.read(path)}
    assert rows["group_norm_silu", "chunked"]["status"] == "ok"
    assert float(rows["group_norm_silu", "chunked"]["y_value_50"]) > 0
    assert ("bias_residual", "chunked") not in rows
    # nothing is missing in the file, though one op lacks the peer
    for row in rows.values():
        assert row["quiet"] in ("0", "1")


def test_without_triton_it_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(triton_launch, "unavailable", lambda: "there is no CUDA device")
    assert kernels.main(["--peers", "chunked"]) == 1
    said = "python -m benchmarks.kernels: --peers chunked cannot run here: there is no CUDA device\n"
    assert capsys.readouterr().err == said
