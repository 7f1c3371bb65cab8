"""The steps that programs are made of.

A class says all that is known of a step: which torch ops it does, what it needs of its inputs, and its arguments.

To add a step:

1. csrc/abi.h: a struct of its arguments, and a line of ``CF_STEPS``;
2. a header of csrc/cpu: functions ``valid(args)`` and the one that the line names;
3. here: the same struct, a subclass of `Step`, and a function decorated with `records` for each torch op that it does.

tests/runtime/native/test_steps.py compares both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ... import ops  # noqa: F401 (registers the ops)
from ...ops import native_library
from ...ops.abi import (
    Struct,
    cf_form,
    cf_function,
    cf_heads,
    cf_image,
    cf_quantisation,
    cf_tensor4,
    cf_vector,
)
from ...ops.kernels.dual_head.native import cf_dual_head_args
from ...ops.kernels.group_norm_silu.native import cf_group_norm_silu_args
from .pack import Packer, Weight, address, image, tensor4
from .value import BYTES, Range, Unsupported, Value

if TYPE_CHECKING:
    from .program import Layout
    from .record import Recorder

CHANNELS = 16  # the least channels and outputs of a product in 8 bits

aten = torch.ops.aten
Function = TypeVar("Function", bound=Callable[..., Any])

# Handlers of torch ops: handler(recorder, result, **arguments) is called after the op, whose result has no data. The
# arguments have the names of the op's schema, but ``self`` is called ``input``.
HANDLERS: dict[Any, Callable[..., None]] = {}
# Those that are steps even of vectors, which else a prologue of torch ops computes with.
PRODUCTS = {
    aten.convolution.default,
    torch.ops.coalescer_fast.bias_residual.default,
    torch.ops.coalescer_fast.dual_head.default,
    torch.ops.coalescer_fast.group_norm_silu.default,
}
# Handlers of functions of torch.nn.functional that torch would take apart: handler(recorder, *args, **kwargs) is called
# instead of the function, and returns a result without data.
FUNCTIONS: dict[Callable[..., Any], Callable[..., Tensor]] = {}


def without_data(shape: Sequence[int], dtype: torch.dtype = torch.float32, **layout: Any) -> Tensor:
    """A new tensor of a recorded module, which its recorder does not see being made."""
    with _disable_current_modes():
        return torch.empty(tuple(shape), dtype=dtype, device="meta", **layout)


def records(*operations: Any) -> Callable[[Function], Function]:
    """Make a function the handler of these torch ops or functions of torch.nn.functional."""

    def register(handler: Function) -> Function:
        for operation in operations:
            (HANDLERS if isinstance(operation, torch._ops.OpOverload) else FUNCTIONS)[operation] = handler
        return handler

    return register


@dataclass(frozen=True)
class Description:
    """What a step does, for profiles.

    Attributes:
        kind: the operation, as "convolution 3x3".
        form: how it is computed, of a convolution, a name of `FORMS`; else "".
        shape: in words.
        dtype: of what it reads first.
        flop: floating point operations of its products; what else it computes is not counted.
        bytes: of all values that it reads and writes, and of a convolution's weights, each once.
    """

    kind: str
    form: str
    shape: str
    dtype: torch.dtype
    flop: int
    bytes: int


class Step:
    """One native operation with its inputs, outputs and attributes: a subclass for each line of ``CF_STEPS``.

    Attributes:
        name: as in ``CF_STEPS``.
        number: likewise.
        struct: the type of its arguments.
        widens: its output may be float32 whatever its inputs are.
        elementwise: its output has the dtype of its first input.
        writes_border: its output may have a border.
        reads_border: its inputs may have a border.
        writes_padding: its output may have channels of zeros after the last.
        y: the value that it writes, the first if there are more.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    struct: ClassVar[type[Struct]]
    widens: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    writes_border: ClassVar[bool] = False
    reads_border: ClassVar[bool] = False
    writes_padding: ClassVar[bool] = False

    y: Value

    def __post_init__(self) -> None:
        for value in self.inputs:
            value.readers.append(self)
        for value in self.outputs:
            value.step = self

    def reads(self) -> Sequence[Value | None]:
        """The values that it reads, None for one that is not given."""
        raise NotImplementedError

    @property
    def inputs(self) -> list[Value]:
        """The values that it reads."""
        return [value for value in self.reads() if value is not None]

    @property
    def outputs(self) -> list[Value]:
        """The values that it writes."""
        return [self.y]

    @property
    def values(self) -> list[Value]:
        return [*self.outputs, *self.inputs]

    @property
    def writes_uint8(self) -> bool:
        """Whether its output may be uint8."""
        return False

    def wants_float32(self, value: Value) -> bool:
        """Whether it reads this input in float32, whatever the program's dtype."""
        return False

    def add(self, residual: Value | None, bias: Tensor | None) -> bool:
        """Make the addition of these to its output a part of the step; returns False if it cannot."""
        return False

    def add_row(self, row: Value) -> bool:
        """Likewise the addition of (n, channels) at every position."""
        return False

    def lay_out(self, layout: Layout) -> None:
        """Replace inputs that it cannot read as they are by copies. All dtypes have been chosen."""

    def arguments(self, packer: Packer) -> Struct:
        """Its arguments. All values have been placed in memory."""
        raise NotImplementedError

    # What it does, for profiles.

    @property
    def kind(self) -> str:
        return self.name.lower()

    @property
    def shape(self) -> str:
        y = self.y
        return f"{y.n}x{y.height}x{y.width}, {y.channels}"

    @property
    def flop(self) -> int:
        return 0

    @property
    def form_name(self) -> str:
        return ""

    def describe(self) -> Description:
        moved = sum(value.bytes for value in set(self.values))
        first = self.inputs[0].dtype
        assert first is not None
        return Description(self.kind, self.form_name, self.shape, first, self.flop, moved)


