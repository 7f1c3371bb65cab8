"""Scales and zero points: how float numbers become 8-bit integers.

    q = clip(round(x / s) + z),   x ≈ (q - z) s

For "tensorrt", inputs are in int8 with z = 0; for "cpu", inputs and outputs are in uint8, each with its own z. Weights
are in int8 with z = 0 and a scale for each output channel, in the graph's dtype, such that |(q - z) s - w| <= s / 2. In
float16 the scales of small weights are subnormal.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Range = tuple[float, float]  # smallest and largest value of a tensor
# Smallest scale of an input or output, by which engines divide. In float16 the smallest power of two whose reciprocal
# is finite, because TensorRT-RTX 1.7 multiplies by that; in float32 one whose products and quotients with the scales of
# weights are finite.
SMALLEST = {"float16": 2.0**-15, "float32": 2.0**-100}


def span(ends: Range, target: str) -> tuple[float, int]:
    """The distance between neighbouring integers, and how many of them there are.

    For "tensorrt" the integers are spread over ±max |x|. For "cpu" they are spread over the range, extended to 0, so
    that the zeros of a padding are exact.

    Args:
        ends: The range of a tensor.
        target: "cpu" or "tensorrt".

    Returns:
        Step, before it is rounded to a dtype, and number of steps.
    """
    least, most = min(ends[0], 0.0), max(ends[1], 0.0)
    return ((most - least) / 255, 255) if target == "cpu" else (max(most, -least) / 127, 127)


def scale_and_zero(ends: Range, target: str, dtype: Any) -> tuple[Any, Any]:
    """Scale, at least `SMALLEST`, and zero point of a tensor; arguments as of `span`."""
    step, steps = span(ends, target)
    scale = scale_for(max(step, SMALLEST[dtype.name]) * steps, steps, dtype)[()]
    if target != "cpu":
        return scale, np.int8(0)
    return scale, np.uint8(np.rint(-min(ends[0], 0.0) / scale).clip(0, 255))


def scale_for(largest: Any, steps: int, dtype: Any) -> Any:
    """Scales s > 0 with largest / s <= steps + 1/2, so that rounding to integers is off by at most s / 2.

    Args:
        largest: A number, or an array of them.
        steps: The largest integer.
        dtype: numpy dtype of the scales.
    """
    largest = np.asarray(largest, np.float64)
    # Subnormal in float16 is fine: ONNX Runtime and TensorRT-RTX 1.7 read the scales of weights into float32.
    smallest = max(float(np.finfo(dtype).smallest_subnormal), float(np.finfo(np.float32).tiny))
    scale = np.maximum(largest / steps, smallest).astype(dtype)
    too_small = largest > (steps + 0.5) * scale.astype(np.float64)  # rounded down, by much if it is subnormal
    return np.where(too_small, np.nextafter(scale, dtype.type(np.inf)), scale)


def quantize_weight(weight: Any, dtype: Any, least: Any = 0.0) -> tuple[Any, Any]:
    """Quantize a weight with a scale for each output channel.

    Args:
        weight: Array (C, ...).
        dtype: numpy dtype of the scales.
        least: Smallest scale of each channel, (C,).

    Returns:
        Integers in int8 (C, ...), and scales (C,): max |w| / 127, or ``least`` where that is larger.
    """
    wide = weight.astype(np.float64)
    needed = np.maximum(np.abs(wide).reshape(len(wide), -1).max(1), 127 * least)
    scales = scale_for(needed, 127, dtype)
    scales[needed == 0] = 1
    quantized = np.rint(wide / scales.astype(np.float64).reshape(-1, *[1] * (wide.ndim - 1)))
    return quantized.clip(-127, 127).astype(np.int8), scales
