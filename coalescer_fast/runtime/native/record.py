"""Records what a torch module does as the steps of steps.py.

The module's own forward runs once, on tensors without data (torch's device "meta"), under a dispatch mode that sees
every torch op. The module's code is the only description of it: nothing here knows what class it is of. Biases,
residuals and activations join the step before them. An op that no step does is refused, by name.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .steps import FUNCTIONS, HANDLERS, Step
from .value import Unsupported, Value

Note = TypeVar("Note")


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Notes the steps of what runs on tensors without data.

    A tensor is known by its storage, so that views need no note: whoever reads one looks at its shape and strides.

    Attributes:
        steps: in the order in which they run.
        inputs: of the program.
    """

    def __init__(self, parameters: dict[Tensor, Tensor]):
        """``parameters``: those that the module has while it is recorded, without data, and the module's own."""
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.steps: list[Step] = []
        self.inputs: list[Value] = []
        self._parameters = {_key(each): own for each, own in parameters.items()}
        self._values: dict[int, Value] = {}
        self._unknown: dict[int, str] = {}  # which op gave a tensor that is no value
        self._notes: dict[int, object] = {}
        self._numbers: dict[Step, int] = {}
        self._alive: list[Tensor] = list(parameters)  # while they live, no other storage has their keys

    def input(self, like: Tensor, *, image: bool = False, rounded: bool = False) -> Tensor:
        """Declare the program's next input.

        Args:
            like: of its shape; of dtype bool for a mask.
            image: (N, C, H, W) with channels innermost; else contiguous rows (N, ..., C).
            rounded: of the program's dtype; else float32.

        Returns:
            What stands for it while the module is recorded.
        """
        dtype = torch.bool if like.dtype == torch.bool else torch.float32
        layout = torch.channels_last if image else torch.contiguous_format
        tensor = torch.empty(like.shape, dtype=dtype, device="meta", memory_format=layout)
        n, channels, height, width = (
            like.shape if image else (like.shape[0], like.shape[-1], 1, like[0, ..., 0].numel())
        )
        value = Value(n, height, width, channels, None if rounded else dtype, tensor)
        self.inputs.append(value)
        self._know(tensor, value)
        return tensor

    # What the handlers of steps.py look tensors up with.

    def value(self, tensor: Tensor) -> Value:
        """The value that the tensor is all or a part of. Raises Unsupported if there is none."""
        found = self._values.get(_key(tensor))
        if found is None:
            raise Unsupported(f"there is no step for {self._unknown.get(_key(tensor), 'a tensor from elsewhere')}")
        return found

    def whole(self, tensor: Tensor) -> Value:
        """The value that the tensor is all of, channels innermost: (N, C, H, W) or rows (N, ..., C)."""
        value = self.value(tensor)
        order = tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor
        if not order.is_contiguous() or order.shape[-1] != value.channels or order.numel() != value.count:
            raise Unsupported(f"it computes with a part of a tensor of shape {tuple(tensor.shape)}")
        if tensor.ndim == 4 and order.shape[:3] != (value.n, value.height, value.width):
            raise Unsupported(f"it reshapes an image to {tuple(tensor.shape)}")
        return value

    def image(self, tensor: Tensor) -> Value:
        """The value that (N, C, H, W) is all of."""
        if tensor.ndim != 4:
            raise Unsupported(f"it computes with an image of shape {tuple(tensor.shape)}")
        return self.whole(tensor)

    def row(self, tensor: Tensor, n: int) -> Value:
        """The value that (n, C) is all of."""
        value = self.whole(tensor)
        if tensor.ndim != 2 or value.n != n or value.count != n * value.channels:
            raise Unsupported(f"it scales or shifts by a tensor of shape {tuple(tensor.shape)}")
        return value

    def parameter(self, tensor: Tensor) -> Tensor:
        """The module's own parameter, or the view of it, that the tensor stands for."""
        own = self._parameters.get(_key(tensor))
        if own is None:
            raise Unsupported("a weight is computed, not given")
        # the same strides in another storage, where it may begin further on
        offset = own.storage_offset() + tensor.storage_offset()
        return own.detach().as_strided(tensor.shape, tensor.stride(), offset)

    def optional_parameter(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self.parameter(tensor)

    def written(self, value: Value) -> int:
        """The number of the step that writes the value, -1 for an input."""
        return -1 if value.step is None else self._numbers[value.step]

    # What they tell it.

    def add(self, step: Step, *results: Tensor) -> None:
        """Note a step, whose outputs the results are."""
        self._numbers[step] = len(self.steps)
        self.steps.append(step)
        for result, value in zip(results, step.outputs, strict=True):
            self._know(result, value)

    def join(self, value: Value, result: Tensor) -> None:
        """Note that the step that writes the value now gives the result, and no longer what it gave before."""
        for key in [key for key, known in self._values.items() if known is value]:
            del self._values[key]
        self._know(result, value)

    def note(self, result: Tensor, description: str, note: object) -> None:
        """Note what an op gives that has a step together with a later op alone, see `noted`.

        Args:
            result: no value: whoever computes with it is told that there is no step for the description.
            description: of the op, in words.
            note: what the later op has to know.
        """
        self._alive.append(result)
        self._unknown[_key(result)] = description
        self._notes[_key(result)] = note

    def noted(self, tensor: Tensor, kind: type[Note]) -> Note | None:
        """The note of this class that `note` was given, if it was."""
        found = self._notes.get(_key(tensor))
        return found if isinstance(found, kind) else None

    def _know(self, tensor: Tensor, value: Value) -> None:
        self._alive.append(tensor)
        self._values[_key(tensor)] = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        handler, mutable = HANDLERS.get(func), func._schema.is_mutable
        if handler is None:
            if mutable and self._known(args, kwargs):
                raise Unsupported(f"there is no step for {func}")
            # No error yet: reshapes are such ops, and what nobody computes with does not matter.
            if isinstance(result, Tensor) and (key := _key(result)) not in self._values and key not in self._parameters:
                self._alive.append(result)
                self._unknown[key] = str(func)
            return result
        if isinstance(result, Tensor) and result.ndim == 4 and not mutable:
            result = torch.empty_like(result, memory_format=torch.channels_last)  # as the steps will have it
        defaults = _defaults(func)
        handler(self, result, **{**defaults, **dict(zip(defaults, args)), **(kwargs or {})})
        return result

    def _known(self, *arguments: Any) -> bool:
        """Whether a value or a parameter is among the arguments."""
        keys = (_key(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
        return any(key in self._values or key in self._parameters for key in keys)


def _key(tensor: Tensor) -> int:
    """The identity of its storage."""
    return int(tensor.untyped_storage()._cdata)


@functools.cache
def _defaults(operation: Any) -> dict[str, Any]:
    """A torch op's arguments, in order, and their defaults."""
    arguments = operation._schema.arguments
    return {"input" if each.name == "self" else each.name: each.default_value for each in arguments}


class _Functions(TorchFunctionMode):
    """Sees the functions that torch would take apart before a `Recorder` could see them."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if handler := FUNCTIONS.get(func):
            return handler(self.recorder, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class MetaCopy:
    """A copy of a module whose parameters have no data, which can be recorded any number of times.

    Attributes:
        module: the copy, for inference; it may be changed.
        parameters: each of its parameters, and the original that it stands for.
    """

    def __init__(self, module: nn.Module):
        """Raises Unsupported if the module cannot be copied."""
        memo: dict[int, Any] = {}
        self.parameters: dict[Tensor, Tensor] = {}
        for p in module.parameters():
            dtype = torch.float32 if p.is_floating_point() else p.dtype
            empty = torch.empty_strided(p.shape, p.stride(), dtype=dtype, device="meta")
            memo[id(p)] = nn.Parameter(empty, requires_grad=False)
            # a lazy negation has no memory of its own
            own = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype).copy_(p.detach()) if p.is_neg() else p
            self.parameters[memo[id(p)]] = own
        try:
            self.module: Any = copy.deepcopy(module, memo).eval()
        except Exception as error:  # of whatever has been put into it
            raise Unsupported(f"it cannot be copied ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@dataclass
class Recording:
    """What a module does, for inputs of certain shapes.

    Attributes:
        steps: in the order in which they run.
        inputs: in the order in which they were declared.
        outputs: with the tensors that the module gave for them, which may be views.
    """

    steps: list[Step]
    inputs: list[Value]
    outputs: list[tuple[Value, Tensor]]


def record_module(copied: MetaCopy, run: Callable[[Any, Recorder], Iterable[Tensor]]) -> Recording:
    """Record what ``run(module, recorder)`` does.

    Args:
        copied: the module.
        run: calls the copy with tensors that `Recorder.input` gave, and returns the outputs.

    Raises:
        Unsupported: no step does something that the module does.
    """
    recorder = Recorder(copied.parameters)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        _Functions(recorder),
        recorder,
    ):
        try:
            results = list(run(copied.module, recorder))
        except Unsupported:
            raise
        except Exception as error:  # of a module that computes with data, or with tensors of another device
            raise Unsupported(f"it cannot be followed ({_first_line(error)})") from error
    outputs = [(recorder.value(result), result) for result in results]
    if any(value.readers for value, _ in outputs):
        raise Unsupported("it gives something that it also computes with")
    for value, result in outputs:
        if result.numel() == value.count:
            value.tensor = result
    return Recording(recorder.steps, recorder.inputs, outputs)
