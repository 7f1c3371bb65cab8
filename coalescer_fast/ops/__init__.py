"""The fused stretches of a dual-head UNet and of its sampler, each one public function over several backends."""

from .dispatch import backends
from .kernels.bias_residual import bias_residual
from .kernels.coalesce_step import coalesce_step
from .kernels.dual_head import dual_head
from .kernels.group_norm_silu import group_norm_silu

__all__ = ["backends", "bias_residual", "coalesce_step", "dual_head", "group_norm_silu"]
