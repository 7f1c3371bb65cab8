"""Hypothesis, or, where it is not installed, decorators that skip the tests that need it."""

from __future__ import annotations

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    from unittest.mock import MagicMock

    st = MagicMock()

    def settings(**_):
        return lambda test: test

    def given(**_):
        return lambda test: pytest.mark.skip(reason="needs hypothesis")(lambda: None)


__all__ = ["given", "settings", "st"]
