"""bias_residual in CUDA: see csrc/cuda/residual.h."""

from ... import cuda_library
from ...binding import NativeKernel
from .native import BINDING

bias_residual = NativeKernel(
    BINDING, lambda x: cuda_library.function("bias_residual", x.device), aligned=("x", "residual")
)
