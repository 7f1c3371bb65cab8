from __future__ import annotations

from pathlib import Path

import pytest

from ..helpers import processes


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server of processes now: it takes seconds, on another core, while the tests before these run."""
    if any(Path(__file__).parent in item.path.parents for item in session.items):
        processes.context()
