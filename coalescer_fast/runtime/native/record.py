"""Records what a torch module does as the steps of steps.py.

The module's own forward runs once, on tensors without data (torch's device "meta"), under a dispatch mode that sees
every torch op. The module's code is the only description of it: nothing here knows what class it is of. Biases,
residuals and activations join the step before them. An op that no step does is refused, by name.

Images are inputs of the program. What the module computes of its other arguments alone, such as the embedding of a
timestep, is noted as a `Prologue` of torch ops, which run before the program: up to the first linear layer, norm,
attention or convolution, or the first op that also reads what a step has written.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from .pack import Weight
from .steps import FUNCTIONS, HANDLERS, PRODUCTS, Gather, Step, join_gates, without_data
from .value import Unsupported, Value

SHOWN = 4  # names of torch ops in a line of `explain`

Note = TypeVar("Note")


@dataclass(frozen=True)
class Place:
    """Of a tensor in a prologue: the results of its ops follow what it is given."""

    number: int


@dataclass(frozen=True)
class TorchCall:
    """A torch op of a prologue.

    Attributes:
        function: the op.
        leaves: its arguments, flattened; a `Place` for a tensor.
        spec: of the arguments.
        results: where its results go, flattened.
    """

    function: Callable[..., Any]
    leaves: Sequence[Any]
    spec: TreeSpec
    results: Sequence[int]


@dataclass
class Prologue:
    """Torch ops that make a program's inputs of what a module is given.

    Attributes:
        given: the numbers of the tensors that the module is given.
        constants: parameters and other tensors that the ops read, by number.
        calls: the ops, in order.
        sources: the number of each input of the program.
    """

    given: Sequence[int]
    constants: dict[int, Tensor]
    calls: list[TorchCall]
    sources: list[int]

    @property
    def described(self) -> str:
        """For `explain`: how many operations it has, and the names of a few; views of tensors do not count."""
        functions: list[Any] = [call.function for call in self.calls]
        names = [each._schema.name.partition("::")[2] for each in functions if not each.is_view]
        some = list(dict.fromkeys(names))
        if not some:
            return ""
        more = ", ..." if len(some) > SHOWN else ""
        return f", {len(names)} operations in torch before it ({', '.join(some[:SHOWN])}{more})"

    def on(self, device: torch.device) -> Prologue:
        """The same on another device: constants are moved there, and ops make tensors there, also those of the CPU."""

        def moved(leaf: Any) -> Any:
            return device if isinstance(leaf, torch.device) else leaf.to(device) if isinstance(leaf, Tensor) else leaf

        calls = [replace(call, leaves=[moved(leaf) for leaf in call.leaves]) for call in self.calls]
        return replace(self, constants={number: moved(x) for number, x in self.constants.items()}, calls=calls)

    def __call__(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The program's inputs. Floating-point numbers are computed in float32."""
        tensors: dict[int, Any] = dict(zip(self.given, map(_as_recorded, given), strict=True))
        tensors |= self.constants
        for call in self.calls:
            leaves = [tensors[leaf.number] if isinstance(leaf, Place) else leaf for leaf in call.leaves]
            args, kwargs = tree_unflatten(leaves, call.spec)
            for number, result in zip(call.results, tree_leaves(call.function(*args, **kwargs))):
                tensors[number] = result
        return [tensors[number] for number in self.sources]


def _as_recorded(x: Tensor) -> Tensor:
    """With the dtype and, of all but images, the strides that a tensor had while it was recorded."""
    if not x.is_floating_point():
        return x.contiguous()
    return x.float() if x.ndim == 4 else x.float().contiguous()


