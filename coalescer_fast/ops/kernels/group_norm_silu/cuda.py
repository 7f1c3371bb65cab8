"""group_norm_silu in CUDA: see csrc/cuda/group_norm.h."""

from ... import cuda_library
from .native import arrange, prepare

group_norm_silu = cuda_library.implementation("group_norm_silu", arrange, prepare, aligned=(0, 7))