class cf_convolution_args(Struct):
    _fields_: ClassVar = [
        ("x", cf_image),
        ("residual", cf_image),
        ("y", cf_image),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("scale", c_void_p),
        ("row", c_void_p),
        ("n", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("channels", c_int64),
        ("outputs", c_int64),
        ("taps", c_int64),
        ("stride", c_int64),
        ("padding", c_int64),
        ("relu", c_int64),
        ("form", c_int64),
        ("doubling", c_int64),
        ("gated", c_int64),
        ("function", c_int64),
        ("quantisation", cf_quantisation),
    ]


@dataclass(frozen=True)
class Padded:
    """Note of zeros after the last row and column of an image, which a 3x3 convolution without padding can read.

    Attributes:
        input: the image.
    """

    input: Tensor


FORMS = {
    cf_form.CF_DIRECT: "direct",
    cf_form.CF_WINOGRAD_2: "winograd 2x2",
    cf_form.CF_WINOGRAD_4: "winograd 4x4",
}


def forms(dtype: torch.dtype) -> tuple[cf_form, ...]:
    """The ways to compute a 3x3 convolution that reads this dtype, on the instruction set in use."""
    if dtype not in native_library.products():
        return ()
    return (cf_form.CF_DIRECT,) if dtype == torch.uint8 else tuple(FORMS)


@dataclass(eq=False)
class Convolution(Step):
    """``y = relu(convolution(x) + bias + row + residual)``, of 1x1 or 3x3.

    A linear layer is a 1x1 convolution. Weight (Cout, Cin, k, k) and bias (Cout,) are the module's own; row is (n,
    Cout). ``padding`` is the number of zeros above and left of x; below and right of it there are as many as are read.

    With a gate, ``y = value * function(gate)``, where value and gate are the two halves of its outputs.

    Attributes:
        gate: the function of the gate, None without one; ``weight.gated`` says which half it is.
        range: what x may be, if the program multiplies in 8 bits here.
    """

    name = "CONVOLUTION"
    number = 0
    struct = cf_convolution_args
    widens = writes_border = reads_border = True

    x: Value
    y: Value
    weight: Weight
    bias: Tensor | None = None
    residual: Value | None = None
    row: Value | None = None
    stride: int = 1
    padding: int = 0
    relu: bool = False
    form: cf_form = cf_form.CF_DIRECT
    doubling: bool = False
    gate: cf_function | None = None
    linear: bool = False
    range: Range | None = None

    def reads(self) -> Sequence[Value | None]:
        return self.x, self.residual, self.row

    @property
    def writes_uint8(self) -> bool:
        return self.form == cf_form.CF_DIRECT

    @property
    def can_be_winograd(self) -> bool:
        return self.wide and self.stride == self.padding == 1

    def wants_float32(self, value: Value) -> bool:
        return value is self.row

    def add(self, residual: Value | None, bias: Tensor | None) -> bool:
        if self.relu or self.residual is not None:
            return False
        self.residual = residual
        if bias is not None:
            self.bias = bias if self.bias is None else self.bias.float() + bias.float()
        return True

    def add_row(self, row: Value) -> bool:
        if self.relu or self.row is not None:
            return False
        self.row = row
        return True

    def gate_by(self, gate: Gate) -> bool:
        """Make a gate of the two halves of its output a part of the step; returns False if it cannot."""
        half, firsts = self.y.channels // 2, (gate.x_first, gate.gate_first)
        plain = not (self.wide or self.relu) and self.residual is self.row is None and self.gate is None
        if not plain or self.y.channels % 2 or sorted(firsts) != [0, half] or gate.y.channels != half:
            return False
        self.weight, self.gate, self.y = replace(self.weight, gated=firsts), gate.function, gate.y
        self.y.step = self
        return True

    @property
    def wide(self) -> bool:
        """Whether it is 3x3: it then reads beyond the edges of x, which needs a border."""
        return self.weight.shape[2] == 3

    @property
    def kind(self) -> str:
        size = self.weight.shape[2]
        kind = "linear" if self.linear else f"convolution {size}x{size}"
        return kind if self.stride == 1 else f"{kind}, stride {self.stride}"

    @property
    def form_name(self) -> str:
        return FORMS[self.form] if self.wide else "direct"

    @property
    def shape(self) -> str:
        x, y = self.x, self.y
        return f"{y.n}x{y.height}x{y.width}, {x.channels} -> {y.channels}"

    @property
    def flop(self) -> int:
        outputs, channels, *kernel = self.weight.shape
        return 2 * self.y.rows * outputs * channels * math.prod(kernel)

    def describe(self) -> Description:
        found = super().describe()
        outputs, *rest = self.weight.shape
        weights = outputs * math.prod(rest) * self.x.element_bytes
        return replace(found, bytes=found.bytes + weights)

    @property
    def reads_uint8(self) -> bool:
        """Whether it is to multiply in 8 bits, where a program may; benchmarks/quality/int8.py has what it costs.

        3x3 convolutions do what GroupNorm gives, linear layers and 1x1 convolutions what LayerNorm, attention and gates
        give. Everything else costs more error than it saves time: products of a program's inputs, of which the first
        convolution alone makes half of all error, and of what attention makes of them, whose range is up to whoever
        calls; of residual streams, whose outliers leave narrow ranges (strided convolutions, shortcuts, the last
        product of a transformer); and the first product of a transformer, which that stream is added to. Products of
        vectors or of a few channels, as that of the last convolution, are little work.
        """
        outputs, channels = self.weight.shape[:2]
        little = self.x.height * self.x.width == 1 or min(outputs, channels) < CHANNELS
        if little or channels % 4 or _is_given(self.x):
            return False
        writer = self.x.step
        if self.wide:
            return isinstance(writer, GroupNormSiLU)
        gated = isinstance(writer, Convolution) and writer.gate is not None
        return gated or isinstance(writer, (LayerNorm, Attention, Gate))

    @property
    def pays_for_a_copy(self) -> bool:
        """Whether x is copied in 8 bits, if others read it, too."""
        return self.wide

    def lay_out(self, layout: Layout) -> None:
        x, lanes = self.x, 4 // BYTES[layout.dtype]
        self.residual = layout.in_dtype(self.residual, layout.dtype if self.y.dtype == torch.uint8 else self.y.dtype)
        self.row = layout.in_dtype(self.row, torch.float32)
        if self.range is not None and x.range is not self.range:
            self.x = layout.copy(x, torch.uint8, int(self.wide), range=self.range)
            return
        padded = -(-x.channels // lanes) * lanes
        # A copy costs a pass through memory: whatever writes x should write the border and the padding, if it can and
        # nobody is disturbed by them.
        if x.step is not None and x not in layout.outputs:
            if self.wide and x.step.writes_border:
                x.border = int(all(reader.reads_border for reader in x.readers))
            if x.step.writes_padding and len(x.readers) == 1:
                x.padded = padded
        able = x.dtype in (layout.dtype, torch.uint8) and x.padded % lanes == 0 and (x.border or not self.wide)
        if not able:
            self.x = layout.copy(x, layout.dtype, int(self.wide), padded)

    def arguments(self, packer: Packer) -> Struct:
        x, y, scale = self.x, self.y, None
        bias = None if self.bias is None else self.weight.in_turns(self.bias)
        if self.range is not None:
            weight, scale, added = packer.weights.quantise(self.weight, self.range)
            bias = added if bias is None else bias.float() + added
        else:
            weight = packer.weights.pack(self.weight, self.form)
        return cf_convolution_args(
            x=image(x),
            residual=image(self.residual),
            y=image(y),
            weight=packer.keep(weight),
            bias=packer.floats(bias),
            scale=packer.keep(scale),
            row=address(self.row),
            n=y.n,
            height=y.height,
            width=y.width,
            channels=x.padded,
            outputs=y.channels,
            taps=self.weight.shape[2] ** 2,
            stride=self.stride,
            padding=self.padding,
            relu=self.relu,
            form=self.form,
            doubling=self.doubling,
            gated=self.gate is not None,
            function=self.gate or cf_function.CF_IDENTITY,
            quantisation=packer.quantisation(y),
        )

    @staticmethod
    @records(aten.convolution.default)
    def record(
        recorder: Recorder,
        result: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        **rest: Any,
    ) -> None:
        kernel, parameter = tuple(weight.shape[2:]), recorder.weight(weight)
        plain = {"dilation": [1, 1], "transposed": False, "output_padding": [0, 0], "groups": 1}
        # the zeros in memory around an image are enough for these
        padded = recorder.noted(input, Padded) if kernel == (3, 3) and list(padding) == [0, 0] else None
        inside = (kernel, list(padding)) in [((1, 1), [0, 0]), ((3, 3), [1, 1])] or padded is not None
        if rest != plain or not inside or stride[0] != stride[1]:
            raise Unsupported(f"it has a convolution {kernel} with stride {stride}, padding {padding}, {rest}")
        x = recorder.image(input if padded is None else padded.input)
        y = Value(x.n, result.shape[2], result.shape[3], parameter.shape[0])
        bias = recorder.optional_parameter(bias)
        recorder.add(Convolution(x, y, parameter, bias, stride=stride[0], padding=padding[0]), result)

    @staticmethod
    @records(aten.constant_pad_nd.default)
    def record_padding(recorder: Recorder, result: Tensor, input: Tensor, pad: Sequence[int], value: float) -> None:
        if list(pad) != [0, 1, 0, 1] or value != 0:
            raise Unsupported(f"it pads by {list(pad)} with {value}")
        recorder.note(result, "a padding that no 3x3 convolution reads", Padded(input))

    @staticmethod
    @records(F.linear)
    def record_linear(recorder: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.ndim != 2 or input.shape[-1] != weight.shape[1]:
            raise Unsupported(f"it multiplies {tuple(input.shape)} with weights of {tuple(weight.shape)}")
        x, parameter = recorder.rows(input), recorder.weight(weight[:, :, None, None])
        result = without_data((*input.shape[:-1], parameter.shape[0]))
        y = x.like(parameter.shape[0])
        recorder.add(Convolution(x, y, parameter, recorder.optional_parameter(bias), linear=True), result)
        return result

    @staticmethod
    @records(aten.relu.default, aten.relu_.default)
    def record_relu(recorder: Recorder, result: Tensor, input: Tensor) -> None:
        y = recorder.whole(input)
        if isinstance(y.step, Convolution) and recorder.joinable(y):
            y.step.relu = True
            recorder.join(y, result)
        else:
            Pointwise.record(recorder, result, input, cf_function.CF_RELU)

    @staticmethod
    @records(torch.ops.coalescer_fast.bias_residual.default)
    def record_bias_residual(
        recorder: Recorder, result: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor | None, **rest: Any
    ) -> None:
        other = None if residual is None else recorder.whole(residual)
        _add_to(recorder, result, recorder.whole(x), other, recorder.optional_parameter(bias))


class cf_group_norm_image_args(Struct):
    _fields_: ClassVar = [
        ("norm", cf_group_norm_silu_args),
        ("y", cf_image),
        ("width", c_int64),
        ("quantisation", cf_quantisation),
    ]


@dataclass(eq=False)
class GroupNormSiLU(Step):
    """`coalescer_fast.ops.group_norm_silu` with channels innermost. Weight, bias and pre_bias are the module's own."""

    name = "GROUP_NORM_SILU"
    number = 1
    struct = cf_group_norm_image_args
    writes_border = writes_uint8 = True

    x: Value
    y: Value
    num_groups: int
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    silu: bool
    skip: Value | None = None
    scale: Value | None = None
    shift: Value | None = None
    pre_bias: Tensor | None = None

    def reads(self) -> Sequence[Value | None]:
        return self.x, self.skip, self.scale, self.shift

    def add_row(self, row: Value) -> bool:
        if self.silu or self.shift is not None:
            return False
        self.shift = row
        return True

    def lay_out(self, layout: Layout) -> None:
        self.x = layout.in_dtype(self.x, layout.dtype)
        self.skip = layout.in_dtype(self.skip, layout.dtype)

    def arguments(self, packer: Packer) -> Struct:
        x, y = self.x, self.y
        norm = cf_group_norm_silu_args(
            x=x.address,
            skip=address(self.skip),
            y=None,
            dtype=x.code,
            channels_last=True,
            n=x.n,
            c1=x.channels,
            c2=0 if self.skip is None else self.skip.channels,
            spatial=x.height * x.width,
            groups=self.num_groups,
            silu=self.silu,
            weight=packer.vector(self.weight),
            bias=packer.vector(self.bias),
            pre_bias=packer.vector(self.pre_bias),
            scale=self._film(self.scale),
            scale_stride=0 if self.scale is None else self.scale.channels,
            shift=self._film(self.shift),
            shift_stride=0 if self.shift is None else self.shift.channels,
            threads=packer.threads,
            eps=self.eps,
        )
        return cf_group_norm_image_args(norm=norm, y=image(y), width=y.width, quantisation=packer.quantisation(y))

    @staticmethod
    def _film(value: Value | None) -> cf_vector | None:
        return None if value is None else cf_vector(data=value.address, dtype=value.code)

    @staticmethod
    @records(torch.ops.coalescer_fast.group_norm_silu.default)
    def record(
        recorder: Recorder,
        result: Tensor,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        scale: Tensor | None,
        shift: Tensor | None,
        skip: Tensor | None,
        pre_bias: Tensor | None,
        activation: str | None,
        **rest: Any,
    ) -> None:
        source = recorder.image(x)
        step = GroupNormSiLU(
            source,
            source.like(result.shape[1]),
            num_groups,
            eps,
            recorder.optional_parameter(weight),
            recorder.optional_parameter(bias),
            activation == "silu",
            skip=None if skip is None else recorder.image(skip),
            scale=None if scale is None else recorder.row(scale, source.n),
            shift=None if shift is None else recorder.row(shift, source.n),
            pre_bias=recorder.optional_parameter(pre_bias),
        )
        recorder.add(step, result)

    @staticmethod
    @records(F.group_norm, torch.group_norm)
    def record_group_norm(
        recorder: Recorder,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> Tensor:
        """torch's own GroupNorm, of images or of (n, C, positions); a SiLU, scales and shifts after it join it."""
        if input.shape[1] % num_groups or any(p is not None and p.shape != input.shape[1:2] for p in (weight, bias)):
            raise Unsupported(f"it has a GroupNorm of {num_groups} groups for {tuple(input.shape)}")
        x = recorder.whole(input.transpose(1, 2)) if input.ndim == 3 else recorder.image(input)
        weight, bias = recorder.optional_parameter(weight), recorder.optional_parameter(bias)
        order = (0, 2, 1) if input.ndim == 3 else (0, 2, 3, 1)
        result = without_data([input.shape[i] for i in order])
        result = result.transpose(1, 2) if input.ndim == 3 else result.permute(0, 3, 1, 2)
        recorder.add(GroupNormSiLU(x, x.like(), num_groups, eps, weight, bias, silu=False), result)
        return result


class cf_gather_args(Struct):
    _fields_: ClassVar = [
        ("parts", cf_tensor4 * 2),
        ("channels", c_int64 * 2),
        ("y", cf_image),
        ("n", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("y_channels", c_int64),
        ("from_height", c_int64),
        ("from_width", c_int64),
        ("quantisation", cf_quantisation),
        ("y_scale", c_double),
        ("x_scale", c_double),
    ]


@dataclass(eq=False)
class Gather(Step):
    """``y = cat([x, other], 1)``, resized to the nearest positions.

    With x alone and of the same size it is a copy: in another dtype, with a border or padding, or of the channels from
    ``first`` on.

    Attributes:
        scales: of positions of y to those of x, along height and width; None for their sizes' quotient.
    """

    name = "GATHER"
    number = 2
    struct = cf_gather_args
    writes_border = reads_border = writes_padding = writes_uint8 = True

    x: Value
    y: Value
    other: Value | None = None
    scales: tuple[float | None, float | None] = (None, None)
    first: int = 0

    @property
    def is_part(self) -> bool:
        """Whether y is some of the channels of x."""
        size = (self.x.height, self.x.width) == (self.y.height, self.y.width)
        return self.other is None and size and self.y.channels < self.x.channels

    @property
    def doubles(self) -> bool:
        """Whether y is x upsampled to twice its size."""
        x, y = self.x, self.y
        scaled = all(scale in (None, 0.5) for scale in self.scales)
        same = self.other is None and self.first == 0 and x.channels == y.channels
        return same and scaled and (y.height, y.width) == (2 * x.height, 2 * x.width)

    def reads(self) -> Sequence[Value | None]:
        return self.x, self.other

    def arguments(self, packer: Packer) -> Struct:
        x, other, y = self.x, self.other, self.y
        part = tensor4(x)
        if self.first:
            part.data += self.first * x.element_bytes
        return cf_gather_args(
            parts=(part, tensor4(other)),
            channels=(y.channels if other is None else x.channels, 0 if other is None else other.channels),
            y=image(y),
            n=y.n,
            height=y.height,
            width=y.width,
            y_channels=y.padded,
            from_height=x.height,
            from_width=x.width,
            quantisation=packer.quantisation(y),
            y_scale=self.scales[0] or x.height / y.height,
            x_scale=self.scales[1] or x.width / y.width,
        )

    @staticmethod
    @records(aten.cat.default)
    def record(recorder: Recorder, result: Tensor, tensors: Sequence[Tensor], dim: int) -> None:
        along_channels = dim in ((1, -3) if result.ndim == 4 else (result.ndim - 1, -1))
        if not along_channels:
            raise Unsupported(f"it concatenates tensors of {result.ndim} dimensions along dimension {dim}")
        x, *others = (recorder.whole(t) for t in tensors)
        for number, other in enumerate(others, start=2):
            y = x.like(x.channels + other.channels)
            recorder.add(Gather(x, y, other), *([result] if number == len(tensors) else []))
            x = y
        if not others:
            recorder.alias(result, x)

    @staticmethod
    def record_part(recorder: Recorder, tensor: Tensor, x: Value, first: int) -> Value:
        """The channels of x that the tensor is, from ``first`` on, as a value of their own."""
        y = x.like(tensor.shape[1] if tensor.ndim == 4 else tensor.shape[-1])
        recorder.add(Gather(x, y, first=first))
        return y

    @staticmethod
    @records(aten.upsample_nearest2d.default)
    def record_upsampling(
        recorder: Recorder,
        result: Tensor,
        input: Tensor,
        output_size: Sequence[int],
        scales_h: float | None,
        scales_w: float | None,
    ) -> None:
        Gather._record_resizing(recorder, result, input, scales_h, scales_w)

    @staticmethod
    @records(aten.upsample_nearest2d.vec)
    def record_scaled_upsampling(
        recorder: Recorder,
        result: Tensor,
        input: Tensor,
        output_size: Sequence[int] | None,
        scale_factors: Sequence[float] | None,
    ) -> None:
        Gather._record_resizing(recorder, result, input, *(scale_factors or (None, None)))

    @staticmethod
    def _record_resizing(
        recorder: Recorder, result: Tensor, input: Tensor, scales_h: float | None, scales_w: float | None
    ) -> None:
        x, (height, width) = recorder.image(input), result.shape[2:]
        scales = (1 / scales_h if scales_h else None, 1 / scales_w if scales_w else None)
        recorder.add(Gather(x, Value(x.n, height, width, x.channels), scales=scales), result)


class cf_attention_args(Struct):
    _fields_: ClassVar = [
        ("q", cf_heads),
        ("k", cf_heads),
        ("v", cf_heads),
        ("bias", cf_heads),
        ("mask", c_void_p),
        ("y", c_void_p),
        ("dtype", c_int64),
        ("n", c_int64),
        ("heads", c_int64),
        ("length", c_int64),
        ("k_length", c_int64),
        ("width", c_int64),
        ("quantisation", cf_quantisation),
        ("scale", c_double),
    ]


@dataclass(frozen=True)
class Heads:
    """How heads (n, heads, length, width) lie in a value, in elements; the width's stride is 1."""

    offset: int
    sample: int
    head: int
    row: int

    @classmethod
    def of(cls, tensor: Tensor) -> Heads:
        return cls(int(tensor.storage_offset()), *tensor.stride()[:3])

    def pack(self, value: Value) -> cf_heads:
        data = value.address + self.offset * value.element_bytes
        return cf_heads(data=data, sample=self.sample, head_stride=self.head, row=self.row)


@dataclass(eq=False)
class Attention(Step):
    """``y = softmax(q k^T * scale + bias) v`` of every sample and head, over the keys that the mask allows.

    q, k and v may be parts of one value; ``views`` says how the heads lie in each. The mask is (n, k_length), bool, the
    bias (n, heads, length, k_length), of which ``bias_view`` says how it lies, and y (n, length, heads * width).
    """

    name = "ATTENTION"
    number = 3
    struct = cf_attention_args
    writes_uint8 = True

    q: Value
    k: Value
    v: Value
    mask: Value | None
    y: Value
    views: tuple[Heads, Heads, Heads]
    heads: int
    length: int
    k_length: int
    width: int
    scale: float
    bias: Value | None = None
    bias_view: Heads | None = None

    def reads(self) -> Sequence[Value | None]:
        return self.q, self.k, self.v, self.mask, self.bias

    def wants_float32(self, value: Value) -> bool:
        return value is self.bias

    @property
    def shape(self) -> str:
        return f"{self.y.n} x {self.heads} heads of {self.width}, {self.length} to {self.k_length}"

    @property
    def flop(self) -> int:
        return 4 * self.y.n * self.heads * self.length * self.k_length * self.width

    def lay_out(self, layout: Layout) -> None:
        self.q, self.k, self.v = (layout.in_dtype(each, layout.dtype) for each in (self.q, self.k, self.v))
        if self.bias is not None and self.bias.dtype != torch.float32:
            raise Unsupported("its attention has a bias that is computed")

    def arguments(self, packer: Packer) -> Struct:
        if self.width * BYTES[packer.dtype] % 4:
            raise Unsupported(f"its attention has heads of width {self.width}")
        q, k, v = (heads.pack(value) for heads, value in zip(self.views, (self.q, self.k, self.v)))
        return cf_attention_args(
            q=q,
            k=k,
            v=v,
            bias=None if self.bias is None or self.bias_view is None else self.bias_view.pack(self.bias),
            mask=address(self.mask),
            y=self.y.address,
            dtype=self.q.code,
            n=self.y.n,
            heads=self.heads,
            length=self.length,
            k_length=self.k_length,
            width=self.width,
            quantisation=packer.quantisation(self.y),
            scale=self.scale,
        )

    @staticmethod
    @records(F.scaled_dot_product_attention)
    def record(
        recorder: Recorder,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        alike = query.ndim == 4 and key.shape == value.shape == (*query.shape[:2], key.shape[2], query.shape[3])
        if not alike:
            raise Unsupported(f"it attends from {tuple(query.shape)} to {tuple(key.shape)}")
        (n, heads, length, width), k_length = query.shape, key.shape[2]
        if dropout_p or is_causal or enable_gqa:
            raise Unsupported("it has attention that is causal, grouped or drops out")
        if any(t.stride(-1) != 1 for t in (query, key, value)):
            raise Unsupported("its attention has heads whose elements do not lie beside each other")
        q, k, v = (recorder.value(t) for t in (query, key, value))
        if (q.n, q.height * q.width) != (n, length):
            raise Unsupported("it attends to images that are reshaped")
        views = Heads.of(query), Heads.of(key), Heads.of(value)
        y = q.like(heads * width)
        result = without_data((n, length, heads, width))
        scale, mask, bias, bias_view = width**-0.5 if scale is None else scale, None, None, None
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            if attn_mask.shape != (n, 1, 1, k_length):
                raise Unsupported(f"its attention has a mask of shape {tuple(attn_mask.shape)}")
            mask = recorder.value(attn_mask)
        elif attn_mask is not None:
            view = attn_mask.expand(n, heads, length, k_length)
            if view.stride(-1) != 1:
                raise Unsupported(f"its attention has a bias of shape {tuple(attn_mask.shape)}")
            bias, bias_view = recorder.value(attn_mask), Heads.of(view)
        step = Attention(q, k, v, mask, y, views, heads, length, k_length, width, scale, bias, bias_view)
        recorder.add(step, result)
        return result.transpose(1, 2)


@dataclass(eq=False)
class DualHead(Step):
    """`coalescer_fast.ops.dual_head` of h with channels innermost. Weights and biases are the module's own."""

    name = "DUAL_HEAD"
    number = 4
    struct = cf_dual_head_args
    widens = True

    h: Value
    sample: Value | None
    anchor: Value | None
    y: Value
    distance: Value
    direction_weight: Tensor
    direction_bias: Tensor | None
    distance_weight: Tensor
    distance_bias: Tensor | None

    def reads(self) -> Sequence[Value | None]:
        return self.h, self.sample, self.anchor

    @property
    def outputs(self) -> list[Value]:
        return [self.y, self.distance]

    @property
    def flop(self) -> int:
        return 2 * 9 * self.y.count * self.h.channels

    def arguments(self, packer: Packer) -> Struct:
        h = self.h
        return cf_dual_head_args(
            h=h.address,
            dtype=h.code,
            n=h.n,
            c=h.channels,
            cz=self.y.channels,
            height=h.height,
            width=h.width,
            direction_weight=packer.vector(self.direction_weight.to(packer.dtype).permute(0, 2, 3, 1).contiguous()),
            direction_bias=packer.vector(self.direction_bias),
            distance_weight=packer.vector(self.distance_weight.flatten()),
            distance_bias=packer.vector(self.distance_bias),
            sample=tensor4(self.sample),
            anchor=tensor4(self.anchor),
            direction=tensor4(self.y),
            distance=self.distance.address,
            threads=packer.threads,
        )

    @staticmethod
    @records(torch.ops.coalescer_fast.dual_head.default)
    def record(
        recorder: Recorder,
        result: tuple[Tensor, Tensor],
        h: Tensor,
        direction_weight: Tensor,
        direction_bias: Tensor | None,
        distance_weight: Tensor,
        distance_bias: Tensor | None,
        sample: Tensor | None,
        anchor: Tensor | None,
        **rest: Any,
    ) -> None:
        (n, channels, height, width), direction_and_distance = result[0].shape, result
        step = DualHead(
            recorder.image(h),
            None if sample is None else recorder.image(sample),
            None if anchor is None else recorder.image(anchor),
            # contiguous, as the sampler's update wants it
            Value(n, height, width, channels, strides=result[0].stride()),
            Value(n, 1, 1, 1),
            recorder.parameter(direction_weight),
            recorder.optional_parameter(direction_bias),
            recorder.parameter(distance_weight),
            recorder.optional_parameter(distance_bias),
        )
        recorder.add(step, *direction_and_distance)


class cf_layer_norm_args(Struct):
    _fields_: ClassVar = [
        ("x", c_void_p),
        ("y", c_void_p),
        ("dtype", c_int64),
        ("rows", c_int64),
        ("channels", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("quantisation", cf_quantisation),
        ("eps", c_double),
    ]


@dataclass(eq=False)
class LayerNorm(Step):
    """``y = (x - mean) / sqrt(var + eps) * weight + bias`` over the channels.

    Weight and bias (C,) are the module's own.
    """

    name = "LAYER_NORM"
    number = 5
    struct = cf_layer_norm_args
    writes_uint8 = True

    x: Value
    y: Value
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def reads(self) -> Sequence[Value | None]:
        return (self.x,)

    def lay_out(self, layout: Layout) -> None:
        self.x = layout.in_dtype(self.x, layout.dtype)

    def arguments(self, packer: Packer) -> Struct:
        channels = self.x.channels
        ones, zeros = torch.ones(channels, dtype=torch.float32), torch.zeros(channels, dtype=torch.float32)
        return cf_layer_norm_args(
            x=self.x.address,
            y=self.y.address,
            dtype=self.x.code,
            rows=self.x.rows,
            channels=channels,
            weight=packer.floats(ones if self.weight is None else self.weight),
            bias=packer.floats(zeros if self.bias is None else self.bias),
            quantisation=packer.quantisation(self.y),
            eps=self.eps,
        )

    @staticmethod
    @records(F.layer_norm, torch.layer_norm)
    def record(
        recorder: Recorder,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Tensor:
        x = recorder.rows(input)
        wrong = any(p is not None and list(p.shape) != [x.channels] for p in (weight, bias))
        if list(normalized_shape) != [x.channels] or wrong:
            raise Unsupported(f"it has a LayerNorm over {list(normalized_shape)} of {tuple(input.shape)}")
        weight, bias = recorder.optional_parameter(weight), recorder.optional_parameter(bias)
        result = without_data(input.shape)
        recorder.add(LayerNorm(x, x.like(), weight, bias, eps), result)
        return result


class cf_gate_args(Struct):
    _fields_: ClassVar = [
        ("value", c_void_p),
        ("gate", c_void_p),
        ("y", c_void_p),
        ("dtype", c_int64),
        ("rows", c_int64),
        ("channels", c_int64),
        ("value_stride", c_int64),
        ("gate_stride", c_int64),
        ("function", c_int64),
        ("quantisation", cf_quantisation),
    ]


@dataclass(eq=False)
class Gate(Step):
    """``y = x * function(gate)``, of the channels from ``x_first`` and ``gate_first`` on."""

    name = "GATE"
    number = 6
    struct = cf_gate_args
    writes_uint8 = True

    x: Value
    gate: Value
    y: Value
    x_first: int = 0
    gate_first: int = 0
    function: cf_function = cf_function.CF_IDENTITY

    def reads(self) -> Sequence[Value | None]:
        return self.x, self.gate

    def lay_out(self, layout: Layout) -> None:
        self.x, self.gate = layout.in_dtype(self.x, layout.dtype), layout.in_dtype(self.gate, layout.dtype)

    def arguments(self, packer: Packer) -> Struct:
        x, gate = self.x, self.gate
        return cf_gate_args(
            value=x.address + self.x_first * x.element_bytes,
            gate=gate.address + self.gate_first * gate.element_bytes,
            y=self.y.address,
            dtype=x.code,
            rows=x.rows,
            channels=self.y.channels,
            value_stride=x.channels,
            gate_stride=gate.channels,
            function=self.function,
            quantisation=packer.quantisation(self.y),
        )

    @staticmethod
    @records(aten.mul.Tensor, aten.mul_.Tensor)
    def record(recorder: Recorder, result: Tensor, input: Tensor, other: Any) -> None:
        """A product with a number, with a number for every channel, or of two tensors of one shape."""
        number = recorder.number(other)
        if number is not None:
            Pointwise.record_line(recorder, result, input, scale=number)
        elif input.shape != other.shape:
            _record_rows(recorder, result, input, other, Modulate.scale_by)
        else:
            one, two = (recorder.channels_of(t) for t in (input, other))
            if _function_of(one[0]) is not None and _function_of(two[0]) is None:
                one, two = two, one
            (x, x_first), (gate, gate_first) = one, two
            function = _function_of(gate)
            if isinstance(gate.step, Pointwise) and function is not None:
                gate = gate.step.x
                part = gate.step
                if isinstance(part, Gather) and part.is_part:
                    gate, gate_first = part.x, part.first + gate_first
            channels = input.shape[1] if input.ndim == 4 else input.shape[-1]
            y = x.like(channels)
            gated = Gate(x, gate, y, x_first, gate_first, function or cf_function.CF_IDENTITY)
            recorder.add(gated, result)


class cf_pointwise_args(Struct):
    _fields_: ClassVar = [
        ("x", c_void_p),
        ("residual", c_void_p),
        ("y", c_void_p),
        ("dtype", c_int64),
        ("count", c_int64),
        ("function", c_int64),
        ("x_scale", c_double),
        ("x_shift", c_double),
        ("y_scale", c_double),
        ("y_shift", c_double),
    ]


@dataclass(eq=False)
class Pointwise(Step):
    """``y = function(x * x_scale + x_shift) * y_scale + y_shift + residual``, element by element."""

    name = "POINTWISE"
    number = 7
    struct = cf_pointwise_args
    elementwise = True

    x: Value
    y: Value
    function: cf_function
    x_scale: float = 1.0
    x_shift: float = 0.0
    y_scale: float = 1.0
    y_shift: float = 0.0
    residual: Value | None = None

    @property
    def is_pure(self) -> bool:
        """Whether it is a function and nothing else."""
        line = self.x_scale, self.x_shift, self.y_scale, self.y_shift
        return self.function != cf_function.CF_IDENTITY and line == (1, 0, 1, 0) and self.residual is None

    @property
    def adds_one(self) -> bool:
        """Whether it is ``x + 1``."""
        line = self.x_scale * self.y_scale, self.x_shift * self.y_scale + self.y_shift
        return self.function == cf_function.CF_IDENTITY and line == (1, 1) and self.residual is None

    def reads(self) -> Sequence[Value | None]:
        return self.x, self.residual

    def add(self, residual: Value | None, bias: Tensor | None) -> bool:
        if bias is not None or self.residual is not None:
            return False
        self.residual = residual
        return True

    def lay_out(self, layout: Layout) -> None:
        self.x = layout.in_dtype(self.x, self.y.dtype)
        self.residual = layout.in_dtype(self.residual, self.y.dtype)

    def arguments(self, packer: Packer) -> Struct:
        return cf_pointwise_args(
            x=self.x.address,
            residual=address(self.residual),
            y=self.y.address,
            dtype=self.y.code,
            count=self.y.count,
            function=self.function,
            x_scale=self.x_scale,
            x_shift=self.x_shift,
            y_scale=self.y_scale,
            y_shift=self.y_shift,
        )

    @staticmethod
    def record(recorder: Recorder, result: Tensor, input: Tensor, function: cf_function) -> None:
        x = recorder.whole(input)
        recorder.add(Pointwise(x, x.like(), function), result)

    @staticmethod
    def record_line(recorder: Recorder, result: Tensor, input: Tensor, scale: float = 1, shift: float = 0) -> None:
        """``scale * input + shift``, which joins a function just before it."""
        x = recorder.whole(input)
        step = x.step
        if scale == 1 and shift == 0:
            recorder.alias(result, x)
        elif isinstance(step, Pointwise) and step.residual is None and recorder.joinable(x):
            step.y_scale, step.y_shift = scale * step.y_scale, scale * step.y_shift + shift
            recorder.join(x, result)
        else:
            recorder.add(Pointwise(x, x.like(), cf_function.CF_IDENTITY, scale, shift), result)

    @staticmethod
    @records(aten.silu.default, aten.silu_.default)
    def record_silu(recorder: Recorder, result: Tensor, input: Tensor) -> None:
        x = recorder.whole(input)
        if isinstance(x.step, GroupNormSiLU) and not x.step.silu and recorder.joinable(x):
            x.step.silu = True
            recorder.join(x, result)
        else:
            Pointwise.record(recorder, result, input, cf_function.CF_SILU)

    @staticmethod
    @records(aten.tanh.default)
    def record_tanh(recorder: Recorder, result: Tensor, input: Tensor) -> None:
        Pointwise.record(recorder, result, input, cf_function.CF_TANH)

    @staticmethod
    @records(aten.sigmoid.default)
    def record_sigmoid(recorder: Recorder, result: Tensor, input: Tensor) -> None:
        Pointwise.record(recorder, result, input, cf_function.CF_SIGMOID)

    @staticmethod
    @records(aten.gelu.default)
    def record_gelu(recorder: Recorder, result: Tensor, input: Tensor, approximate: str) -> None:
        function = {"none": cf_function.CF_GELU, "tanh": cf_function.CF_GELU_TANH}[approximate]
        Pointwise.record(recorder, result, input, function)

    @staticmethod
    @records(aten.div.Tensor, aten.div_.Tensor)
    def record_quotient(recorder: Recorder, result: Tensor, input: Tensor, other: Any) -> None:
        number = recorder.number(other)
        if number is None:
            raise Unsupported("it divides by a tensor")
        Pointwise.record_line(recorder, result, input, scale=1 / number)

    @staticmethod
    @records(aten.clone.default, aten._to_copy.default)
    def record_copy(recorder: Recorder, result: Tensor, input: Tensor, **how: Any) -> Tensor:
        """A copy, which is the same value: nothing overwrites a value."""
        if result.dtype != torch.float32:
            raise Unsupported(f"it computes in {result.dtype}")
        value = recorder.value(input)
        if input.numel() == value.count:
            result = torch.empty_strided(input.shape, input.stride(), dtype=torch.float32, device="meta")
        else:
            value = recorder.whole(input)
        recorder.alias(result, value)
        return result


class cf_modulate_args(Struct):
    _fields_: ClassVar = [
        ("x", c_void_p),
        ("y", c_void_p),
        ("dtype", c_int64),
        ("n", c_int64),
        ("spatial", c_int64),
        ("channels", c_int64),
        ("scale", cf_vector),
        ("scale_stride", c_int64),
        ("shift", cf_vector),
        ("shift_stride", c_int64),
        ("plus", c_double),
    ]


@dataclass(eq=False)
class Modulate(Step):
    """``y = x * (scale + plus) + shift``, with a scale and a shift for every channel of a sample.

    Scale and shift are values (n, C) or the module's own parameters (C,), or None for 1 and 0.
    """

    name = "MODULATE"
    number = 9
    struct = cf_modulate_args
    elementwise = True

    x: Value
    y: Value
    scale: Value | Tensor | None = None
    shift: Value | Tensor | None = None
    plus: float = 0.0

    def reads(self) -> Sequence[Value | None]:
        return self.x, *(each if isinstance(each, Value) else None for each in (self.scale, self.shift))

    def lay_out(self, layout: Layout) -> None:
        self.x = layout.in_dtype(self.x, self.y.dtype)

    def arguments(self, packer: Packer) -> Struct:
        def vector(each: Value | Tensor | None) -> cf_vector | None:
            if isinstance(each, Value):
                return cf_vector(data=each.address, dtype=each.code)
            return packer.vector(each)

        def stride(each: Value | Tensor | None) -> int:
            return each.channels if isinstance(each, Value) else 0

        return cf_modulate_args(
            x=self.x.address,
            y=self.y.address,
            dtype=self.y.code,
            n=self.x.n,
            spatial=self.x.height * self.x.width,
            channels=self.x.channels,
            scale=vector(self.scale),
            scale_stride=stride(self.scale),
            shift=vector(self.shift),
            shift_stride=stride(self.shift),
            plus=self.plus,
        )

    @staticmethod
    def scale_by(recorder: Recorder, result: Tensor, x: Value, row: Value | Tensor) -> None:
        """``x * row``."""
        plus, scale = 0.0, row
        if isinstance(row, Value) and isinstance(row.step, Pointwise) and row.step.adds_one:
            plus, scale = 1.0, row.step.x
        norm = x.step
        plain = isinstance(norm, GroupNormSiLU) and norm.scale is norm.shift is None and not norm.silu
        if plus and plain and isinstance(norm, GroupNormSiLU) and isinstance(scale, Value) and recorder.joinable(x):
            norm.scale = scale
            recorder.join(x, result, scale)
        else:
            recorder.add(Modulate(x, x.like(), scale, None, plus), result)

    @staticmethod
    def shift_by(recorder: Recorder, result: Tensor, x: Value, row: Value | Tensor) -> None:
        """``x + row``."""
        step = x.step
        if step is not None and recorder.joinable(x):
            if isinstance(row, Tensor):
                joined = isinstance(step, Convolution) and step.add(None, row)
            else:
                joined = step.add_row(row)
            if joined:
                recorder.join(x, result, row if isinstance(row, Value) else None)
                return
        recorder.add(Modulate(x, x.like(), None, row), result)

    def add_row(self, row: Value) -> bool:
        if self.shift is not None:
            return False
        self.shift = row
        return True


class cf_replace_zero_rows_args(Struct):
    _fields_: ClassVar = [
        ("x", c_void_p),
        ("row", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
        ("channels", c_int64),
    ]


@dataclass(frozen=True)
class ZeroTest:
    """Note of a comparison with 0, which has a step only if rows of zeros are replaced.

    Attributes:
        of: what is compared, (n, C).
        rows: whether all elements of a row are, (n, 1), or each alone.
    """

    of: Tensor
    rows: bool


@dataclass(eq=False)
class ReplaceZeroRows(Step):
    """``y = x``, with ``row`` (C,), the module's own, in the place of every row that holds nothing but zeros."""

    name = "REPLACE_ZERO_ROWS"
    number = 8
    struct = cf_replace_zero_rows_args
    elementwise = True

    x: Value
    y: Value
    row: Tensor

    def reads(self) -> Sequence[Value | None]:
        return (self.x,)

    def lay_out(self, layout: Layout) -> None:
        if self.y.dtype != torch.float32:
            raise Unsupported(f"it replaces rows of zeros in {self.y.dtype}")
        self.x = layout.in_dtype(self.x, torch.float32)

    def arguments(self, packer: Packer) -> Struct:
        return cf_replace_zero_rows_args(
            x=self.x.address,
            row=packer.floats(self.row),
            y=self.y.address,
            rows=self.x.rows,
            channels=self.x.channels,
        )

    @staticmethod
    @records(aten.eq.Scalar)
    def record_equal(recorder: Recorder, result: Tensor, input: Tensor, other: Any) -> None:
        recorder.note(result, "a comparison", ZeroTest(input, False) if other == 0 else None)

    @staticmethod
    @records(aten.all.dim)
    def record_all(recorder: Recorder, result: Tensor, input: Tensor, dim: int, keepdim: bool) -> None:
        test = recorder.noted(input, ZeroTest)
        by_row = test is not None and not test.rows and input.ndim == 2 and dim in (1, -1) and keepdim
        recorder.note(result, "a comparison", ZeroTest(test.of, True) if test is not None and by_row else None)

    @staticmethod
    @records(aten.where.self)
    def record(recorder: Recorder, result: Tensor, condition: Tensor, input: Tensor, other: Tensor) -> None:
        test = recorder.noted(condition, ZeroTest)
        if test is None or not test.rows or other.ndim != 2 or recorder.value(test.of) is not recorder.whole(other):
            raise Unsupported("it chooses by something other than rows of zeros")
        x = recorder.whole(other)
        recorder.add(ReplaceZeroRows(x, x.like(), recorder.parameter(input)), result)


def join_gates(steps: list[Step], read: set[Value]) -> None:
    """Make gates of the two halves of a product's output a part of the product, where nobody else reads that.

    Args:
        steps: those of a program, of which gates are removed.
        read: values that are read otherwise than by steps.
    """
    for gate in [step for step in steps if isinstance(step, Gate) and step.x is step.gate]:
        both = gate.x
        alone = both not in read and all(reader is gate for reader in both.readers)
        if alone and isinstance(both.step, Convolution) and both.step.gate_by(gate):
            both.step, both.readers = None, []  # no cycle of what is gone
            steps.remove(gate)


# Torch ops that are done by one step or another, depending on what they are given.


@records(aten.add.Tensor, aten.add_.Tensor)
def _record_sum(recorder: Recorder, result: Tensor, input: Tensor, other: Any, alpha: float) -> None:
    if not isinstance(input, Tensor):  # a number plus a tensor
        input, other = other, input
    number = recorder.number(other)
    if number is not None:
        Pointwise.record_line(recorder, result, input, shift=alpha * number)
        return
    if alpha != 1:
        raise Unsupported("it subtracts tensors")
    if input.shape != other.shape:
        _record_rows(recorder, result, input, other, Modulate.shift_by)
        return
    one, two = recorder.whole(input), recorder.whole(other)
    if one is two:
        Pointwise.record_line(recorder, result, input, scale=2)
        return
    # the step that has written the later of the two adds the other, if it can
    if recorder.written(one) < recorder.written(two):
        one, two = two, one
    _add_to(recorder, result, one, two, None)


@records(aten.sub.Tensor, aten.sub_.Tensor)
def _record_difference(recorder: Recorder, result: Tensor, input: Tensor, other: Any, alpha: float) -> None:
    _record_sum(recorder, result, input, other, -alpha)


def _add_to(recorder: Recorder, result: Tensor, y: Value, residual: Value | None, bias: Tensor | None) -> None:
    """``y + residual + bias``, by the step that has just written y, if it can."""
    if y.step is not None and recorder.joinable(y) and y.step.add(residual, bias):
        recorder.join(y, result, residual)
    elif bias is None:
        recorder.add(Pointwise(y, y.like(), cf_function.CF_IDENTITY, residual=residual), result)
    else:
        shifted = Modulate(y, y.like(), None, bias)
        recorder.add(shifted, *([] if residual is not None else [result]))
        if residual is not None:
            _add_to(recorder, result, shifted.y, residual, None)


def _record_rows(recorder: Recorder, result: Tensor, input: Tensor, other: Tensor, record: Callable[..., None]) -> None:
    """Record a sum or product of a tensor with one that has a number for every channel."""
    if input.shape != result.shape:
        input, other = other, input
    if input.shape != result.shape:
        raise Unsupported(f"it broadcasts {tuple(input.shape)} and {tuple(other.shape)}")
    record(recorder, result, recorder.whole(input), recorder.row_of(other, input))


def _is_given(value: Value) -> bool:
    """Whether it is an input, a copy or concatenation of inputs, or what attention gives of the values of an input."""
    if isinstance(value.step, Attention):
        v = value.step.v
        return _is_given(v.step.x if isinstance(v.step, Convolution) else v)
    return value.step is None or (isinstance(value.step, Gather) and all(map(_is_given, value.step.inputs)))


def _function_of(value: Value) -> cf_function | None:
    """The function whose result the value is, if it is one."""
    step = value.step
    return step.function if isinstance(step, Pointwise) and step.is_pure else None
