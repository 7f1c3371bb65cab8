"""The image autoencoder: diffusers' AutoencoderTiny on patches, with latents of zero mean and unit RMS per channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DecoderTiny, EncoderTiny
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


class CoalescerAutoencoder(ModelMixin, ConfigMixin):
    r"""The encoder and decoder of diffusers' AutoencoderTiny between two pixel (un)shuffles, the latents standardised.

    ``z = (E(unshuffle_p(x)) - mean_c) / sqrt(var_c + 1e-5)`` and ``x' = shuffle_p(D(z))`` with E and D the two
    networks. ``mean_c`` and ``var_c`` are statistics of the training pictures, one a latent channel, stored with the
    weights; the decoder takes the standardised latent, so nothing has to be scaled between the two.

    Shapes: pictures (N, 3, H, W) in [-1, 1] with H and W multiples of ``scale_factor`` f; latents
    (N, latent_channels, H/f, W/f).

    Args:
        patch_size: side p of the pixel blocks that become channels before the encoder and blocks again after the
            decoder.
        latent_channels: channels of the latent.
        width: channels of every hidden convolution.
        encoder_blocks: residual blocks a resolution level, from the finest; every level but the first halves the
            resolution.
        decoder_blocks: residual blocks a level, from the coarsest.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        latent_channels: int = 16,
        width: int = 64,
        encoder_blocks: tuple[int, ...] = (1, 2, 2),
        decoder_blocks: tuple[int, ...] = (3, 3, 1),
    ):
        if len(encoder_blocks) != len(decoder_blocks):
            blocks = f"encoder_blocks {tuple(encoder_blocks)} and decoder_blocks {tuple(decoder_blocks)}"
            raise ValueError(f"{blocks} must have as many levels")
        channels = 3 * patch_size**2
        super().__init__()
        self.encoder = EncoderTiny(
            channels, latent_channels, tuple(encoder_blocks), (width,) * len(encoder_blocks), act_fn="relu"
        )
        self.decoder = DecoderTiny(
            latent_channels,
            channels,
            tuple(decoder_blocks),
            (width,) * len(decoder_blocks),
            upsampling_scaling_factor=2,
            act_fn="relu",
            upsample_fn="nearest",
        )
        self.patch_size = patch_size
        self.scale_factor = patch_size * 2 ** (len(encoder_blocks) - 1)
        self.latent_norm = nn.BatchNorm2d(latent_channels, affine=False, momentum=0.02)

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[torch.Tensor]:
        """Encode pictures (N, 3, H, W) in [-1, 1] to standardised latents (N, latent_channels, H/f, W/f)."""
        latents = self.latent_norm(self.encoder(F.pixel_unshuffle(x, self.patch_size)))
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self, x: torch.Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode standardised latents to pictures, about in [-1, 1]. ``generator`` is unused, as in diffusers."""
        if isinstance(self.decoder, DecoderTiny) and (x.ndim != 4 or x.shape[1] != self.config.latent_channels):
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (N, {self.config.latent_channels}, H, W)")
        sample = F.pixel_shuffle(self.decoder(x), self.patch_size)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self, sample: torch.Tensor, latent_noise: torch.Tensor | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Compute ``decode(encode(sample) + latent_noise)``, whose error training minimises."""
        (latents,) = self.encode(sample, return_dict=False)
        if latent_noise is not None:
            latents = latents + latent_noise
        return self.decode(latents, return_dict=return_dict)
