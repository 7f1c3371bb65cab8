from __future__ import annotations

import pytest

from ..helpers.graph_capture import CpuGraphCapture


@pytest.fixture
def capture() -> CpuGraphCapture:
    return CpuGraphCapture()
