"""A recorded module as torch ops and fused ops, for a CUDA device.

The steps are those of native programs (runtime/native/steps.py). A step that multiplies is a convolution of cuDNN, a
product of cuBLAS or torch's scaled_dot_product_attention, a norm is `coalescer_fast.ops.group_norm_silu`, and what is
added to a convolution's result is `coalescer_fast.ops.bias_residual`:

- Channels are innermost everywhere, so that images and rows of vectors are views of the same memory. Linear layers and
  1x1 convolutions are products of matrices.
- torch adds the bias of a convolution in a pass of its own. Where a norm or a residual connection follows, that op adds
  it: `pre_bias` of the one, `bias` of the other; with one sample also what is added for every channel, such as the
  embedding of a timestep.
- Linear layers of one input are one product if they give q, k or v, or what convolutions add for every channel, whose
  own bias is then a part of it: the embedding of a timestep is projected for all blocks at once.

Nothing here waits for the device or reads from the host's memory, so that all of it can be captured in a CUDA graph.
All of it runs on a CPU, too, where it is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...ops.abi import cf_form
from ...ops.gate import gated
from ...ops.kernels.gate.reference import FUNCTIONS
from ..native import steps as native
from ..native.pack import Key, Weight, Weights
from ..native.record import Recording
from ..native.steps import Convolution, Step
from ..native.value import Unsupported, Value


class TorchWeights(Weights):
    """Weights as torch's products read them: (Cout, Cin), or (Cout, Cin, 3, 3) with channels innermost.

    They are the module's own where dtype and strides allow.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__(dtype)
        self._merged: dict[tuple[Key, ...], Tensor] = {}

    def _packed(self, weight: Weight, form: cf_form) -> Tensor:
        own = weight.tensor().to(self.dtype)
        return own.flatten(1) if weight.shape[2:] == (1, 1) else own.contiguous(memory_format=torch.channels_last)

    def merged(self, weights: Sequence[Weight]) -> Tensor:
        """Those of several linear layers, (sum of Cout, Cin)."""
        if len(weights) == 1:
            return self.pack(weights[0])
        key = tuple(weight.key for weight in weights)
        if key not in self._merged:
            self._merged[key] = torch.cat([self._packed(weight, cf_form.CF_DIRECT) for weight in weights])
        return self._merged[key]

    def drop(self, names: Iterable[str]) -> None:
        gone = set(names)
        super().drop(gone)
        self._merged = {key: made for key, made in self._merged.items() if gone.isdisjoint(each[0] for each in key)}


class Held:
    """The values of one run.

    Attributes:
        dtype: of the program.
        tensors: of each value (n, height, width, channels), contiguous or a part of the channels of such; of one that
            has strides of its own (n, channels, height, width), contiguous.
        late: biases (channels,) that whoever reads a value has to add.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.tensors: dict[Value, Tensor] = {}
        self.late: dict[Value, Tensor] = {}
        self._rounded: dict[Value, Tensor] = {}

    def rows(self, value: Value) -> Tensor:
        """(n, height, width, channels) in the program's dtype."""
        x = self.tensors[value]
        if x.dtype != self.dtype:
            if value not in self._rounded:
                self._rounded[value] = x.to(self.dtype)
            x = self._rounded[value]
        return x if value.strides is None or _is_innermost(value) else x.permute(0, 2, 3, 1).contiguous()

    def image(self, value: Value) -> Tensor:
        """(n, channels, height, width) in the program's dtype, channels innermost."""
        return self.rows(value).permute(0, 3, 1, 2)

    def exact(self, value: Value) -> Tensor:
        """(n, channels, height, width) as it was given."""
        x = self.tensors[value]
        return x.permute(0, 3, 1, 2) if value.strides is None or _is_innermost(value) else x

    def vector(self, value: Value) -> Tensor:
        """(n, channels) of one position."""
        return self.rows(value).flatten(1)

    def write(self, value: Value, image: Tensor) -> None:
        """Have an image (n, channels, height, width) be the value."""
        innermost = value.strides is None or _is_innermost(value)
        self.tensors[value] = image.permute(0, 2, 3, 1).contiguous() if innermost else image.contiguous()

    def drop(self, value: Value) -> None:
        del self.tensors[value]
        self._rounded.pop(value, None)


