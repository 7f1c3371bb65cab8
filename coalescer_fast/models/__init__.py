"""The networks of a coalescer."""

from .autoencoder import CoalescerAutoencoder
from .description import DescriptionEncoder
from .unet import CoalescerUNet

__all__ = ["CoalescerAutoencoder", "CoalescerUNet", "DescriptionEncoder"]
