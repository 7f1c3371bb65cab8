"""The fused stretches of a dual-head UNet and of its sampler, each one public function over several backends."""

from .dispatch import backends
from .group_norm import group_norm_silu
from .head import dual_head
from .residual import bias_residual
from .step import coalesce_step

__all__ = ["backends", "bias_residual", "coalesce_step", "dual_head", "group_norm_silu"]
