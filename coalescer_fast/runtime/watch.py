"""Whether a network has changed since a runtime prepared it, and what in it only its own code can run."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..ops import native_library

# All bytes of a tensor of up to WHOLE are looked at, and of a larger one SAMPLES words of 8 bytes at equal distances.
WHOLE, SAMPLES = 2048, 32
_forward = operator.attrgetter("forward")
STANDARD = frozenset(nn.Module().__dict__)  # what every module has
PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
STOCHASTIC = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
REGISTRIES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_version = operator.attrgetter("_version")


class Watch:
    """Tells whether networks have changed since it was made. It is cheap enough to be asked before every call.

    It sees other parameters, buffers, submodules, classes, attributes (``eps``, ``num_heads``, an adapter's scale) or
    hooks, a patched ``forward``, and every write that torch counts. Of writes on a CPU that torch does not count
    (through ``.data``, by numpy or a fused optimiser) it sees any change of a tensor of up to `WHOLE` bytes, and a
    change at one of `SAMPLES` places of a larger one. `coalescer_fast.refresh` is for the others.
    """

    def __init__(self, *networks: nn.Module):
        self.networks = networks
        modules = [module for network in networks for module in network.modules()]
        self._modules = modules
        registries = [module.__dict__[name] for module in modules for name in REGISTRIES]
        self._empty = [each for each in registries if not each]
        self._filled = [each for each in registries if each]
        own = list(chain.from_iterable(map(_within, modules)))
        self._attributes = [module.__dict__ for module in modules] + [
            each for each in own if not isinstance(each, Tensor)
        ]
        self._tensors = [t for network in networks for t in chain(network.parameters(), network.buffers())]
        self._tensors += [each for each in own if isinstance(each, Tensor)]
        self._content = _Content(self._tensors)
        # inference tensors count no writes; the contents of small ones are looked at as a whole
        self._counting = [t for t in self._tensors if not (t.is_inference() or id(t) in self._content.whole)]
        self._types = list({type(module): None for module in modules})
        # of a package's class only the forward is looked at, which is all that users patch
        self._own_types = [
            each for each in self._types if not each.__module__.startswith(("torch.", "diffusers.", "coalescer_fast."))
        ]
        self._seen_types = [dict(vars(each)) for each in self._own_types]
        self._seen_attributes = [each.copy() for each in self._attributes]
        self._seen = self._state()

    def _state(self) -> list[list[Any]]:
        """All but attributes and contents, as lists, which are fast to make and to compare."""
        return [
            list(chain.from_iterable(map(dict.values, self._filled))),
            list(map(type, self._modules)),
            list(map(_forward, self._types)),
            [len(torch_module._global_forward_hooks), len(torch_module._global_forward_pre_hooks)],
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(_version, self._counting)),
        ]

    def changed(self, *networks: nn.Module) -> bool:
        """Whether ``networks`` are others than those that it was made of, or have changed since."""
        if (
            len(networks) != len(self.networks)
            or any(map(operator.is_not, networks, self.networks))
            or any(self._empty)
        ):
            return True
        try:
            # an object is equal to itself without being compared
            if not all(map(operator.eq, self._attributes, self._seen_attributes)) or self._state() != self._seen:
                return True
            if not all(map(operator.eq, map(vars, self._own_types), self._seen_types)):
                return True
        except Exception:  # tensors and arrays do not compare to a truth value
            return True
        return self._content.changed()  # last, because it reads memory at the addresses that were compared above


def _within(module: nn.Module) -> Iterator[Any]:
    """List the dicts, lists, sets and tensors among a module's own attributes, also within each other.

    An adapter's scales are in such a dict. The attributes of plain objects count as dicts.
    """
    found: dict[int, Any] = {}
    todo = [value for name, value in module.__dict__.items() if name not in STANDARD]
    while todo:
        value = todo.pop()
        if id(value) in found or isinstance(value, (nn.Module, type)):
            continue
        if isinstance(value, SimpleNamespace):
            todo.append(vars(value))
        elif type(value) in (dict, list, set, tuple):
            todo += value.values() if isinstance(value, dict) else value
        if type(value) in (dict, list, set) or isinstance(value, Tensor):
            found[id(value)] = value
            yield value


class _Content:
    """A hash of parts of what tensors on the CPU hold."""

    def __init__(self, tensors: list[Tensor]):
        here = [
            t for t in tensors if t.device.type == "cpu" and t.layout == torch.strided and t.numel() and t.data_ptr()
        ]
        spans = [(t.data_ptr(), _extent(t)) for t in here]
        self.whole = {id(t) for t, (_, size) in zip(here, spans) if size <= WHOLE}
        self.hash: Callable[[], int] = (
            _native_hash(spans) if not native_library.unavailable() else lambda: _plain_hash(spans)
        )
        self.seen = self.hash()

    def changed(self) -> bool:
        return self.hash() != self.seen


def _extent(t: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    return (sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) + 1) * t.element_size()


def _native_hash(spans: list[tuple[int, int]]) -> Callable[[], int]:
    call, result = native_library.function("cf_cpu_fingerprint"), ctypes.c_uint64()
    table = (ctypes.c_int64 * (2 * len(spans)))(*chain.from_iterable(spans))
    packed = (ctypes.c_int64 * 5)(ctypes.addressof(table), len(spans), WHOLE, SAMPLES, ctypes.addressof(result))
    arguments = bytes(packed)

    def run(kept: object = table) -> int:
        call(arguments)
        return result.value

    return run


def _plain_hash(spans: list[tuple[int, int]]) -> int:
    """Hash the same places without the native library, slowly."""
    words = []
    for address, size in spans:
        if size <= WHOLE or size < 8 * SAMPLES:
            words.append(ctypes.string_at(address, size))
        else:
            count = size // 8
            words += [ctypes.string_at(address + 8 * (k * (count - 1) // (SAMPLES - 1)), 8) for k in range(SAMPLES)]
    return hash(b"".join(words))


def fingerprints(network: nn.Module) -> dict[str, tuple[object, ...]]:
    """What tells whether a parameter or buffer has changed, by name. It sees of writes what `Watch` sees."""
    found: dict[str, tuple[object, ...]] = {}
    for name, t in chain(network.named_parameters(), network.named_buffers()):
        content = _Content([t])
        found[name] = id(t), t.data_ptr(), None if t.is_inference() else t._version, content.seen
    return found


def foreign(network: nn.Module, own_forward: object = None) -> str:
    """Find what only the network's own code can run: hooks, or a patched ``forward``, as of offloading.

    Args:
        network: the network.
        own_forward: what stands in the place of the network's own forward, if that is no patch of the user's. Hooks of
            the network itself then run around it.

    Returns:
        The first of it, in words, or "".
    """
    for name, module in network.named_modules():
        where = name or type(module).__name__
        around = module is network and own_forward is not None
        if not around and (module._forward_hooks or module._forward_pre_hooks):
            return f"{where} has a forward hook"
        if module.__dict__.get("forward", own_forward if around else None) is not (own_forward if around else None):
            return f"the forward of {where} is patched"
        if module.training and isinstance(module, STOCHASTIC) and getattr(module, "p", 1) > 0:
            return f"{where} is in training mode"
        for key, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None and (type(tensor) not in PLAIN_TENSORS or tensor.layout != torch.strided):
                return f"{where}.{key} is a {type(tensor).__name__} of {tensor.layout}"
            if tensor is not None and tensor.is_meta:
                return f"{where}.{key} has no data, on device meta"
    return ""