def _is_innermost(value: Value) -> bool:
    """Whether a value that has strides has its channels innermost."""
    return value.strides is not None and value.channels > 1 and value.strides[1] == 1


Run = Callable[[Held], None]


class CudaProgram:
    """A recorded module, ready to run, for inputs of certain shapes. It holds weights and no values.

    Attributes:
        device: where it runs.
        dtype: of all values but inputs.
        prologue: makes the inputs of what the module is given.
        described: for `explain`.
        bound: whatever a caller notes.
        memory_bytes: of its own beside weights: none.
    """

    memory_bytes = 0

    def __init__(self, recording: Recording, weights: TorchWeights, device: torch.device, backend: str = "auto"):
        """Choose ops and take over weights.

        Args:
            recording: what the module does; no other program can be made of it.
            weights: the module's, of the program's dtype.
            device: where they are.
            backend: of the fused ops, see `coalescer_fast.ops`.
        """
        self.device, self.dtype = device, weights.dtype
        self.prologue = recording.prologue.on(device)
        self._inputs = recording.inputs
        self._outputs = recording.outputs
        plan = Plan(recording, weights, backend)
        runs = [(step, _run_of(step, plan)) for step in recording.steps]
        last = {value: n for n, (step, _) in enumerate(runs) for value in (*step.outputs, *plan.reads(step))}
        for value, _ in recording.outputs:
            last.pop(value, None)
        self._runs = [(run, [value for value, at in last.items() if at == n]) for n, (_, run) in enumerate(runs)]
        self.products = sum(isinstance(step, Convolution) for step in recording.steps)
        self.described = f", {self.products} products{self.prologue.described}"
        self.bound: object = None
        # steps hold weights, and know each other by values: without these cycles all is freed with the program
        for value in {value for step in recording.steps for value in step.values}:
            value.step, value.readers = None, []

    def __call__(self, *given: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """The outputs for what the module is given, in ``dtype``."""
        held = Held(self.dtype)
        for value, x in zip(self._inputs, self.prologue(given), strict=True):
            held.tensors[value] = _as_memory(x, value)
        for run, read in self._runs:
            run(held)
            for value in read:
                held.drop(value)
        return tuple(_part(held.tensors[value], like).to(dtype) for value, like in self._outputs)


def _as_memory(x: Tensor, value: Value) -> Tensor:
    """An input as the value that was recorded for it."""
    like = value.tensor
    assert like is not None
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).contiguous()
    return x.contiguous().view(value.n, value.height, value.width, value.channels)


def _part(x: Tensor, like: Tensor) -> Tensor:
    """What a module gives of a value."""
    return _strided(x, int(like.storage_offset()), like.stride(), like.shape)


class Plan:
    """What is decided for the steps of a program together.

    Attributes:
        weights: of the module.
        backend: of the fused ops.
        late: values that are written without the bias of their convolution, see `Held`.
        same: values that are functions of the same value as an earlier one.
        merged: by linear layer, those that it multiplies for, itself among them; none for one of the others.
        relieved: convolutions whose bias is in what they add for every channel of a sample.
    """

    def __init__(self, recording: Recording, weights: TorchWeights, backend: str):
        self.weights, self.backend = weights, backend
        kept = {value for value, _ in recording.outputs}
        products = [step for step in recording.steps if isinstance(step, Convolution)]
        self.late = {step.y for step in products if step.y not in kept and _leaves_its_bias(step)}
        self.same: dict[Value, Value] = {}
        functions: dict[Hashable, Value] = {}
        for step in recording.steps:
            if isinstance(step, native.Pointwise) and step.is_pure:
                first = functions.setdefault((self._first(step.x), step.function), step.y)
                if first is not step.y:
                    self.same[step.y] = first
        groups: dict[Hashable, list[Convolution]] = {}
        for step in products:
            if step.y not in kept and (use := _use(step)):
                groups.setdefault((self._first(step.x), step.bias is None, use), []).append(step)
        self.merged = {step: group if step is group[0] else [] for group in groups.values() for step in group}
        readers = {step.row: step for step in products if step.row is not None}
        self.relieved = {readers[step.y] for step in self.merged if step.bias is not None and step.y in readers}

    def _first(self, value: Value) -> Value:
        return self.same.get(value, value)

    def reads(self, step: Step) -> list[Value]:
        """The values that a step reads."""
        return step.inputs + [self.same[value] for value in step.outputs if value in self.same]

    def bias(self, step: Convolution) -> Tensor | None:
        """What a linear layer of `merged` adds: with its own bias that of the convolution that is relieved of it."""
        if step.bias is None:
            return None
        (reader,) = step.y.readers
        if isinstance(reader, Convolution) and reader in self.relieved and reader.bias is not None:
            return step.bias.float() + reader.bias.float()
        return step.bias.float()

    def floats(self, tensor: Tensor | None) -> Tensor | None:
        """A parameter in the program's dtype."""
        return None if tensor is None else tensor.detach().to(self.weights.dtype)


