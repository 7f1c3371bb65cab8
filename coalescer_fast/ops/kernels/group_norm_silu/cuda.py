"""group_norm_silu in CUDA: see csrc/cuda/group_norm.h."""

from ... import cuda_library
from ...binding import NativeKernel
from .native import BINDING

group_norm_silu = NativeKernel(
    BINDING, lambda x: cuda_library.function("group_norm_silu", x.device), aligned=("x", "skip")
)
