"""The subcommands of coalescer-export, a module each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def stage(bar: Any, kind: str) -> Callable[[str], None]:
    """A function that shows on a bar of tqdm which stage of a graph begins."""

    def begin(text: str) -> None:
        bar.set_description(f"{kind}: {text}")
        bar.update()

    return begin
