"""bias_residual in CUDA: see csrc/cuda/residual.h."""

from ... import cuda_library
from .native import arrange, prepare

bias_residual = cuda_library.implementation("bias_residual", arrange, prepare, aligned=(0, 2))
