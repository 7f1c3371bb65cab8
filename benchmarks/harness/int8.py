"""OpenVINO's models in int8, by NNCF: `pip install nncf`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def quantized(model: Any, calls: Sequence[Sequence[Any]]) -> Any:
    """NNCF's post-training quantization with its preset mixed: symmetric weights, asymmetric activations.

    The model type is transformer, which leaves sums in float and smooths the activations of linear layers; without, the
    error of emoji-64 is twenty times as large. Biases are not corrected: it takes long and makes no difference here.

    Args:
        model: an OpenVINO model in float32.
        calls: the inputs of calls to find ranges with, as arrays.
    """
    import nncf

    return nncf.quantize(
        model,
        nncf.Dataset([list(call) for call in calls]),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(calls),
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
    )
