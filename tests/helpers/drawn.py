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
        def skipped():
            """Without the arguments that would be drawn."""

        return lambda test: pytest.mark.skip(reason="needs hypothesis")(skipped)


__all__ = ["given", "settings", "st"]
