"""coalesce_step in CUDA: see csrc/cuda/step.h."""

from ... import cuda_library
from ...binding import NativeKernel
from .native import BINDING

coalesce_step = NativeKernel(
    BINDING, lambda sample: cuda_library.function("coalesce_step", sample.device), aligned=("sample", "direction")
)
