"""A browser for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ...helpers import chromium


@pytest.fixture(scope="module")
def page() -> Iterator[chromium.Page]:
    if reason := chromium.unavailable():
        pytest.skip(reason)
    with chromium.browser() as tab:
        yield tab
