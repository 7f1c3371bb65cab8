"""One server of the embedded model for all tests that do not change it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import coalescer_fast as cf

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)

from ..helpers.serving import Running, serving  # noqa: E402


def embedded() -> cf.CoalescerPipeline:
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    return cf.accelerate(pipe)


@pytest.fixture(scope="session")
def direct() -> cf.CoalescerPipeline:
    """The embedded model, accelerated, for direct calls."""
    return embedded()


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    with serving(embedded(), max_batch=8, max_queue=64) as found:
        yield found