class _Joined(Exception):
    """A value is read that a later operation has joined; that join must not be."""

    def __init__(self, join: int):
        super().__init__()
        self.join = join


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Notes the steps of what runs on tensors without data.

    A value is known by the storage of its tensors, so that views need no note: whoever reads one looks at its shape and
    strides. A tensor of the prologue is known by itself, and becomes an input of the program when a step reads it.

    Attributes:
        inputs: of the program.
    """

    def __init__(self, copied: MetaCopy, kept_apart: frozenset[int] = frozenset()):
        """``kept_apart``: numbers of joins that are not to be, see `joinable`."""
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.inputs: list[Value] = []
        self._sources: list[int] = []  # of the inputs, in the prologue
        self._copied = copied
        self._names = {_key(tensor): name for tensor, name in copied.names.items()}
        self._values: dict[int, Value] = {}
        self._joined: dict[int, int] = {}  # by which join a value became another
        self._kept_apart, self._joins = kept_apart, 0
        self._unknown: dict[int, str] = {}  # which op gave a tensor that is no value
        self._notes: dict[int, object] = {}
        self._numbers: dict[Step, int] = {}
        self._count = 0  # of numbers given to steps
        self._parts: dict[tuple[int, int, int], Value] = {}
        # of the prologue
        self._given: list[int] = []
        self._places: dict[int, tuple[Tensor, int]] = {}  # by id
        self._place_count = 0
        self._bases: dict[int, Tensor] = {}  # by storage: the tensor that it was made for
        self._promoted: set[int] = set()  # storages of those that a step reads
        self._constants: dict[int, Tensor] = {}
        self._calls: list[TorchCall] = []
        self._read: set[str] = set()
        self._alive: list[Tensor] = list(copied.names)  # while they live, no other storage has their keys

    # What the runtime declares.

    def input(self, like: Tensor, *, image: bool = False, rounded: bool = False) -> Tensor:
        """Declare the next tensor that the module is given, as an input of the program.

        Args:
            like: of its shape; of dtype bool for a mask.
            image: (N, C, H, W) with channels innermost; else contiguous rows (N, ..., C).
            rounded: of the program's dtype; else float32.

        Returns:
            What stands for it while the module is recorded.
        """
        dtype = torch.bool if like.dtype == torch.bool else torch.float32
        layout = torch.channels_last if image else torch.contiguous_format
        tensor = without_data(like.shape, dtype, memory_format=layout)
        self._given.append(self._next_place(tensor))
        self._add_input(tensor, self._given[-1], None if rounded else dtype)
        return tensor

    def given(self, like: Tensor) -> Tensor:
        """Declare the next tensor that the module is given: images are inputs of the program, others of the prologue.

        Returns:
            What stands for it while the module is recorded.
        """
        if like.ndim == 4 and like.is_floating_point():
            return self.input(like, image=True)
        dtype = torch.float32 if like.is_floating_point() else like.dtype
        tensor = without_data(like.shape, dtype)
        self._bases[_key(tensor)] = tensor
        self._given.append(self._next_place(tensor))
        return tensor

    def _add_input(self, tensor: Tensor, number: int, dtype: torch.dtype | None) -> None:
        if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            n, channels, height, width = tensor.shape
        else:
            n, channels, height = tensor.shape[0], tensor.shape[-1] if tensor.ndim > 1 else 1, 1
            width = tensor.numel() // max(n * channels, 1)
        value = Value(n, height, width, channels, dtype, tensor)
        self.inputs.append(value)
        self._sources.append(number)
        self._know(tensor, value)

    # What the handlers of steps.py look tensors up with.

    def value(self, tensor: Tensor) -> Value:
        """The value that the tensor is all or a part of. Raises Unsupported if there is none."""
        key = _key(tensor)
        if key not in self._values and (base := self._bases.get(key)) is not None:
            if base.ndim == 0 or not base.is_contiguous():
                raise Unsupported(f"it computes with a tensor of shape {tuple(base.shape)}")
            if base.dtype not in (torch.float32, torch.bool):
                raise Unsupported(f"it computes with numbers of {base.dtype}")
            self._add_input(base, self._places[id(base)][1], base.dtype)
            self._promoted.add(key)
        found = self._values.get(key)
        if found is None:
            if key in self._joined:
                raise _Joined(self._joined[key])
            raise Unsupported(f"there is no step for {self._unknown.get(key, 'a tensor from elsewhere')}")
        return found

    def whole(self, tensor: Tensor) -> Value:
        """The value that the tensor is all of, channels innermost: (N, C, H, W) or rows (N, ..., C).

        Some of the channels of a value become a value of their own.
        """
        value, first = self.channels_of(tensor)
        channels = tensor.shape[1] if tensor.ndim == 4 else tensor.shape[-1]
        if channels == value.channels:
            return value
        key = id(value), first, channels
        if key not in self._parts:
            self._parts[key] = Gather.record_part(self, tensor, value, first)
        return self._parts[key]

    def channels_of(self, tensor: Tensor) -> tuple[Value, int]:
        """The value whose channels the tensor is, or some of them, and the first of these."""
        value = self.value(tensor)
        order = tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor
        channels, first = order.shape[-1] if order.ndim else 0, int(order.storage_offset())
        # of every dimension but the last, the stride that it would have in all of the value
        dense, stride = order.ndim > 1 and (channels == 1 or order.stride(-1) == 1), value.channels
        for size, own in zip(reversed(order.shape[:-1]), reversed(order.stride()[:-1])):
            dense = dense and (size == 1 or own == stride)
            stride *= size
        if not dense or first + channels > value.channels or stride != value.count:
            raise Unsupported(f"it computes with a part of a tensor, of shape {tuple(tensor.shape)}")
        if tensor.ndim == 4 and order.shape[:3] != (value.n, value.height, value.width):
            raise Unsupported(f"it reshapes an image to {tuple(tensor.shape)}")
        return value, first

    def image(self, tensor: Tensor) -> Value:
        """The value that (N, C, H, W) is all of."""
        if tensor.ndim != 4:
            raise Unsupported(f"it computes with an image of shape {tuple(tensor.shape)}")
        return self.whole(tensor)

    def rows(self, tensor: Tensor) -> Value:
        """The value that (N, ..., C) is all of, also in four dimensions."""
        return self.whole(tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor)

    def row(self, tensor: Tensor, n: int) -> Value:
        """The value that (n, C) is all of."""
        value = self.whole(tensor)
        if tensor.ndim != 2 or value.n != n or value.count != n * value.channels:
            raise Unsupported(f"it scales or shifts by a tensor of shape {tuple(tensor.shape)}")
        return value

    def row_of(self, tensor: Tensor, like: Tensor) -> Value | Tensor:
        """What is broadcast to ``like``, a number for every channel: a value (n, C), or a parameter (C,)."""
        channel = like.ndim - (3 if like.ndim == 4 else 1)
        aligned = tensor.reshape((1,) * (like.ndim - tensor.ndim) + tensor.shape)
        others = {size for dim, size in enumerate(aligned.shape) if dim not in (0, channel)}
        right = aligned.shape[channel] == like.shape[channel] and others <= {1} and channel > 0
        if right and aligned.shape[0] == 1 and self._names.get(_key(tensor)) is not None:
            return self.parameter(tensor).reshape(-1)
        if not right or aligned.shape[0] != like.shape[0]:
            raise Unsupported(f"it broadcasts {tuple(tensor.shape)} to {tuple(like.shape)}")
        return self.row(aligned.flatten(1) if aligned.ndim < 4 else aligned[:, :, 0, 0], like.shape[0])

    def number(self, operand: Any) -> float | None:
        """The number that an operand is, of Python, or the only one of a tensor that is not computed; else None."""
        if not isinstance(operand, Tensor):
            return float(operand)
        if operand.ndim or _key(operand) in self._values:
            return None
        own = self.parameter(operand) if _key(operand) in self._names else operand
        return None if own.is_meta else float(own)

    def parameter(self, tensor: Tensor) -> Tensor:
        """The module's own parameter, or the view of it, that the tensor stands for."""
        weight = self.weight(tensor)
        self._read.add(weight.name)
        return weight.tensor()

    def weight(self, tensor: Tensor) -> Weight:
        """Likewise, without reading it."""
        name = self._names.get(_key(tensor))
        if name is None:
            raise Unsupported("a weight is computed, not given")
        return Weight(name, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), self._copied.own)

    def optional_parameter(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self.parameter(tensor)

    def written(self, value: Value) -> int:
        """The number of the step that writes the value, -1 for an input."""
        return -1 if value.step is None else self._numbers[value.step]

    def joinable(self, value: Value) -> bool:
        """Whether what follows a value may join the step that writes it: nobody else reads the value.

        Nobody has until now. If the module reads it later on, it is recorded anew, and this join is not to be.
        """
        self._joins += 1
        return not value.readers and self._joins not in self._kept_apart

    # What they tell it.

    def add(self, step: Step, *results: Tensor) -> None:
        """Note a step, whose outputs the results are; without results, those who know its outputs alone read them."""
        self._number(step)
        if results:
            for result, value in zip(results, step.outputs, strict=True):
                self._know(result, value)

    def _number(self, step: Step) -> None:
        self._numbers[step] = self._count
        self._count += 1

    def alias(self, result: Tensor, value: Value) -> None:
        """Note that the result is the value."""
        self._know(result, value)

    def join(self, value: Value, result: Tensor, operand: Value | None = None) -> None:
        """Note that the step that writes the value now gives the result, and no longer what it gave before.

        Args:
            value: of which `joinable` was true.
            result: what it is from now on.
            operand: what the step reads in addition.
        """
        assert value.step is not None
        if operand is not None:
            operand.readers.append(value.step)
            if self.written(operand) > self.written(value):
                self._number(value.step)  # nobody reads it yet, so it can as well run now
        for key in [key for key, known in self._values.items() if known is value]:
            del self._values[key]
            self._joined[key] = self._joins
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
        self._joined.pop(_key(tensor), None)

    # What it sees.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self._with_stand_ins(args, kwargs or {})
        native, mutable = self._native(args, kwargs), func._schema.is_mutable
        handler = HANDLERS.get(func) if native or func in PRODUCTS else None
        if handler is not None and mutable:
            self._check_write(func, args[0])
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and not all(
            each.is_meta for each in tree_leaves(result) if isinstance(each, Tensor)
        ):
            raise Unsupported(f"it draws random numbers, by {func}")
        if handler is None:
            if mutable and not self._fills(func, args):
                raise Unsupported(f"there is no step for {func}")
            if native:
                # No error yet: reshapes are such ops, and what nobody computes with does not matter.
                for each in tree_leaves(result):
                    if isinstance(each, Tensor) and _key(each) not in self._values:
                        self._alive.append(each)
                        self._unknown[_key(each)] = str(func)
            else:
                self._add_call(func, args, kwargs, result)
            return result
        if isinstance(result, Tensor) and result.ndim == 4 and not mutable:
            result = torch.empty_like(result, memory_format=torch.channels_last)  # as the steps will have it
        defaults = _defaults(func)
        other = handler(self, result, **{**defaults, **dict(zip(defaults, args)), **kwargs})
        return result if other is None else other

    def _with_stand_ins(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments, with tensors without data in the place of others that are not single numbers."""
        leaves, spec = tree_flatten((args, kwargs))
        some = [isinstance(leaf, Tensor) and not leaf.is_meta and leaf.ndim > 0 for leaf in leaves]
        if any(some) and not all(each or not isinstance(leaf, Tensor) for each, leaf in zip(some, leaves)):
            leaves = [self.constant(leaf) if each else leaf for each, leaf in zip(some, leaves)]
            args, kwargs = tree_unflatten(leaves, spec)
        return args, kwargs

    def constant(self, tensor: Tensor) -> Tensor:
        """What stands for a real tensor in the prologue."""
        stand_in = without_data(tensor.shape, tensor.dtype)
        self._constants[self._next_place(stand_in)] = tensor.contiguous()
        self._bases[_key(stand_in)] = stand_in
        return stand_in

    def _native(self, *arguments: Any) -> bool:
        """Whether a value is among the arguments that is not of the prologue, too, or what was computed of one."""
        keys = [_key(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        return any(
            key not in self._promoted and (key in self._values or key in self._joined or key in self._unknown)
            for key in keys
        )

    def _check_write(self, func: Any, tensor: Tensor) -> None:
        """Raise Unsupported if a write to the tensor would be seen elsewhere than in the tensor itself."""
        value = self._values.get(_key(tensor))
        others = [key for key, known in self._values.items() if known is value and key != _key(tensor)]
        if value is None or value.step is None or others or tensor.numel() != value.count:
            raise Unsupported(f"it writes to what is also read elsewhere, by {func}")

    def _fills(self, func: Any, args: Any) -> bool:
        """Whether an op that writes to a tensor writes to one that the prologue has just made, or to a real one."""
        written = args[0] if args else None
        if not isinstance(written, Tensor):
            return False
        base, (_, number) = self._bases.get(_key(written)), self._places.get(id(written), (None, 0))
        return not written.is_meta or (base is written and number == self._place_count)

    # The prologue.

    def _next_place(self, tensor: Tensor) -> int:
        self._place_count += 1
        self._places[id(tensor)] = tensor, self._place_count
        return self._place_count

    def _place(self, leaf: Any) -> Any:
        """Where a tensor among an op's arguments is; anything else is itself, and a device without data the CPU."""
        if isinstance(leaf, torch.device):
            return torch.device("cpu") if leaf.type == "meta" else leaf
        if not isinstance(leaf, Tensor) or not leaf.is_meta:
            return leaf
        if id(leaf) not in self._places:
            if _key(leaf) not in self._names:
                raise Unsupported("it computes with a tensor from elsewhere")
            own = self.parameter(leaf)
            self._constants[self._next_place(leaf)] = own.float() if own.is_floating_point() else own
        return Place(self._places[id(leaf)][1])

    def _add_call(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        results = [each for each in tree_leaves(result) if isinstance(each, Tensor) and each.is_meta]
        if not results or all(_key(each) in self._names for each in results):
            return  # of real tensors, or a view of a parameter
        leaves, spec = tree_flatten((args, kwargs))
        try:
            leaves = [self._place(leaf) for leaf in leaves]
        except Unsupported:
            self._alive += results
            self._unknown |= {_key(each): str(func) for each in results}
            return
        for each in results:
            self._bases.setdefault(_key(each), each)
        self._calls.append(TorchCall(func, leaves, spec, [self._next_place(each) for each in results]))

    def recording(self, results: list[Tensor]) -> Recording:
        """What was recorded of a module that gave these results."""
        outputs = [(self.value(result), result) for result in results]
        steps, read = sorted(self._numbers, key=self._numbers.__getitem__), {value for value, _ in outputs}
        for step in reversed(list(steps)):
            if not any(value.readers or value in read for value in step.outputs):
                steps.remove(step)
                for value in step.outputs:
                    value.step = None
                for value in step.inputs:
                    value.readers = [reader for reader in value.readers if reader is not step]
        join_gates(steps, read)
        # inputs that a step has come to do without
        used = [
            number in self._given or bool(value.readers) or value in read
            for value, number in zip(self.inputs, self._sources)
        ]
        inputs = [value for value, each in zip(self.inputs, used) if each]
        sources = [number for number, each in zip(self._sources, used) if each]
        wanted, calls = set(sources), []
        for call in reversed(self._calls):
            if not wanted.isdisjoint(call.results):
                calls.append(call)
                wanted.update(leaf.number for leaf in call.leaves if isinstance(leaf, Place))
        constants = {number: tensor for number, tensor in self._constants.items() if number in wanted}
        prologue = Prologue(self._given, constants, calls[::-1], sources)
        return Recording(steps, inputs, outputs, prologue, self._read)


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
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return self.recorder.constant(func(*args, **{**kwargs, "device": "cpu"}))
        if handler := FUNCTIONS.get(func):
            try:
                return handler(self.recorder, *args, **kwargs)
            except Unsupported:
                if self.recorder._native(args, kwargs):
                    raise
                # of the prologue alone: torch can do it
        return func(*args, **kwargs)


class MetaCopy:
    """A copy of a module whose parameters and buffers have no data, which can be recorded any number of times.

    Attributes:
        module: the copy, for inference; it may be changed.
        names: of each of its parameters and buffers, in the module.
    """

    def __init__(
        self, module: nn.Module, evaluation: bool = True, strides: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    ):
        """Raises Unsupported if the module cannot be copied.

        Args:
            module: the module.
            evaluation: whether the copy is in evaluation mode, and not in the module's own.
            strides: those of parameters that the module does not have any more.
        """
        memo: dict[int, Any] = {}
        self.names: dict[Tensor, str] = {}
        self._own: dict[str, Tensor] = dict((*module.named_parameters(), *module.named_buffers()))
        for name, p in self._own.items():
            dtype = torch.float32 if p.is_floating_point() else p.dtype
            empty = torch.empty_strided(p.shape, strides.get(name, p.stride()), dtype=dtype, device="meta")
            memo[id(p)] = nn.Parameter(empty, requires_grad=False) if isinstance(p, nn.Parameter) else empty
            self.names[memo[id(p)]] = name
        own_forward = module.__dict__.get("forward")
        if own_forward is not None:  # of an accelerated module: what is recorded is the class's
            memo[id(own_forward)] = None
        try:
            self.module: Any = copy.deepcopy(module, memo)
        except Exception as error:  # of whatever has been put into it
            raise Unsupported(f"it cannot be copied ({_first_line(error)})") from error
        if own_forward is not None:
            del self.module.__dict__["forward"]
        if evaluation:
            self.module.eval()
        self._freed = set(strides)

    def own(self, name: str) -> Tensor:
        """The module's own parameter or buffer."""
        if name in self._freed:
            raise ValueError(f"{name} was freed")
        own = self._own[name].detach()
        if not own.is_neg():
            return own
        # a lazy negation has no memory of its own
        return torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=own.device).copy_(own)

    def free(self, name: str) -> None:
        """Forget a parameter, which is never read again."""
        del self._own[name]
        self._freed.add(name)

    def attributes(self) -> list[dict[str, Any]]:
        """What the modules have now."""
        return [dict(vars(each)) for each in self.module.modules()]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@dataclass
class Recording:
    """What a module does, for inputs of certain shapes.

    Attributes:
        steps: in the order in which they run.
        inputs: in the order in which they were declared.
        outputs: with the tensors that the module gave for them, which may be views.
        prologue: what makes the inputs of what the module is given.
        read: names of parameters that are read otherwise than to be packed.
    """

    steps: list[Step]
    inputs: list[Value]
    outputs: list[tuple[Value, Tensor]]
    prologue: Prologue
    read: set[str]


def record_module(copied: MetaCopy, run: Callable[[Any, Recorder], Iterable[Tensor]]) -> Recording:
    """Record what ``run(module, recorder)`` does.

    Args:
        copied: the module.
        run: calls the copy with tensors that `Recorder.input` or `Recorder.given` gave, and returns the outputs.

    Raises:
        Unsupported: no step does something that the module does.
    """
    kept_apart: frozenset[int] = frozenset()
    while True:
        recorder = Recorder(copied, kept_apart)
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
            except _Joined as wrong:
                kept_apart |= {wrong.join}
                continue
            except Exception as error:  # of a module that computes with data, or with tensors of another device
                raise Unsupported(f"it cannot be followed ({_first_line(error)})") from error
        try:
            return recorder.recording(results)
        except _Joined as wrong:
            kept_apart |= {wrong.join}
        finally:
            # frames of torch's own keep the recorder until the cyclic collector runs; the parameters must not wait
            vars(recorder).clear()
