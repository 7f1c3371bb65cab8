"""Pictures of a file of prompts, by the thousand and the million, as shards that webdataset and datasets read.

    from coalescer_fast.bulk import Model, Settings, check, generate

    generate("prompts.txt", "pictures", Settings(seed=1), Model("emoji-64"), workers=8)

A run that was killed is gone on with by the same call: it makes the shards that are missing, and ends with the same
bytes as one that nothing has disturbed. Names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .generation import Report, check, generate
    from .settings import Model, Settings

__all__ = ["Model", "Report", "Settings", "check", "generate"]

_MODULES = {
    "Model": ".settings",
    "Report": ".generation",
    "Settings": ".settings",
    "check": ".generation",
    "generate": ".generation",
}

if not TYPE_CHECKING:  # a type checker would take __getattr__ as leave for any name

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_MODULES[name], __name__), name)
