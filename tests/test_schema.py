from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from coalescer_fast.schema import FileName, Sha256, between, build, check_arguments, conform, one_of


@dataclass(frozen=True)
class Inner:
    size: int
    ratio: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")
    maybe: Annotated[int, between(0, 9)] | None = None
    table: dict[str, float] = field(default_factory=dict)


def test_tables_become_dataclasses():
    found = build(
        {
            "name": "a",
            "inner": {"size": 3, "ratio": 1},
            "sizes": [1, 2],
            "pair": [2, "b"],
            "maybe": 3,
            "table": {"x": 1},
        },
        Outer,
    )
    assert found == Outer("a", Inner(3, 1.0), (1, 2), (2, "b"), 3, {"x": 1.0})
    assert isinstance(found.inner.ratio, float)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        (3, str, "x is 3; expected text"),
        ("\ud800", str, "without halves of characters"),
        (True, int, "x is True; expected a whole number"),
        (1.0, int, "x is 1.0; expected a whole number"),
        (True, float, "x is True; expected a finite number"),
        (float("inf"), float, "x is inf; expected a finite number"),
        (10**400, float, "expected a finite number"),
        (1, bool, "x is 1; expected true or false"),
        ("ab", tuple[str, ...], "x is 'ab'; expected a list"),
        ([1, "a"], Sequence[int], "x[1] is 'a'; expected a whole number"),
        ([1], tuple[int, int], "x is [1]; expected a list of 2"),
        ([], dict[str, int], "x is []; expected a table"),
        ({"a": "b"}, dict[str, int], "x.a is 'b'; expected a whole number"),
        ("a", int | None, "x is 'a'; expected a whole number"),
        ([], int | str, "x is []; expected a whole number or text"),
        ({}, Inner, "key x.size is missing"),
        ({"size": 1, "more": 1}, Inner, "unknown key x.more; known are size, ratio"),
        (11, Annotated[int, between(1, 10)], "x is 11; expected a number from 1 to 10"),
        ("c", Annotated[str, one_of("a", "b")], "x is 'c'; expected one of a, b"),
        ("a/b", FileName, "plain name"),
        ("..", FileName, "plain name"),
        ("C:a", FileName, "plain name"),
        ("a\n", FileName, "plain name"),
        ("1" * 63, Sha256, "64 hexadecimal digits"),
        ([[[[[[[[[[[[[[]]]]]]]]]]]]]], Any, "nested too deeply"),
    ],
)
def test_what_is_none(value, hint, words):
    with pytest.raises(ValueError, match="x") as caught:
        conform(value, hint, "x")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_arguments():
    def function(self, size: int = 3, names: Sequence[str] = ()) -> None: ...

    check_arguments({"size": 4, "names": ["a"]}, function, "model")
    with pytest.raises(ValueError, match=r"unknown key model\.self; known are size, names"):
        check_arguments({"self": 4}, function, "model")
    with pytest.raises(ValueError, match=r"model\.size is 'a'; expected a whole number"):
        check_arguments({"size": "a"}, function, "model")
