from __future__ import annotations

import itertools

from coalescer_fast.export.measure import speed


def test_functions_are_timed_in_turn(monkeypatch):
    clock, order = itertools.count(), []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    taken = speed.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0, least=3)
    assert taken == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert order == list("ab" + "ba" + "ab" + "ba")
