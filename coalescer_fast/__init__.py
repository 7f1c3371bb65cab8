"""Two-step text-to-image sampling with coalescer networks.

Names are imported when they are first used: ``import coalescer_fast`` alone loads neither torch nor diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import ops
    from .acceleration import accelerate, explain, refresh, restore, warmup
    from .models import CoalescerAutoencoder, CoalescerUNet, DescriptionEncoder
    from .noise import PhiloxGenerator
    from .parity import receipt, verify
    from .pipeline import CoalescerPipeline
    from .scheduler import CoalescerScheduler

__version__ = "0.1.0"

__all__ = [
    "CoalescerAutoencoder",
    "CoalescerPipeline",
    "CoalescerScheduler",
    "CoalescerUNet",
    "DescriptionEncoder",
    "PhiloxGenerator",
    "__version__",
    "accelerate",
    "explain",
    "ops",
    "receipt",
    "refresh",
    "restore",
    "verify",
    "warmup",
]

_MODULES = {
    "CoalescerAutoencoder": ".models",
    "CoalescerPipeline": ".pipeline",
    "CoalescerScheduler": ".scheduler",
    "CoalescerUNet": ".models",
    "DescriptionEncoder": ".models",
    "PhiloxGenerator": ".noise",
    "accelerate": ".acceleration",
    "explain": ".acceleration",
    "ops": ".ops",
    "receipt": ".parity",
    "refresh": ".acceleration",
    "restore": ".acceleration",
    "verify": ".parity",
    "warmup": ".acceleration",
}

if not TYPE_CHECKING:  # a type checker would take __getattr__ as leave for any name

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module = import_module(_MODULES[name], __name__)
        value = globals()[name] = module if _MODULES[name] == f".{name}" else getattr(module, name)
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
