from __future__ import annotations

from . import promises


def test_every_promise_has_tests_that_exist():
    assert promises.broken() == []
    assert len(promises.promises()) > 40


def test_what_is_wrong_is_said(monkeypatch, tmp_path):
    page = tmp_path / "promises.md"
    page.write_text(
        "| Promise | Held by |\n|---|---|\n| a | nobody |\n| b | `tests/test_promises.py::test_nothing` |\n"
    )
    monkeypatch.setattr(promises, "PAGE", page)
    assert promises.broken() == ["no test is named for: a", "tests/test_promises.py has no test_nothing, named for: b"]
