"""benchmarks.bulk: a run of seconds."""

from __future__ import annotations

import io
import os
import tarfile

import pytest
from PIL import Image

pytest.importorskip("pyarrow", reason="needs the package pyarrow")
if not os.path.exists("/proc/self/status"):
    pytest.skip("reads /proc", allow_module_level=True)
from benchmarks.bulk import benchmark
from benchmarks.harness import results


def test_a_short_run(tmp_path):
    path = tmp_path / "bulk.csv"
    assert benchmark.main(["--pictures", "16", "--rows", "1000", "--csv", str(path)]) == 0
    [row] = results.read(path)
    assert (row["pictures"], row["rows"], row["checked_pictures"], row["wrong_pictures"]) == ("16", "1000", "8", "0")
    assert float(row["read_s"]) > 0
    assert float(row["read_mb"]) > 0


def test_wrong_pictures_are_found(tmp_path):
    black = io.BytesIO()
    Image.new("RGB", (64, 64)).save(black, "PNG")
    with tarfile.open(tmp_path / "00000.tar", "w") as file:
        for i in range(2):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(black.getvalue())
            file.addfile(member, io.BytesIO(black.getvalue()))
    assert benchmark.wrong(tmp_path / "00000.tar", ["octopus", "pizza"]) == 2
