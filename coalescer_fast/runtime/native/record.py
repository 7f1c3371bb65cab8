"""What a network does, noted as steps that csrc/cpu/network.h has.

`record` runs a network once on tensors without data. Biases, residuals and ReLUs join the convolution before them; what has no step is
refused. The network's own code is the only description of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ... import ops  # noqa: F401 (registers the ops)

aten = torch.ops.aten
CONVOLUTION, GROUP_NORM_SILU, GATHER, ATTENTION, DUAL_HEAD, LAYER_NORM, GATE, POINTWISE, REPLACE_ZERO_ROWS = range(
    9
)  # cf_step_kind
IDENTITY, SILU, TANH = range(3)  # cf_function
BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.uint8: 1, torch.bool: 1}


class Unsupported(Exception):
    """The network does something that no step does, and what."""


@dataclass(eq=False)
class Value:
    """(n, height, width, channels) in memory, or what a caller gives or takes, whose ``tensor`` then says how it lies there."""

    n: int
    height: int
    width: int
    channels: int
    dtype: Any = None  # None: the program's, until it is arranged
    tensor: Tensor | None = None
    step: Step | None = None  # that writes it
    readers: list[Step] = field(default_factory=list)
    border: int = 0
    padded: int = 0  # channels with those that are added
    address: int = 0

    def __post_init__(self) -> None:
        self.padded = self.padded or self.channels

    @property
    def pixel(self) -> int:
        return self.padded * BYTES[self.dtype]

    @property
    def row(self) -> int:
        return (self.width + 2 * self.border) * self.pixel

    @property
    def count(self) -> int:
        return self.n * self.height * self.width * self.channels

    @property
    def bytes(self) -> int:
        return self.n * (self.height + 2 * self.border) * self.row


@dataclass(eq=False)
class Step:
    """y: what it writes first; reads: the values that it reads, None for one that is not given."""

    kind: int
    y: Value
    reads: list[Value | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    also: Value | None = None  # that it writes

    def __post_init__(self) -> None:
        for value in self.read:
            value.readers.append(self)

    @property
    def read(self) -> list[Value]:
        return [value for value in self.reads if value is not None]

    @property
    def all(self) -> list[Value]:
        return [self.y, *([] if self.also is None else [self.also]), *self.read]


class Recorder(TorchDispatchMode):
    """Notes the steps of what runs on tensors without data. A tensor is known by its storage, so that views need no note."""

    def __init__(self, parameters: dict[Tensor, Tensor]):
        super().__init__()
        self.parameters = {key.untyped_storage()._cdata: real for key, real in parameters.items()}
        self.values: dict[int, Value] = {}
        self.unknown: dict[int, str] = {}  # what gave a tensor that is no value
        self.gates: dict[int, Tensor] = {}  # what a GELU is of
        self.tests: dict[
            int, tuple[Tensor, bool]
        ] = {}  # what is compared with 0, and whether all of a row's elements are
        self.alive: list[Any] = list(parameters)  # storages are told apart by their addresses
        self.steps: list[Step] = []
        self.inputs: list[Value] = []

    def given(self, like: Tensor, images: bool = False, own: bool = False) -> Tensor:
        """An input of the program of this shape: images (N, C, H, W) with channels innermost, or contiguous rows; float32, bool for a mask,
        or the program's ``own`` dtype."""
        dtype = torch.bool if like.dtype == torch.bool else torch.float32
        layout = torch.channels_last if images else torch.contiguous_format
        tensor = torch.empty(like.shape, dtype=dtype, device="meta", memory_format=layout)
        n, channels, height, width = (
            like.shape if images else (like.shape[0], like.shape[-1], 1, like[0, ..., 0].numel())
        )
        value = Value(n, height, width, channels, None if own else dtype, tensor)
        self.inputs.append(value)
        return self._know(tensor, value)

    def _know(self, tensor: Tensor, value: Value) -> Tensor:
        self.alive.append(tensor)
        self.values[tensor.untyped_storage()._cdata] = value
        return tensor

    def _forget(self, value: Value) -> None:
        """What is known as the value will be another: nobody may read it any more."""
        for key in [key for key, known in self.values.items() if known is value]:
            del self.values[key]

    def value(self, tensor: Tensor) -> Value:
        found = self.values.get(tensor.untyped_storage()._cdata)
        if found is None:
            function = self.unknown.get(tensor.untyped_storage()._cdata, "a tensor from elsewhere")
            raise Unsupported(f"there is no step for {function}")
        return found

    def whole(self, tensor: Tensor) -> Value:
        """The value that the tensor is all of, channels innermost."""
        value = self.value(tensor)
        order = tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor
        if not order.is_contiguous() or order.shape[-1] != value.channels or order.numel() != value.count:
            raise Unsupported(f"it computes with a part of a tensor of shape {tuple(tensor.shape)}")
        if tensor.ndim == 4 and order.shape[:3] != (value.n, value.height, value.width):
            raise Unsupported(f"it reshapes an image to {tuple(tensor.shape)}")
        return value

    def image(self, tensor: Tensor) -> Value:
        """`whole` of (N, C, H, W)."""
        if tensor.ndim != 4:
            raise Unsupported(f"it computes with an image of shape {tuple(tensor.shape)}")
        return self.whole(tensor)

    def row(self, tensor: Tensor, n: int) -> Value:
        """`whole` of (n, C)."""
        value = self.whole(tensor)
        if tensor.ndim != 2 or value.n != n or value.count != n * value.channels:
            raise Unsupported(f"it scales or shifts by a tensor of shape {tuple(tensor.shape)}")
        return value

    def real(self, parameter: Tensor | None) -> Tensor | None:
        """What stands for it in the network, or for a view of it."""
        if parameter is None:
            return None
        found = self.parameters.get(parameter.untyped_storage()._cdata)
        if found is None:
            raise Unsupported("a weight is computed, not given")
        # the same strides in another storage, where it may begin further on
        return found.detach().as_strided(
            parameter.shape, parameter.stride(), found.storage_offset() + parameter.storage_offset()
        )

    def add(self, step: Step) -> None:
        for value in (step.y, step.also):
            if value is not None:
                value.step = step
        self.steps.append(step)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable and func not in HANDLERS and self._known(args, kwargs):
            raise Unsupported(f"there is no step for {func}")
        if handler := HANDLERS.get(func):
            if isinstance(result, Tensor) and result.ndim == 4 and not func._schema.is_mutable:
                result = torch.empty_like(result, memory_format=torch.channels_last)  # as the steps will have it
            bound = {a.name: a.default_value for a in func._schema.arguments}
            bound |= dict(zip(bound, args)) | (kwargs or {})
            handler(self, result, **bound)
        elif isinstance(result, Tensor):
            key = result.untyped_storage()._cdata
            if key not in self.values and key not in self.parameters:
                self.alive.append(result)
                self.unknown[key] = str(func)
        return result

    def _known(self, *arguments: Any) -> bool:
        """Whether a value or a parameter is among the arguments."""
        keys = (leaf.untyped_storage()._cdata for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
        return any(key in self.values or key in self.parameters for key in keys)

    # What has a step. Every function is given the result, on no device, and the arguments.

    def convolution(
        self, y: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, **rest: Any
    ) -> None:
        kernel, real, source = tuple(weight.shape[2:]), self.real(weight), self.image(input)
        plain = {"dilation": [1, 1], "transposed": False, "output_padding": [0, 0], "groups": 1}
        if (
            rest != plain
            or kernel not in ((1, 1), (3, 3))
            or list(padding) != [kernel[0] // 2] * 2
            or stride[0] != stride[1]
        ):
            raise Unsupported(f"it has a convolution {kernel} with stride {stride}, padding {padding}, {rest}")
        self._convolve(y, source, real, self.real(bias), stride[0])

    def _convolve(self, y: Tensor, source: Value, weight: Any, bias: Tensor | None, stride: int = 1) -> None:
        height, width = ((side + stride - 1) // stride for side in (source.height, source.width))
        value = Value(source.n, height, width, weight.shape[0])
        attributes = {"weight": weight, "bias": bias, "stride": stride, "relu": 0}
        self.add(Step(CONVOLUTION, value, [source, None], attributes))
        self._know(y, value)

    def linear(self, x: Tensor, layer_weight: Tensor, bias: Tensor | None = None) -> Tensor:
        weight: Any = self.real(layer_weight)
        y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32, device="meta")
        self._convolve(y, self.whole(x), weight[:, :, None, None], self.real(bias))
        return y

    def group_norm_silu(
        self, y: Tensor, x: Tensor, skip: Tensor | None, scale: Tensor | None, shift: Tensor | None, **rest: Any
    ) -> None:
        rest |= {name: self.real(rest[name]) for name in ("weight", "bias", "pre_bias")}
        source = self.image(x)
        reads = [source, None if skip is None else self.image(skip)]
        reads += [None if t is None else self.row(t, source.n) for t in (scale, shift)]
        value = Value(source.n, source.height, source.width, y.shape[1])
        self.add(Step(GROUP_NORM_SILU, value, reads, rest))
        self._know(y, value)

    def bias_residual(self, y: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor | None, **rest: Any) -> None:
        self._join(y, self.whole(x), None if residual is None else self.whole(residual), self.real(bias))

    def sum(self, y: Tensor, self_: Tensor, other: Any, alpha: Any, sign: int = 1) -> None:
        if not isinstance(other, Tensor):
            self._pointwise(y, self_, shift=sign * alpha * other)
            return
        if sign * alpha != 1 or self_.shape != other.shape:
            raise Unsupported("it has an addition of other than two images")
        one, two = self.whole(self_), self.whole(other)
        if one is two:
            self._pointwise(y, self_, scale=2)
            return
        order = {id(step): n for n, step in enumerate(self.steps)}
        if order.get(id(one.step), -1) < order.get(id(two.step), -1):
            one, two = two, one
        self._join(y, one, two, None)

    def difference(self, y: Tensor, **kwargs: Any) -> None:
        self.sum(y, **kwargs, sign=-1)

    def _join(self, y: Tensor, value: Value, residual: Value | None, bias: Tensor | None) -> None:
        """Add to what a convolution or a function, the later of two, has just given."""
        step = value.step
        able = step is not None and step.kind in (CONVOLUTION, POINTWISE) and not (value.readers or step.reads[1])
        if step is None or not able or step.attributes.get("relu") or (step.kind == POINTWISE and bias is not None):
            raise Unsupported("it adds to something other than a convolution's output")
        step.reads[1] = residual
        if residual is not None:
            residual.readers.append(step)
        self._forget(value)
        if bias is not None:
            before = step.attributes["bias"]
            step.attributes["bias"] = bias if before is None else before.float() + bias.float()
        self._know(y, value)

    def _pointwise(self, y: Tensor, x: Tensor, function: int = IDENTITY, scale: float = 1, shift: float = 0) -> None:
        """``function(scale * x + shift)``; a scale and shift of a function's result become part of its step."""
        value = self.whole(x)
        before = value.step
        if (
            function == IDENTITY
            and before is not None
            and before.kind == POINTWISE
            and not (value.readers or before.reads[1])
        ):
            a = before.attributes
            a["y_scale"], a["y_shift"] = scale * a["y_scale"], scale * a["y_shift"] + shift
            self._forget(value)
        else:
            attributes = {"function": function, "x_scale": scale, "x_shift": shift, "y_scale": 1.0, "y_shift": 0.0}
            source, value = value, Value(value.n, value.height, value.width, value.channels)
            self.add(Step(POINTWISE, value, [source, None], attributes))
        self._know(y, value)

    def silu(self, y: Tensor, self_: Tensor) -> None:
        self._pointwise(y, self_, SILU)

    def tanh(self, y: Tensor, self_: Tensor) -> None:
        self._pointwise(y, self_, TANH)

    def quotient(self, y: Tensor, self_: Tensor, other: Any) -> None:
        if isinstance(other, Tensor):
            raise Unsupported("it divides by a tensor")
        self._pointwise(y, self_, scale=1 / other)

    def equal(self, y: Tensor, self_: Tensor, other: Any) -> None:
        """Noted, and refused unless rows of zeros are replaced."""
        self.alive.append(y)
        self.unknown[y.untyped_storage()._cdata] = "a comparison"
        if other == 0:
            self.tests[y.untyped_storage()._cdata] = self_, False

    def all(self, y: Tensor, self_: Tensor, dim: int, keepdim: bool) -> None:
        self.alive.append(y)
        self.unknown[y.untyped_storage()._cdata] = "a comparison"
        test = self.tests.get(self_.untyped_storage()._cdata)
        if test is not None and not test[1] and self_.ndim == 2 and dim in (1, -1) and keepdim:
            self.tests[y.untyped_storage()._cdata] = test[0], True

    def where(self, y: Tensor, condition: Tensor, self_: Tensor, other: Tensor) -> None:
        tested, rows = self.tests.get(condition.untyped_storage()._cdata, (None, False))
        if not rows or tested is None or other.ndim != 2 or self.value(tested) is not self.whole(other):
            raise Unsupported("it chooses by something other than rows of zeros")
        source = self.whole(other)
        value = Value(source.n, source.height, source.width, source.channels)
        self.add(Step(REPLACE_ZERO_ROWS, value, [source], {"row": self.real(self_)}))
        self._know(y, value)

    def relu(self, y: Tensor, self_: Tensor) -> None:
        value = self.whole(self_)
        if value.step is None or value.step.kind != CONVOLUTION or value.readers:
            raise Unsupported("it has a ReLU of something other than a convolution's output")
        value.step.attributes["relu"] = 1
        self._forget(value)
        self._know(y, value)

    def concatenate(self, y: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
        if dim != 1 or len(tensors) != 2:
            raise Unsupported("it concatenates other than two images along their channels")
        self._gather(y, [self.image(t) for t in tensors], 1)

    def upsample(self, y: Tensor, self_: Tensor, output_size: Any, scales_h: Any, scales_w: Any) -> None:
        source = self.image(self_)
        factor = y.shape[2] // source.height
        if tuple(y.shape[2:]) != (source.height * factor, source.width * factor):
            raise Unsupported("it resizes by other than a whole number")
        self._gather(y, [source], factor)

    def _gather(self, y: Tensor, parts: list[Value], factor: int) -> None:
        value = Value(y.shape[0], y.shape[2], y.shape[3], y.shape[1])
        self.add(Step(GATHER, value, [*parts], {"factor": factor}))
        self._know(y, value)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        n, heads, length, width = q.shape
        mask = None if attn_mask is None else self.value(attn_mask)
        if rest or (mask is not None and (mask.dtype != torch.bool or attn_mask.shape != (n, 1, 1, k.shape[2]))):  # type: ignore[union-attr]
            raise Unsupported("it has attention of another kind")
        if any(t.stride(-1) != 1 for t in (q, k, v)):
            raise Unsupported("its attention has heads whose elements do not lie beside each other")
        attributes: dict[str, Any] = {"heads": heads, "length": length, "k_length": k.shape[2], "width": width}
        attributes |= {name: (t.storage_offset(), *t.stride()[:3]) for name, t in zip("qkv", (q, k, v))}
        source = self.value(q)
        if (source.n, source.height * source.width) != (n, length):
            raise Unsupported("it attends to images that are reshaped")
        value = Value(n, source.height, source.width, heads * width)
        self.add(Step(ATTENTION, value, [source, self.value(k), self.value(v), mask], attributes))
        return self._know(torch.empty((n, length, heads, width), dtype=torch.float32, device="meta"), value).transpose(
            1, 2
        )

    def layer_norm(
        self, y: tuple[Tensor, ...], input: Tensor, normalized_shape: Any, weight: Any, bias: Any, eps: float
    ) -> None:
        source = self.whole(input)
        if list(normalized_shape) != [source.channels] or weight is None or bias is None:
            raise Unsupported("it has a LayerNorm of another kind")
        value = Value(source.n, source.height, source.width, source.channels)
        self.add(Step(LAYER_NORM, value, [source], {"weight": self.real(weight), "bias": self.real(bias), "eps": eps}))
        self._know(y[0], value)

    def gelu(self, y: Tensor, self_: Tensor, approximate: str) -> None:
        """Noted, and refused unless a product follows."""
        if approximate != "none":
            raise Unsupported(f"it has a GELU approximated by {approximate}")
        self.alive.append(y)
        self.gates[y.untyped_storage()._cdata] = self_
        self.unknown[y.untyped_storage()._cdata] = "a GELU that multiplies nothing"

    def product(self, y: Tensor, self_: Tensor, other: Any) -> None:
        if not isinstance(other, Tensor):
            self._pointwise(y, self_, scale=other)
            return
        gate = self.gates.get(other.untyped_storage()._cdata)
        if (
            gate is None
            or gate.shape != self_.shape
            or gate.stride() != self_.stride()
            or self.value(gate) is not self.value(self_)
        ):
            raise Unsupported("it has a product of other than a half of an image with a GELU of the other half")
        source = self.value(gate)
        if (
            self_.stride(-1) != 1
            or self_.stride(-2) != source.channels
            or self_[..., 0].numel() * source.channels != source.count
        ):
            raise Unsupported("it has a product of parts of images")
        value = Value(source.n, source.height, source.width, self_.shape[-1])
        self.add(Step(GATE, value, [source], {"value": self_.storage_offset(), "gate": gate.storage_offset()}))
        self._know(y, value)

    def dual_head(
        self, y: tuple[Tensor, Tensor], h: Tensor, sample: Tensor | None, anchor: Tensor | None, **rest: Any
    ) -> None:
        names = ("direction_weight", "direction_bias", "distance_weight", "distance_bias")
        attributes = {name: self.real(rest[name]) for name in names}
        reads = [None if t is None else self.image(t) for t in (h, sample, anchor)]
        values = []
        for tensor in y:
            n, channels, height, width = (*tensor.shape, 1, 1, 1)[:4]
            values.append(Value(n, height, width, channels))
            self._know(tensor, values[-1])
        self.add(Step(DUAL_HEAD, values[0], reads, attributes, values[1]))


def _renamed(handler: Callable[..., None]) -> Callable[..., None]:
    return lambda recorder, y, **kwargs: handler(
        recorder, y, **{"self_" if k == "self" else k: v for k, v in kwargs.items()}
    )


HANDLERS: dict[Any, Callable[..., None]] = {
    aten.convolution.default: Recorder.convolution,
    aten.add.Tensor: _renamed(Recorder.sum),
    aten.sub.Tensor: _renamed(Recorder.difference),
    aten.div.Tensor: _renamed(Recorder.quotient),
    aten.silu.default: _renamed(Recorder.silu),
    aten.tanh.default: _renamed(Recorder.tanh),
    aten.eq.Scalar: _renamed(Recorder.equal),
    aten.all.dim: _renamed(Recorder.all),
    aten.where.self: _renamed(Recorder.where),
    aten.relu.default: _renamed(Recorder.relu),
    aten.relu_.default: _renamed(Recorder.relu),
    aten.cat.default: Recorder.concatenate,
    aten.upsample_nearest2d.default: _renamed(Recorder.upsample),
    aten.native_layer_norm.default: Recorder.layer_norm,
    aten.gelu.default: _renamed(Recorder.gelu),
    aten.mul.Tensor: _renamed(Recorder.product),
    torch.ops.coalescer_fast.group_norm_silu.default: Recorder.group_norm_silu,
    torch.ops.coalescer_fast.bias_residual.default: Recorder.bias_residual,
    torch.ops.coalescer_fast.dual_head.default: Recorder.dual_head,
}


class Functions(TorchFunctionMode):
    """What torch takes apart before a `Recorder` can see it."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.table = {
            nn.functional.linear: recorder.linear,
            nn.functional.scaled_dot_product_attention: recorder.attention,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.table.get(func, func)(*args, **(kwargs or {}))


class Hollow:
    """A network's code with parameters that have no data, to be recorded any number of times: ``twin``, and its
    parameters' originals.

    Raises Unsupported for a network that cannot be copied.
    """

    def __init__(self, network: nn.Module):
        memo: dict[int, Any] = {}
        self.parameters: dict[Tensor, Tensor] = {}
        for p in network.parameters():
            dtype = torch.float32 if p.is_floating_point() else p.dtype
            memo[id(p)] = nn.Parameter(
                torch.empty_strided(p.shape, p.stride(), dtype=dtype, device="meta"), requires_grad=False
            )
            # a lazy negation has no memory of its own
            self.parameters[memo[id(p)]] = (
                torch.empty_strided(p.shape, p.stride(), dtype=p.dtype).copy_(p.detach()) if p.is_neg() else p
            )
        try:
            self.twin = copy.deepcopy(network, memo).eval()
        except Exception as error:  # of whatever has been put into it
            raise Unsupported(f"it cannot be copied ({said(error)})") from error
        for module in self.twin.modules():
            if hasattr(module, "backend"):
                module.backend = "auto"  # type: ignore[assignment]


def said(error: Exception) -> str:
    """The first line of an exception's message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


Recorded = tuple[Recorder, list[tuple[Value, Tensor]]]


def record(hollow: Hollow, run: Callable[[Any, Recorder], Iterable[Tensor]]) -> Recorded:
    """What ``run(the network without data, recorder)`` does, and what it gives: values, and tensors that are views of
    them. Raises Unsupported."""
    recorder = Recorder(hollow.parameters)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        Functions(recorder),
        recorder,
    ):
        try:
            results = list(run(hollow.twin, recorder))
        except Unsupported:
            raise
        except Exception as error:  # a module that runs on tensors with data alone
            raise Unsupported(f"it cannot be followed ({said(error)})") from error
    outputs = [(recorder.value(y), y) for y in results]
    if any(value.readers for value, _ in outputs):
        raise Unsupported("it gives something that it also computes with")
    for value, y in outputs:
        if y.numel() == value.count:
            value.tensor = y
    return recorder, outputs