def _is_matrix(step: Convolution) -> bool:
    return step.weight.shape[2:] == (1, 1)


def _use(step: Convolution) -> str:
    """What a linear layer is for if it can be one with others of its input: "heads" or "row"; else ""."""
    plain = step.residual is step.row is None and step.gate is None and not step.relu and step.stride == 1
    if not plain or not _is_matrix(step) or len(step.y.readers) != 1:
        return ""
    (reader,) = step.y.readers
    if isinstance(reader, native.Attention) and step.y in (reader.q, reader.k, reader.v):
        return "heads"
    return "row" if isinstance(reader, Convolution) and reader.row is step.y else ""


def _leaves_its_bias(step: Convolution) -> bool:
    """Whether the one op that reads a convolution adds its bias."""
    bare = step.residual is None and step.gate is None and not step.relu and not _is_matrix(step)
    given = step.bias is not None or step.row is not None
    if not bare or not given or len(step.y.readers) != 1 or (step.row is not None and step.y.n > 1):
        return False
    (reader,) = step.y.readers
    if isinstance(reader, native.GroupNormSiLU):
        return reader.x is step.y and reader.skip is None and reader.pre_bias is None
    return isinstance(reader, Convolution) and reader.residual is step.y


# What runs each step.


def _run_of(step: Step, plan: Plan) -> Run:
    make = RUNS.get(type(step))
    if make is None:
        raise Unsupported(f"there is no CUDA op for {step.kind}")
    return make(step, plan)


def _convolution(step: Convolution, plan: Plan) -> Run:
    if step in plan.merged:
        return _merged(plan.merged[step], plan)
    x, y, residual, row, relu = step.x, step.y, step.residual, step.row, step.relu
    bias = None if step in plan.relieved else plan.floats(step.bias)
    late, backend = y in plan.late, plan.backend
    multiply = _product(step, plan)
    gate = step.gate
    value_first, gate_first = step.weight.gated or (0, 0)

    def run(held: Held) -> None:
        vector, rows = bias, None  # what is added for every channel, and for every channel of a sample
        if row is not None:
            rows = held.vector(row) if vector is None else held.vector(row) + vector
            vector, rows = (rows[0], None) if y.n == 1 else (None, rows)
        if late:
            assert vector is not None
            held.late[y] = vector
        left = held.late.pop(residual, None) if residual is not None else None
        if left is not None:
            vector = left if vector is None else vector + left
        z = multiply(held.rows(x), None if late or residual is not None else vector)  # (n, height, width, outputs)
        if rows is not None:
            z.add_(rows[:, None, None])
        if residual is not None:
            added = ops.bias_residual(z.permute(0, 3, 1, 2), vector, held.image(residual), backend=backend)
            z = added.permute(0, 2, 3, 1).contiguous()
        if relu:
            z.relu_()
        if gate is not None:
            z = gated(z, value_first, gate_first, y.channels, gate, backend)
        held.tensors[y] = z

    return run


def _product(step: Convolution, plan: Plan) -> Callable[[Tensor, Tensor | None], Tensor]:
    """(n, height, width, channels) and a bias to (n, height, width, outputs)."""
    weight = plan.weights.pack(replace(step.weight, gated=None))  # gated weights have an order for native kernels
    stride, padding, size = step.stride, step.padding, (step.y.height, step.y.width)

    def matrix(x: Tensor, bias: Tensor | None) -> Tensor:
        if stride != 1:
            x = x[:, ::stride, ::stride].contiguous()
        return F.linear(x.flatten(0, 2), weight, bias).view(-1, *size, weight.shape[0])

    def convolution(x: Tensor, bias: Tensor | None) -> Tensor:
        image = x.permute(0, 3, 1, 2)
        if padding == 0:  # zeros after the last row and column alone
            image = F.pad(image, (0, 1, 0, 1))
        return F.conv2d(image, weight, bias, stride, padding).permute(0, 2, 3, 1).contiguous()

    return matrix if weight.ndim == 2 else convolution


