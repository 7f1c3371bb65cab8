"""What may change in a network between two calls."""

from __future__ import annotations

from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
PLAIN = (bool, int, float, str, tuple, type(None))


class Watch:
    """Networks as they are now; `changed`: whether they are so no longer."""

    def __init__(self, *networks: nn.Module):
        self.networks = networks
        self.state = self._now()

    def changed(self) -> bool:
        return self._now() != self.state

    def _now(self) -> list[Any]:
        found: list[Any] = []
        for network in self.networks:
            for module in network.modules():
                found += [type(module), *(len(module.__dict__[kind]) for kind in HOOKS)]
                found += [(name, value) for name, value in module.__dict__.items() if isinstance(value, PLAIN) and name != "backend"]
                found.append(id(module.__dict__.get("forward")))
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    if tensor is not None:
                        found.append((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version))
        return found


def foreign(network: nn.Module) -> str:
    """What of the user's stands in a network, in words, or ""."""
    for name, module in network.named_modules():
        where = name or type(module).__name__
        if any(module.__dict__[kind] for kind in HOOKS):
            return f"{where} has a forward hook"
        if "forward" in module.__dict__:
            return f"the forward of {where} is patched"
    return ""
