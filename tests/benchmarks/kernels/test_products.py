"""A brief run of the benchmark of products, on layers that take no time."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.harness import results
from benchmarks.kernels import products
from coalescer_fast.bench import timing
from coalescer_fast.bench.peers import OK
from coalescer_fast.ops import native_library
from coalescer_fast.runtime.native.module import no_programs
from coalescer_fast.runtime.native.steps import FORMS, forms

pytestmark = pytest.mark.skipif(
    bool(no_programs(torch.float32)), reason=no_programs(torch.float32) or "programs run here"
)

SMALL = {
    "m": [
        partial(products.Convolution, 6, 8, 16),
        partial(products.Convolution, 6, 8, 8, 3, 2),
        partial(products.Convolution, 5, 8, 8, 1),
        partial(products.Linear, 7, 16, 24),
        partial(products.Attention, 2, 8, 6, 5),
    ]
}
DTYPES = [name for name, kind in products.DTYPES.items() if kind in native_library.products()]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(products, "CALLS", SMALL)
    monkeypatch.setattr(products, "peak", lambda task: 100.0)
    monkeypatch.setattr(timing, "ROUNDS", (2, 3))
    monkeypatch.setattr(timing, "last_level_cache", lambda: 2**16)


def run(folder, *argv: str) -> tuple[int, list[dict[str, str]]]:
    path = folder / "products.csv"
    shared = ["--shapes", "m", "--budget", "0.001", "--threads", "1", "--allocator", "system", "--csv", str(path)]
    return products.main([*shared, *argv]), results.read(path)


def test_a_row_for_every_form_and_peer(tmp_path):
    status, rows = run(tmp_path)
    assert status == 0
    for dtype in DTYPES:
        for call in (make() for make in SMALL["m"]):
            found = [row for row in rows if (row["dtype"], row["call"]) == (dtype, call.label)]
            mine = [row["form"] for row in found if row["provider"] == products.OURS]
            peers = [row["provider"] for row in found if row["provider"] != products.OURS]
            if call.kind != "attention" and mine:
                wide = "3x3" in call.label and "stride" not in call.label
                able = forms(products.DTYPES[dtype])
                assert mine == [FORMS[form] for form in (able if wide else able[:1])]
            assert mine or dtype == "int8"
            packed = ["torch_prepacked"] * (call.kind != "attention")
            assert peers == ([] if dtype == "int8" else ["torch", *packed])
    for row in rows:
        assert row["status"] == OK
        assert 0 < float(row["error"]) <= products.LIMITS[row["dtype"]]
        seconds = float(row["y_value_50"]) / 1e3
        assert float(row["gflop_per_s"]) == pytest.approx(float(row["gflop"]) / seconds, rel=1e-3)
        assert float(row["percent_of_peak"]) == pytest.approx(float(row["gflop_per_s"]), rel=1e-3)  # of a peak of 100
    gflop = {row["call"]: round(1e9 * float(row["gflop"])) for row in rows}
    assert gflop["6x6, 8 -> 16, 3x3"] == 2 * 36 * 9 * 8 * 16
    assert gflop["6x6, 8 -> 8, 3x3, stride 2"] == 2 * 9 * 9 * 8 * 8
    assert gflop["2 heads of 8, 6 to 5"] == 4 * 2 * 8 * 6 * 5


def test_a_wrong_result_has_no_time(tmp_path, monkeypatch):
    monkeypatch.setitem(products.LIMITS, "fp32", 1e-12)
    status, rows = run(tmp_path, "--kind", "linear", "--dtypes", "fp32")
    assert status == 1
    assert all(row["status"].startswith("FAIL: error") and not row["y_value_50"] for row in rows)


def test_instruction_sets_that_are_asked_for(tmp_path):
    best = native_library.isa()
    _, rows = run(tmp_path, "--kind", "convolution", "--dtypes", "fp32", "--isa", f"{best},portable")
    assert {row["isa"] for row in rows if row["provider"] == products.OURS} == {best, "portable"}
    assert native_library.isa() == best