def _merged(linear: Sequence[Convolution], plan: Plan) -> Run:
    if not linear:
        return lambda held: None
    x, results = linear[0].x, [step.y for step in linear]
    weight = plan.weights.merged([step.weight for step in linear])
    biases = [bias for bias in map(plan.bias, linear) if bias is not None]
    bias = plan.floats(torch.cat(biases)) if biases else None
    sizes = [y.channels for y in results]

    def run(held: Held) -> None:
        rows = held.rows(x)
        z = F.linear(rows.flatten(0, 2), weight, bias).view(*rows.shape[:3], -1)
        held.tensors.update(zip(results, z.split(sizes, -1)))

    return run


def _group_norm(step: native.GroupNormSiLU, plan: Plan) -> Run:
    x, y, skip, scale, shift = step.x, step.y, step.skip, step.scale, step.shift
    groups, eps, activation, backend = step.num_groups, step.eps, "silu" if step.silu else None, plan.backend
    weight, bias, pre_bias = (None if p is None else p.detach() for p in (step.weight, step.bias, step.pre_bias))

    def run(held: Held) -> None:
        z = ops.group_norm_silu(
            held.image(x),
            groups,
            weight,
            bias,
            eps,
            scale=None if scale is None else held.vector(scale),
            shift=None if shift is None else held.vector(shift),
            skip=None if skip is None else held.image(skip),
            pre_bias=held.late.pop(x, pre_bias),
            activation=activation,
            backend=backend,
        )
        held.write(y, z)

    return run


def _gather(step: native.Gather, plan: Plan) -> Run:
    x, y, other, first = step.x, step.y, step.other, step.first
    channels = y.channels if other is None else x.channels
    size = None if (x.height, x.width) == (y.height, y.width) else [y.height, y.width]
    scales = [None if scale is None else 1 / scale for scale in step.scales]

    def run(held: Held) -> None:
        z = held.rows(x)
        if channels != x.channels:
            z = z[..., first : first + channels].contiguous()
        if other is not None:
            z = torch.cat([z, held.rows(other)], -1)
        if size is not None:
            z = torch.ops.aten.upsample_nearest2d.default(z.permute(0, 3, 1, 2), size, *scales)
            z = z.permute(0, 2, 3, 1).contiguous()
        held.tensors[y] = z

    return run


def _attention(step: native.Attention, plan: Plan) -> Run:
    q, k, v, y, mask, bias, bias_view = step.q, step.k, step.v, step.y, step.mask, step.bias, step.bias_view
    n, heads, width, scale = y.n, step.heads, step.width, step.scale
    lengths, views = (step.length, step.k_length, step.k_length), step.views

    def run(held: Held) -> None:
        query, key, value = (
            _heads(held.rows(each), view, n, heads, length, width)
            for each, view, length in zip((q, k, v), views, lengths)
        )
        allowed = None
        if mask is not None:
            allowed = held.tensors[mask].view(n, 1, 1, -1)
        elif bias is not None and bias_view is not None:
            allowed = _head_view(held.rows(bias), bias_view, (n, heads, *lengths[:2]))
        z = F.scaled_dot_product_attention(query, key, value, allowed, scale=scale)
        held.tensors[y] = z.transpose(1, 2).reshape(n, y.height, y.width, heads * width)

    return run


def _heads(x: Tensor, view: native.Heads, n: int, heads: int, length: int, width: int) -> Tensor:
    """(n, heads, length, width), a view of a value (n, height, width, channels)."""
    channels, begin = x.shape[-1], view.offset
    usual = (view.sample, view.head, view.row) == (length * channels, width, channels)
    if usual and begin + heads * width <= channels:
        return x.flatten(1, 2)[..., begin : begin + heads * width].reshape(n, length, heads, width).transpose(1, 2)
    return _head_view(x, view, (n, heads, length, width))


def _head_view(x: Tensor, view: native.Heads, shape: Sequence[int]) -> Tensor:
    return _strided(x, view.offset, (view.sample, view.head, view.row, 1), shape)


