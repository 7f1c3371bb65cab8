"""Values and weights as the CPU library reads them: structs of csrc/abi.h, and weights in the order of its kernels."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import native_library
from ...ops.abi import cf_form, cf_image, cf_pack_args, cf_quantisation, cf_tensor4, cf_vector
from .packed_file import PackedFile, content_hash
from .value import BYTES, CODES, Range, Value

Key = tuple[str, tuple[int, ...], tuple[int, ...], int, tuple[int, int] | None]


@dataclass(frozen=True)
class Weight:
    """A parameter of a module, or a view of it, which is read when it is packed.

    Attributes:
        name: of the parameter.
        shape: of the view.
        stride: likewise.
        offset: likewise, in elements, from the parameter's own first element.
        own: the parameter by its name.
        gated: the first of the outputs that are values and of those that are gates, of a gated convolution's weights.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    own: Callable[[str], Tensor]
    gated: tuple[int, int] | None = None

    @property
    def key(self) -> Key:
        """Identifies it in its module."""
        return self.name, self.shape, self.stride, self.offset, self.gated

    def tensor(self) -> Tensor:
        own = self.own(self.name)
        # the same strides in another storage, where it may begin further on
        return self.in_turns(own.as_strided(self.shape, self.stride, own.storage_offset() + self.offset))

    def in_turns(self, outputs: Tensor) -> Tensor:
        """What there is of each output, (Cout, ...), in the order that gated convolutions read (csrc/abi.h); a copy."""
        if self.gated is None:
            return outputs
        half, channels = native_library.vector_width() // 2, self.shape[0] // 2
        parts = [outputs[first : first + channels] for first in self.gated]
        result = outputs.new_zeros(-(-channels // half), 2, half, *outputs.shape[1:])
        for turn, part in enumerate(parts):
            whole = channels // half
            result[:whole, turn] = part[: whole * half].unflatten(0, (whole, half))
            if whole * half < channels:
                result[whole, turn, : channels - whole * half] = part[whole * half :]
        return result.flatten(0, 2)


class Weights:
    """Packed weights of one module in one dtype. All of its programs share them: each weight is packed once.

    Attributes:
        dtype: of what they are multiplied with.
        winograd_memory: bytes that weights of Winograd's forms may take beyond direct ones, in one program; or None.
        file: where those in this dtype are kept on disk, or None.
        is_freed: whether the module lacks a parameter, by its name, of which packed weights are left.
    """

    def __init__(self, dtype: torch.dtype, winograd_memory: int | None = None):
        self.dtype, self.winograd_memory = dtype, winograd_memory
        self.file: PackedFile | None = None
        self.is_freed: Callable[[str], bool] = lambda name: False
        # by keys, which hold no parameters
        self._floats: dict[tuple[Key, cf_form], Tensor] = {}
        self._integers: dict[tuple[Key, int], tuple[tuple[Tensor, Tensor, Tensor], Range]] = {}
        self._uses: Counter[str] = Counter()
        self._free: Callable[[str], None] = lambda name: None

    def pack(self, weight: Weight, form: cf_form = cf_form.CF_DIRECT) -> Tensor:
        """A convolution's weights (Cout, Cin, k, k) in this dtype, in the kernel's order."""
        key = weight.key, form
        if key not in self._floats:
            self._floats[key] = self._packed(weight, form)
        self._used(weight.name)
        return self._floats[key]

    def _used(self, name: str) -> None:
        self._uses[name] -= 1
        if self._uses[name] == 0:
            self._free(name)

    def form(self, weight: Weight, form: cf_form, in_8_bits: bool) -> cf_form:
        """The form that a weight is packed in already if it was freed since, else ``form``.

        Args:
            weight: of a convolution.
            form: that it would have.
            in_8_bits: whether it multiplies in 8 bits if it is direct.
        """
        if not self.is_freed(weight.name):
            return form
        packed = {own: None for key, own in self._floats if key == weight.key}
        if in_8_bits:  # direct ones that are not were packed to find ranges
            packed.pop(cf_form.CF_DIRECT, None)
            if any(key == weight.key for key, _ in self._integers):
                packed[cf_form.CF_DIRECT] = None
        return form if form in packed else next(iter(packed), form)

    def _packed(self, weight: Weight, form: cf_form) -> Tensor:
        own = weight.tensor()
        if self.file is None:
            return kernel_order(own, self.dtype, form)
        key = f"{weight.name} {own.dtype} {weight.shape} {weight.stride} {weight.offset} {weight.gated} {form.name}"
        source = content_hash(own)
        found = self.file.get(key, source)
        if found is None:
            self.file.put(key, source, found := kernel_order(own, self.dtype, form))
        return found

    def free_after(self, uses: Mapping[str, int], free: Callable[[str], None]) -> None:
        """Have parameters freed as they are packed.

        Args:
            uses: how often each will be packed.
            free: frees one, by its name.
        """
        self._uses, self._free = Counter(uses), free

    def drop(self, names: Iterable[str]) -> None:
        """Forget the packed weights of these parameters, which have changed."""
        gone = set(names)
        self._floats = {key: packed for key, packed in self._floats.items() if key[0][0] not in gone}
        self._integers = {key: packed for key, packed in self._integers.items() if key[0][0] not in gone}

    def drop_integers(self) -> None:
        """Forget all weights in int8: the ranges that they were packed for are found anew."""
        self._integers = {}

    def quantise(self, weight: Weight, of: Range) -> tuple[Tensor, Tensor, Tensor]:
        r"""A convolution's weights in int8, for an input in uint8; those in the floating-point dtype are forgotten.

        ``sum_c w_c x_c = scale (sum_c v_c q_c - sum_c v_c zero_c)`` with ``v = round(w step / scale)`` and, for every
        output, ``scale = max |w step| / m``, where m is `native_library.largest_weight`.

        Args:
            weight: (Cout, Cin, k, k).
            of: the input's range.

        Returns:
            The packed v, int8; scale, (Cout,), float32; ``-scale sum_c v_c zero_c``, (Cout,), float32, to be added to
            the bias.
        """
        key = weight.key, id(of)
        if key not in self._integers:
            step, zero = of.quantisation()
            own = weight.tensor()
            largest = torch.maximum(own.amax((2, 3)), -own.amin((2, 3))).float()
            scale = (largest * step).amax(1).clamp_min(1e-30) / native_library.largest_weight()
            whole, sums = quantised_order(own, step, scale, zero)
            packed = whole, scale, (-scale * sums.double()).float()
            self._integers[key] = packed, of  # while the range lives, no other has its identity
            self._floats.pop((weight.key, cf_form.CF_DIRECT), None)  # ranges were found with them
        self._used(weight.name)
        return self._integers[key][0]


def kernel_order(weight: Tensor, dtype: torch.dtype, form: cf_form = cf_form.CF_DIRECT) -> Tensor:
    """A convolution's weights (Cout, Cin, k, k) in the order that cf_convolution_args in csrc/abi.h describes.

    Args:
        weight: any dtype and strides.
        dtype: of the convolution's input; for uint8 the weights become int8, and must be whole numbers.
        form: of the convolution; others than the direct one of 3x3, and of float32 and bfloat16.
    """
    if dtype == torch.uint8:
        one = torch.ones(max(weight.shape[:2]), dtype=torch.float32)
        return quantised_order(weight, one, one, torch.zeros_like(one))[0]
    return _order(weight, dtype, form)


def quantised_order(weight: Tensor, step: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """``v = round(weight step / scale)`` in int8, in the kernel's order.

    Args:
        weight: (Cout, Cin, k, k), any dtype and strides.
        step: (Cin,), float32.
        scale: (Cout,), float32.
        zero: (Cin,), float32, whole numbers from 0 to 255.

    Returns:
        The packed v; ``sum v zero`` over channels and taps, (Cout,), int64.
    """
    sums = torch.empty(weight.shape[0], dtype=torch.int64)
    step, scale, zero = step.contiguous(), scale.contiguous(), zero.contiguous()
    return _order(weight, torch.uint8, cf_form.CF_DIRECT, step, scale, zero, sums), sums


def _order(weight: Tensor, dtype: torch.dtype, form: cf_form, *quantisation: Tensor) -> Tensor:
    """Pack weights for inputs of the dtype; for uint8 with step, scale, zero and sums of `cf_pack_args`."""
    if weight.dtype not in native_library.DTYPE_CODES:
        weight = weight.float()
    outputs, channels, height, width = weight.shape
    lanes, vector = 4 // BYTES[dtype], native_library.vector_width()
    taps = height * width if form == cf_form.CF_DIRECT else (form + 2) ** 2
    count = -(-outputs // vector) * vector * taps * -(-channels // lanes) * lanes
    packed_dtype = {torch.uint8: torch.int8}.get(dtype, dtype)
    if form != cf_form.CF_DIRECT and dtype == torch.bfloat16:
        packed_dtype = torch.int16
        # in float32, the scales and what channels are multiplied with
        count += 2 * (-(-outputs // vector) * vector * taps + -(-channels // vector) * vector)
    packed = torch.empty(count, dtype=packed_dtype)
    step, scale, zero, sums = (t.data_ptr() for t in quantisation) if quantisation else (None,) * 4
    arguments = cf_pack_args.pack(
        weight=cf_tensor4(
            data=weight.data_ptr(), dtype=native_library.DTYPE_CODES[weight.dtype], strides=weight.stride()
        ),
        packed=packed.data_ptr(),
        dtype=CODES[dtype],
        outputs=outputs,
        channels=channels,
        height=height,
        width=width,
        step=step,
        scale=scale,
        zero=zero,
        sums=sums,
        form=form,
        threads=torch.get_num_threads(),
    )
    native_library.function("cf_cpu_pack")(arguments)
    return packed


class Packer:
    """What the steps of one program pack their arguments with.

    Attributes:
        weights: the module's packed weights.
        dtype: the program's.
        threads: how many may be used.
        kept: whatever the arguments point to, for as long as the program lives.
    """

    def __init__(self, weights: Weights, threads: int):
        self.weights, self.dtype, self.threads = weights, weights.dtype, threads
        self.kept: list[object] = []

    def keep(self, data: bytes | Tensor | None) -> int:
        """Keep the data, a tensor contiguous in memory; returns its address, 0 for None."""
        if data is None:
            return 0
        if isinstance(data, Tensor):
            data = data.contiguous()
            self.kept.append(data)
            return data.data_ptr()
        buffer = ctypes.create_string_buffer(data, len(data))
        self.kept.append(buffer)
        return ctypes.addressof(buffer)

    def quantisation(self, value: Value) -> cf_quantisation | None:
        """How a value in uint8 is made, None for another."""
        if value.range is None:
            return None
        step, zero = value.range.quantisation()
        return cf_quantisation(inverse=self.keep(1 / step), zero=self.keep(zero.to(torch.uint8)))

    def floats(self, parameter: Tensor | None) -> int:
        """The address of a parameter in float32."""
        return self.keep(None if parameter is None else parameter.float())

    def vector(self, parameter: Tensor | None) -> cf_vector | None:
        """A one-dimensional parameter; float64 becomes float32."""
        if parameter is None:
            return None
        v = parameter if parameter.dtype in native_library.DTYPE_CODES else parameter.float()
        return cf_vector(data=self.keep(v), dtype=native_library.DTYPE_CODES[v.dtype])


def address(value: Value | None) -> int:
    """Where a value without border begins, 0 for None."""
    return 0 if value is None else value.address


def image(value: Value | None) -> cf_image | None:
    """A value with its border, None for None."""
    if value is None:
        return None
    return cf_image(
        data=value.address, dtype=value.code, row=value.row_bytes, sample=value.sample_bytes, border=value.border
    )


def tensor4(value: Value | None) -> cf_tensor4:
    """A value without its border as (n, channels, height, width)."""
    if value is None:
        return cf_tensor4()
    size = value.element_bytes
    strides: tuple[int, ...] = value.sample_bytes // size, 1, value.row_bytes // size, value.padded
    if value.strides is not None:
        strides = value.strides
    first = value.address + value.border * (value.row_bytes + value.pixel_bytes)
    return cf_tensor4(data=first, dtype=value.code, strides=strides)
