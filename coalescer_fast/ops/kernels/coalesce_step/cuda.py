"""coalesce_step in CUDA: see csrc/cuda/step.h."""

from ... import cuda_library
from .native import arrange, prepare

coalesce_step = cuda_library.implementation("coalesce_step", arrange, prepare, aligned=(0, 1))