def _strided(x: Tensor, offset: int, strides: Sequence[int], shape: Sequence[int]) -> Tensor:
    """A view of a value's memory."""
    x = x.contiguous()
    view: Tensor = x.as_strided(tuple(shape), tuple(strides), x.storage_offset() + offset)
    return view


def _dual_head(step: native.DualHead, plan: Plan) -> Run:
    h, y, distance, sample, anchor, backend = step.h, step.y, step.distance, step.sample, step.anchor, plan.backend
    direction_weight = step.direction_weight.detach().contiguous(memory_format=torch.channels_last)
    direction_bias, distance_bias = step.direction_bias, step.distance_bias
    if direction_bias is None or distance_bias is None:
        raise Unsupported("its heads have no bias")
    weights = (direction_weight, *(p.detach() for p in (direction_bias, step.distance_weight, distance_bias)))

    def run(held: Held) -> None:
        given = {}
        if sample is not None and anchor is not None:
            given = {"sample": held.exact(sample), "anchor": held.exact(anchor)}
        direction, far = ops.dual_head(held.image(h), *weights, **given, backend=backend)
        held.write(y, direction)
        held.tensors[distance] = far.view(-1, 1, 1, 1)

    return run


def _layer_norm(step: native.LayerNorm, plan: Plan) -> Run:
    x, y, eps, weight, bias = step.x, step.y, step.eps, plan.floats(step.weight), plan.floats(step.bias)

    def run(held: Held) -> None:
        held.tensors[y] = F.layer_norm(held.rows(x), (x.channels,), weight, bias, eps)

    return run


def _gate(step: native.Gate, plan: Plan) -> Run:
    x, y, gate, function, backend = step.x, step.y, step.gate, step.function, plan.backend
    firsts = step.x_first, step.gate_first
    values, gates = (slice(first, first + y.channels) for first in firsts)

    def run(held: Held) -> None:
        if gate is x:
            held.tensors[y] = gated(held.rows(x), *firsts, y.channels, function, backend)
        else:
            held.tensors[y] = held.rows(x)[..., values] * FUNCTIONS[function](held.rows(gate)[..., gates])

    return run


def _pointwise(step: native.Pointwise, plan: Plan) -> Run:
    x, y, residual, function = step.x, step.y, step.residual, FUNCTIONS[step.function]
    lines, same = ((step.x_scale, step.x_shift), (step.y_scale, step.y_shift)), plan.same.get(y)

    def line(z: Tensor, scale: float, shift: float) -> Tensor:
        z = z if scale == 1 else z * scale
        return z if shift == 0 else z + shift

    def run(held: Held) -> None:
        if same is not None:
            held.tensors[y] = held.tensors[same]
            return
        z = line(function(line(held.rows(x), *lines[0])), *lines[1])
        held.tensors[y] = z if residual is None else z + held.rows(residual)

    return run


def _modulate(step: native.Modulate, plan: Plan) -> Run:
    x, y, plus = step.x, step.y, step.plus
    scale, shift = (each if isinstance(each, Value) else plan.floats(each) for each in (step.scale, step.shift))

    def run(held: Held) -> None:
        def vector(each: Value | Tensor) -> Tensor:
            return held.vector(each)[:, None, None] if isinstance(each, Value) else each

        z = held.rows(x)
        if scale is not None:
            z = z * (vector(scale) + plus)
        held.tensors[y] = z if shift is None else z + vector(shift)

    return run


def _replace_zero_rows(step: native.ReplaceZeroRows, plan: Plan) -> Run:
    x, y, row = step.x, step.y, step.row.detach().to(plan.weights.dtype)

    def run(held: Held) -> None:
        z = held.rows(x)
        held.tensors[y] = torch.where((held.tensors[x] == 0).all(-1, keepdim=True), row, z)

    return run


RUNS: dict[type[Step], Callable[..., Run]] = {
    Convolution: _convolution,
    native.GroupNormSiLU: _group_norm,
    native.Gather: _gather,
    native.Attention: _attention,
    native.DualHead: _dual_head,
    native.LayerNorm: _layer_norm,
    native.Gate: _gate,
    native.Pointwise: _pointwise,
    native.Modulate: _modulate,
    native.ReplaceZeroRows: _replace_zero_rows,
}
