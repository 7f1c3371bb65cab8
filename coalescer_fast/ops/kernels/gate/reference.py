"""A gated activation in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...abi import cf_function

FUNCTIONS: dict[cf_function, Callable[[Tensor], Tensor]] = {
    cf_function.CF_IDENTITY: lambda x: x,
    cf_function.CF_SILU: F.silu,
    cf_function.CF_TANH: torch.tanh,
    cf_function.CF_RELU: F.relu,
    cf_function.CF_GELU: F.gelu,
    cf_function.CF_GELU_TANH: partial(F.gelu, approximate="tanh"),
    cf_function.CF_SIGMOID: torch.sigmoid,
}


def gate(x: Tensor, value: int, gate: int, channels: int, function: cf_function) -> Tensor:
    return x[..., value : value + channels] * FUNCTIONS[function](x[..., gate : gate + channels])
