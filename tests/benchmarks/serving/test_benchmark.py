from __future__ import annotations

import os

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=f"needs the package {package}")
if os.name != "posix":
    pytest.skip("sends SIGTERM", allow_module_level=True)
from benchmarks.harness import results  # noqa: E402
from benchmarks.serving import benchmark  # noqa: E402

from ...helpers.pipelines import tiny_pipeline  # noqa: E402
from ...helpers.serving import serving  # noqa: E402


def test_a_short_run(tmp_path, capsys):
    path = tmp_path / "serving.csv"
    words = ["--clients", "16", "--seconds", "3", "--requests", "40", "--options", "mixed", "--csv", str(path)]
    assert benchmark.main(words) == 0
    one, many, again = results.read(path)
    assert [row["clients"] for row in (one, many, again)] == ["1", "16", "1"]
    for row in (one, many, again):
        assert (row["answered_429"], row["other_errors"], row["wrong_pictures"]) == ("0", "0", "0")
        assert int(row["pictures"]) > 0
    assert int(many["pictures"]) >= 16
    assert "times the pictures of one client" in capsys.readouterr().out


def test_wrong_pictures_are_found():
    with serving(tiny_pipeline(), max_batch=2) as running:
        load = benchmark.run(running.port, 2, 0.5, benchmark.requests(4, "alike"), [b""] * 4)
    row = benchmark.measured(load)
    assert row["wrong_pictures"] == row["pictures"] > 0
    assert benchmark.failures([row]) == row["pictures"]


@pytest.mark.slow
def test_64_clients_for_a_minute(tmp_path):
    """Throughput is measured by the benchmark, on a quiet machine; here are the errors, the bits and the memory."""
    assert benchmark.main(["--csv", str(tmp_path / "f.csv")]) == 0
    many = results.read(tmp_path / "f.csv")[1]
    assert abs(float(many["memory_growth_mb"])) < 20
