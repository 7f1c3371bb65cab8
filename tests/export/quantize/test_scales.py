from __future__ import annotations

import numpy as np
import pytest

from coalescer_fast.export.quantize.scales import quantize_weight, scale_and_zero


def test_scales():
    single = np.dtype(np.float32)
    scale, zero = scale_and_zero((-0.5, 2.05), "cpu", single)
    assert (scale, zero) == (pytest.approx(0.01), 50)
    scale, zero = scale_and_zero((1.0, 2.55), "cpu", single)  # 0 is in it: a convolution pads with it
    assert (scale, zero) == (pytest.approx(0.01), 0)
    scale, zero = scale_and_zero((-1.27, 0.3), "tensorrt", single)
    assert (scale, zero, zero.dtype) == (pytest.approx(0.01), 0, np.int8)
    for target in ("cpu", "tensorrt"):
        for dtype in (np.float16, np.float32):
            assert scale_and_zero((0.0, 0.0), target, np.dtype(dtype))[0] > 0


def test_weights_have_a_scale_a_channel():
    weight = np.zeros((3, 2, 1, 1), np.float32)
    weight[0], weight[1] = 127, [[[-1.0]], [[0.25]]]
    quantized, scales = quantize_weight(weight, np.dtype(np.float32))
    np.testing.assert_allclose(scales, [1, 1 / 127, 1])
    assert quantized[:, :, 0, 0].tolist() == [[127, 127], [-127, 32], [0, 0]]


# from the largest weights that float16 holds to its smallest number; 0.00775 gives the smallest normal scale
SIZES = [6e4, 1.0, 0.00775, 0.0077, 1e-3, 1e-4, 1e-5, 6e-6, 1e-6, 1.2e-7, 6e-8, 0.0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_no_weight_is_off_by_more_than_half_a_step(dtype):
    generator = np.random.default_rng(0)
    weight = generator.uniform(-1, 1, (len(SIZES) * 64, 8, 3, 3)) * np.repeat(SIZES, 64).reshape(-1, 1, 1, 1)
    weight = weight.astype(dtype)
    quantized, scales = quantize_weight(weight, np.dtype(dtype))
    assert scales.dtype == dtype
    assert (scales > 0).all()
    assert np.isfinite(scales).all()
    wide = scales.astype(np.float64).reshape(-1, 1, 1, 1)
    assert (np.abs(quantized * wide - weight) <= wide / 2).all()
    largest = np.abs(weight.astype(np.float64)).reshape(len(weight), -1).max(1)
    # the step is that of 8 bits, or of float16 itself
    assert (scales <= np.maximum(largest / 127 + 2.0**-24, largest / 127 * 1.001))[largest > 0].all()
    assert quantized[largest > 127 * 2.0**-24].any((1, 2, 3)).all()  # no channel is lost
