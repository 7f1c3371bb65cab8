"""The dtypes that networks can be computed in, by their names in torch and by the short ones of exported artefacts."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
SHORT_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8"}


def dtype_name(dtype: torch.dtype | str) -> str:
    """The name of a dtype without its module: "float32" of ``torch.float32`` and of itself."""
    return str(dtype).removeprefix("torch.")
