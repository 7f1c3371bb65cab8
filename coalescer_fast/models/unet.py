"""The dual-head UNet of a coalescer, written once against `coalescer_fast.ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .. import ops
from ..ops.abi import cf_function
from ..ops.gate import gated
from ..ops.kernels.dual_head.reference import combine
from .layers import Convolution, GroupNormSiLU, is_plain

# softplus of it is 1, so that an untrained network with an anchor moves exactly onto the anchor
SOFTPLUS_INVERSE_OF_1 = 0.5413248546129181

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    # the embedded model: 16x8x8 latents of 64x64 pictures
    "emoji-64": dict(
        sample_size=8,
        latent_channels=16,
        block_out_channels=(96, 128, 160),
        layers_per_block=1,
        norm_num_groups=8,
        attention_levels=(1,),
        mid_attention=False,
        num_attention_heads=4,
        description_dim=128,
        embedding_dim=256,
        anchor="mlp",
        anchor_hidden_dim=1152,
    ),
    # the size of DDPM's CIFAR-10 network (arXiv 2006.11239)
    "m": dict(
        sample_size=32,
        latent_channels=4,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        norm_num_groups=32,
        attention_levels=(1,),
        num_attention_heads=1,
        description_dim=128,
        embedding_dim=272,
    ),
    # the size of Stable Diffusion 1.5's network (arXiv 2112.10752)
    "l": dict(
        sample_size=64,
        latent_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        norm_num_groups=32,
        attention_levels=(0, 1, 2),
        num_attention_heads=8,
        cross_attention_dim=768,
        description_dim=768,
        embedding_dim=640,
    ),
}


# options that were added later, with the defaults that leave a network as it was
LATER = {"norm_eps": 1e-5, "transformer_layers_per_block": 1, "sample_residual": 0.0}


@dataclass
class CoalescerUNetOutput(BaseOutput):
    """What the network answers.

    Attributes:
        direction: (N, Cz, H, W), points at the nearest fitting latent.
        distance: (N,), how far it is, in RMS units.
    """

    direction: torch.Tensor
    distance: torch.Tensor


@dataclass
class Conditioning:
    """All that the network derives from descriptions alone, computed once a call whatever the number of steps.

    Attributes:
        film: (scale, shift), each (N, C), of each residual block in the order of `CoalescerUNet.residual_blocks`.
        anchor: p (N, Cz, H, W), or None.
        keys_values: (keys, values), each (N, heads, L, head_dim), of each cross-attention in order.
        mask: (N, L) bool, or None.
    """

    film: list[tuple[torch.Tensor, torch.Tensor]]
    anchor: torch.Tensor | None
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]
    mask: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """List all tensors, in order."""
        pairs = [t for pair in (*self.film, *self.keys_values) for t in pair]
        return pairs + [t for t in (self.anchor, self.mask) if t is not None]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Conditioning:
        """Make the conditioning of ``function(tensor)`` for every tensor."""
        return Conditioning(
            [(function(scale), function(shift)) for scale, shift in self.film],
            None if self.anchor is None else function(self.anchor),
            [(function(keys), function(values)) for keys, values in self.keys_values],
            None if self.mask is None else function(self.mask),
        )

    def rounded(self, dtype: torch.dtype) -> Conditioning:
        """Round to the dtype of a network. The anchor stays as it is: the heads are residual to it."""
        film, keys_values = ([(a.to(dtype), b.to(dtype)) for a, b in pairs] for pairs in (self.film, self.keys_values))
        return Conditioning(film, self.anchor, keys_values, self.mask)

    def expand(self, n: int) -> Conditioning:
        """Repeat the conditioning of one description for n samples, without a copy; one of n already is itself."""
        return self if self.film[0][0].shape[0] == n else self.map(lambda x: x.expand(n, *x.shape[1:]))

    def take(self, rows: torch.Tensor, n: int) -> Conditioning:
        """The conditioning of some of n samples, itself if ``rows`` are all of them."""
        return self if len(rows) == n else self.map(lambda x: x[rows])


def replace_empty(description: torch.Tensor, null: torch.Tensor) -> torch.Tensor:
    """Replace every all-zero row of ``description`` (N, D) by the learned ``null`` (D,)."""
    return torch.where((description == 0).all(1, keepdim=True), null.to(description.dtype), description)


def zero_initialise(*modules: nn.Module) -> None:
    """Set all parameters to 0. A residual block that ends in such a layer starts as the identity."""
    for module in modules:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


def _of_each_level(name: str, value: int | Sequence[int], levels: int) -> Sequence[int]:
    """A setting of all levels, or of each, as one of each."""
    if isinstance(value, int):
        return [value] * levels
    if len(value) != levels:
        raise ValueError(f"{name} is {tuple(value)}; expected a number, or one for each of the {levels} levels")
    return value


class AnchorMLP(nn.Module):
    """The mean latent p of a description: (N, D) -> (N, Cz, S, S) by two residual LayerNorm-Linear-SiLU blocks."""

    def __init__(self, description_dim: int, hidden_dim: int, latent_channels: int, sample_size: int):
        super().__init__()
        self.shape = (latent_channels, sample_size, sample_size)
        self.null = nn.Parameter(torch.zeros(description_dim, dtype=torch.get_default_dtype()))
        self.linear_in = nn.Linear(description_dim, hidden_dim)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_dim) for _ in range(2))
        self.linears = nn.ModuleList(nn.Linear(hidden_dim, hidden_dim) for _ in range(2))
        self.linear_out = nn.Linear(hidden_dim, latent_channels * sample_size**2)
        zero_initialise(self.linear_out)

    def forward(self, description: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.linear_in(replace_empty(description, self.null)))
        for norm, linear in zip(self.norms, self.linears):
            h = h + F.silu(linear(norm(h)))
        anchor: torch.Tensor = self.linear_out(h).view(-1, *self.shape)
        return anchor


class ResidualBlock(nn.Module):
    """Two GroupNorm-SiLU-conv3x3, the second norm scaled and shifted, with a residual connection.

    The input is x or cat([x, skip]); a 1x1 convolution brings the residual connection to other channels.
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, num_groups: int, eps: float = 1e-5):
        super().__init__()
        self.norm1 = GroupNormSiLU(num_groups, in_channels, eps)
        self.conv1 = Convolution(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = GroupNormSiLU(num_groups, out_channels, eps)
        self.conv2 = Convolution(out_channels, out_channels, 3, padding=1)
        self.shortcut = Convolution(in_channels, out_channels, 1) if in_channels != out_channels else None
        zero_initialise(self.film, self.conv2)

    def forward(
        self, x: torch.Tensor, film: tuple[torch.Tensor, torch.Tensor], skip: torch.Tensor | None = None
    ) -> torch.Tensor:
        scale, shift = film
        h = self.norm1(x, skip)
        if is_plain(self.conv1):  # the norm adds the bias while it reads
            h = self.norm2(self.conv1(h, add_bias=False), scale=scale, shift=shift, pre_bias=self.conv1.bias)
        else:
            h = self.norm2(self.conv1(h), scale=scale, shift=shift)
        y: torch.Tensor = self.conv2(h, residual=self._residual(x, skip))
        return y

    def _residual(self, x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        if self.shortcut is not None and skip is not None and is_plain(self.shortcut):
            residual: torch.Tensor = self.shortcut(x, skip)
        else:
            both = x if skip is None else torch.cat([x, skip], 1)
            residual = both if self.shortcut is None else self.shortcut(both)
        return residual


class SelfAttention(nn.Module):
    """x + proj(attention(GroupNorm(x))) over the H*W positions."""

    def __init__(self, channels: int, num_heads: int, num_groups: int, eps: float = 1e-5):
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNormSiLU(num_groups, channels, eps, activation=None)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        zero_initialise(self.to_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.norm(x).flatten(2).transpose(1, 2)  # [N, H*W, C]
        q, k, v = (split_heads(part, self.num_heads) for part in self.to_qkv(rows).chunk(3, -1))
        rows = self.to_out(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        y: torch.Tensor = x + rows.transpose(1, 2).reshape(x.shape)
        return y


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention to token rows and a GEGLU feed-forward, each pre-norm and residual.

    Attributes:
        backend: of the gate, see `coalescer_fast.ops`.
    """

    backend = "reference"

    def __init__(self, channels: int, num_heads: int, cross_attention_dim: int):
        super().__init__()
        self._add_layer(channels, num_heads, cross_attention_dim)

    def _add_layer(self, channels: int, num_heads: int, cross_attention_dim: int) -> None:
        self.num_heads = num_heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out1 = nn.Linear(channels, channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_kv = nn.Linear(cross_attention_dim, 2 * channels, bias=False)
        self.to_out2 = nn.Linear(channels, channels)
        self.ff_in = nn.Linear(channels, 8 * channels)
        self.ff_out = nn.Linear(4 * channels, channels)

    def keys_values(self, token_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project token rows (N, L, D') to keys and values, each (N, heads, L, head_dim)."""
        k, v = (split_heads(part, self.num_heads) for part in self.to_kv(token_rows).chunk(2, -1))
        return k, v

    def transform(
        self, h: torch.Tensor, keys_values: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend and feed forward, rows (N, H*W, C)."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.to_qkv(self.norm1(h)).chunk(3, -1))
        h = h + self.to_out1(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        q = split_heads(self.to_q(self.norm2(h)), self.num_heads)
        attention_mask = None if mask is None else mask[:, None, None, :]
        h = h + self.to_out2(merge_heads(F.scaled_dot_product_attention(q, *keys_values, attn_mask=attention_mask)))
        x = self.ff_in(self.norm3(h))
        half = x.shape[-1] // 2
        y: torch.Tensor = h + self.ff_out(gated(x, 0, half, half, cf_function.CF_GELU, self.backend))
        return y

    def forward(
        self, h: torch.Tensor, keys_values: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None
    ) -> torch.Tensor:
        return self.transform(h, keys_values, mask)


class TransformerBlock(TransformerLayer):
    """One or several transformer layers between two 1x1 projections, with a residual connection around the whole.

    The layout of Stable Diffusion's spatial transformer (arXiv 2112.10752). The first layer is the block's own; those
    after it are in ``further``, which a block of one layer does not have.
    """

    def __init__(self, channels: int, num_heads: int, cross_attention_dim: int, num_groups: int, num_layers: int = 1):
        nn.Module.__init__(self)
        self.norm = GroupNormSiLU(num_groups, channels, 1e-6, activation=None)
        self.proj_in = nn.Linear(channels, channels)
        self._add_layer(channels, num_heads, cross_attention_dim)
        self.proj_out = nn.Linear(channels, channels)
        if num_layers > 1:
            self.further = nn.ModuleList(
                TransformerLayer(channels, num_heads, cross_attention_dim) for _ in range(num_layers - 1)
            )

    @property
    def layers(self) -> list[TransformerLayer]:
        """All layers in the order in which they run, the block as the first."""
        return [self, *getattr(self, "further", ())]

    def forward(
        self,
        x: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        further: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> torch.Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [N, H*W, C]
        h = self.transform(h, keys_values, mask)
        for layer, pair in zip(self.layers[1:], further):
            h = layer(h, pair, mask)
        y: torch.Tensor = x + self.proj_out(h).transpose(1, 2).reshape(x.shape)
        return y


def split_heads(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(N, L, C) -> (N, heads, L, C/heads)."""
    heads: torch.Tensor = rows.unflatten(-1, (num_heads, -1))
    return heads.transpose(1, 2)


def merge_heads(rows: torch.Tensor) -> torch.Tensor:
    """(N, heads, L, D) -> (N, L, heads*D)."""
    return rows.transpose(1, 2).flatten(2)


class CoalescerUNet(ModelMixin, ConfigMixin):
    r"""Maps a latent point R and a description to a target direction and a target distance. There is no timestep.

    A UNet of residual blocks whose second norm is conditioned by the description (scale and shift), self-attention (or,
    with ``cross_attention_dim``, transformer blocks that also attend to token rows) at ``attention_levels``, and two
    heads (`ops.dual_head`). With ``anchor="mlp"`` a small MLP predicts p, the mean latent of the description; the
    network then sees [R, p], and its heads are residual to p - R.

    Args:
        sample_size: H = W of the latents trained on; other sizes run too, unless there is an anchor.
        latent_channels: Cz, channels of R and of the direction.
        block_out_channels: channels of each resolution level, from the finest.
        layers_per_block: residual blocks a level on the way down (one more on the way up).
        norm_num_groups: groups of every GroupNorm.
        attention_levels: levels whose residual blocks are each followed by attention.
        mid_attention: whether there is attention between the two residual blocks at the bottom.
        num_attention_heads: heads of every attention, or of those of each level (the last one's at the bottom).
        cross_attention_dim: width of the token rows, or None for no cross-attention.
        description_dim: D, width of a description vector; the all-zero vector is the empty description.
        embedding_dim: width of the embedding that scales and shifts are projected from.
        anchor: "mlp" or None.
        anchor_hidden_dim: width of the anchor's MLP.
        norm_eps: of every GroupNorm but those of transformer blocks.
        transformer_layers_per_block: layers of every transformer block, or of those of each level.
        sample_residual: multiple of R that is added to the direction, see `from_diffusers`.

    The last three are in ``config`` only where they differ from their defaults.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        latent_channels: int = 16,
        block_out_channels: tuple[int, ...] = (96, 128, 160),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        attention_levels: tuple[int, ...] = (1,),
        mid_attention: bool = True,
        num_attention_heads: int | tuple[int, ...] = 4,
        cross_attention_dim: int | None = None,
        description_dim: int = 128,
        embedding_dim: int = 256,
        anchor: str | None = None,
        anchor_hidden_dim: int = 1024,
        norm_eps: float = 1e-5,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        sample_residual: float = 0.0,
    ):
        super().__init__()
        if anchor not in ("mlp", None):
            raise ValueError(f"anchor is {anchor!r}; use 'mlp' or None")
        channels = list(block_out_channels)
        groups = norm_num_groups
        heads = _of_each_level("num_attention_heads", num_attention_heads, len(channels))
        depths = _of_each_level("transformer_layers_per_block", transformer_layers_per_block, len(channels))

        def attention(width: int, level: int) -> nn.Module:
            if cross_attention_dim is None:
                return SelfAttention(width, heads[level], groups, norm_eps)
            return TransformerBlock(width, heads[level], cross_attention_dim, groups, depths[level])

        def residual(width_in: int, width_out: int) -> ResidualBlock:
            return ResidualBlock(width_in, width_out, embedding_dim, groups, norm_eps)

        self.anchor_mlp = (
            AnchorMLP(description_dim, anchor_hidden_dim, latent_channels, sample_size) if anchor else None
        )
        self.null = nn.Parameter(torch.zeros(description_dim, dtype=torch.get_default_dtype()))
        self.embedding = nn.Sequential(
            nn.Linear(description_dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.conv_in = Convolution(latent_channels * (2 if anchor else 1), channels[0], 3, padding=1)

        # Each entry is a list of modules that run in turn. The output of each entry of down is kept as a skip, which a
        # residual block of up takes.
        self.down = nn.ModuleList()
        width, skips = channels[0], [channels[0]]
        for level, out in enumerate(channels):
            for _ in range(layers_per_block):
                block = residual(width, out)
                self.down.append(
                    nn.ModuleList([block, *([attention(out, level)] if level in attention_levels else [])])
                )
                width = out
                skips.append(width)
            if level < len(channels) - 1:
                self.down.append(nn.ModuleList([Convolution(width, width, 3, stride=2, padding=1)]))
                skips.append(width)
        self.mid = nn.ModuleList(
            [residual(width, width), *([attention(width, -1)] if mid_attention else []), residual(width, width)]
        )
        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(channels))):
            for _ in range(layers_per_block + 1):
                block = residual(width + skips.pop(), out)
                self.up.append(nn.ModuleList([block, *([attention(out, level)] if level in attention_levels else [])]))
                width = out
            if level:
                self.up.append(nn.ModuleList([Convolution(width, width, 3, padding=1)]))

        self.norm_out = GroupNormSiLU(groups, width, norm_eps)
        self.direction_head = nn.Conv2d(width, latent_channels, 3, padding=1)
        self.distance_head = nn.Linear(width, 1)
        zero_initialise(self.direction_head, self.distance_head)
        nn.init.constant_(self.distance_head.bias, SOFTPLUS_INVERSE_OF_1)

    def register_to_config(self, **kwargs: Any) -> None:
        """Register as diffusers does, without later options at their defaults: hashes and files stay as they were."""
        super().register_to_config(**{name: value for name, value in kwargs.items() if LATER.get(name, ...) != value})

    @classmethod
    def named(cls, name: str) -> CoalescerUNet:
        """Make an untrained network of a named configuration: emoji-64, m or l."""
        if name not in CONFIGURATIONS:
            raise ValueError(f"configuration {name!r} is unknown: use {', '.join(CONFIGURATIONS)}")
        network: CoalescerUNet = cls(**CONFIGURATIONS[name])
        return network

    @classmethod
    def from_diffusers(
        cls,
        unet: nn.Module,
        scheduler: Any = None,
        timestep: int | None = None,
        *,
        description_dim: int | None = None,
        embedding_dim: int | None = None,
        **conditions: Any,
    ) -> CoalescerUNet:
        r"""Make a coalescer of a diffusion model's UNet, with its weights.

        The time embedding is folded: the UNet is taken as it is at one noise level, t. Everything that a coalescer has
        beside it starts without effect: scales and shifts by the description are 0, so that the new network computes
        what the UNet computes at t. Of the heads, the direction starts from ``conv_out``, F below.

        A diffusion model has learnt x_t = alpha x + sigma z, with alpha = sqrt(alphas_cumprod[t]), sigma = sqrt(1 -
        alphas_cumprod[t]) and z ~ N(0, I). Late in the noise process alpha is near 0, x_t is nearly z, and R = z may
        stand for it. The picture that the UNet then expects, x_0, is linear in F and R:

            epsilon:       F = z                     x_0 = (R - sigma F) / alpha
            v_prediction:  F = alpha z - sigma x     x_0 = alpha R - sigma F       (as alpha^2 + sigma^2 = 1)
            sample:        F = x                     x_0 = F

        The direction has to point from R to a picture, and to be short where pictures disagree. Over the pictures x
        that fit, the mean of (x - R) / |x - R| is (x_0 - R) / sqrt(2): |x - R|^2 = |x|^2 + |R|^2 = 2, for x and R are
        independent, of RMS 1 and in high dimension. So the heads start as

            direction = (x_0 - R) / sqrt(2) = head + sample_residual R,      distance = sqrt(2)

        with ``head = -sigma / (alpha sqrt(2)) conv_out`` and ``sample_residual = (1 / alpha - 1) / sqrt(2)`` for
        epsilon, and by the same formulas for the others: the landing point R + distance direction is x_0.

        For epsilon, an error of F counts sigma / alpha times in x_0: 14.6 at Stable Diffusion's last step, and 3.3 at
        700, where R = z is a poorer x_t in return. In the trial of docs/training.md, 700 was much the better start.

        Args:
            unet: a UNet2DConditionModel or UNet2DModel of diffusers. It is not changed.
            scheduler: the scheduler that it was trained with: what F predicts, alpha and sigma. With None, the
                direction head is conv_out itself: the direction is what the UNet predicts at ``timestep``.
            timestep: t; the last of the scheduler's (999) if None.
            description_dim: width of a description vector; that of the token rows if None, or 128 without them.
            embedding_dim: width of the embedding of descriptions; twice the UNet's first width if None.
            **conditions: further arguments of the UNet's call, folded as the timestep is: class_labels, SDXL's
                added_cond_kwargs, or timestep_cond of a latent consistency model, each for one sample.

        Returns:
            The network, of the UNet's dtype and device.

        Raises:
            TypeError: for another class.
            ValueError: for a UNet with a part that a coalescer does not have; it names the part.
        """
        from .takeover import take_over

        network: CoalescerUNet = take_over(cls, unet, scheduler, timestep, description_dim, embedding_dim, conditions)
        return network

    @property
    def residual_blocks(self) -> list[ResidualBlock]:
        """All residual blocks in the order in which they run."""
        return [m for m in self._in_order() if isinstance(m, ResidualBlock)]

    @property
    def transformer_layers(self) -> list[TransformerLayer]:
        """All layers with cross-attention in the order in which they run."""
        return [layer for m in self._in_order() if isinstance(m, TransformerBlock) for layer in m.layers]

    @property
    def downsampling(self) -> int:
        """Latent height and width must be multiples of this."""
        return 1 << (len(self.config.block_out_channels) - 1)

    def _in_order(self) -> list[nn.Module]:
        return [m for part in (*self.down, self.mid, *self.up) for m in part]

    def set_backend(self, backend: str) -> None:
        """Run every op of the network on ``backend``."""
        for module in self.modules():
            # set only where it changes something, for whoever watches the network for changes
            ours = isinstance(module, (CoalescerUNet, Convolution, GroupNormSiLU, TransformerLayer))
            if ours and module.backend != backend:
                module.backend = backend

    backend = "reference"

    def embed(self, description: torch.Tensor) -> torch.Tensor:
        """Embed descriptions (N, D) as (N, E), activated, from which scales and shifts are projected."""
        return F.silu(self.embedding(replace_empty(description, self.null)))

    @apply_forward_hook
    def condition(
        self,
        description: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        anchor: torch.Tensor | None = None,
    ) -> Conditioning:
        """Compute what the network derives from descriptions alone.

        Args:
            description: (N, D).
            encoder_hidden_states: token rows (N, L, D'), with cross-attention.
            encoder_attention_mask: of the token rows, (N, L).
            anchor: (N, Cz, H, W), instead of the anchor MLP's output.
        """
        if description.ndim != 2 or description.shape[1] != self.config.description_dim:
            raise ValueError(
                f"description has shape {tuple(description.shape)}; expected (N, {self.config.description_dim})"
            )
        description = description.to(self.null.dtype)
        embedding = self.embed(description)
        film = [t for block in self.residual_blocks for t in block.film(embedding).chunk(2, 1)]
        keys_values: list[torch.Tensor] = []
        if self.config.cross_attention_dim is not None:
            if encoder_hidden_states is None:
                raise ValueError(
                    "encoder_hidden_states is missing: this network attends to the description's token rows"
                )
            rows = encoder_hidden_states.to(self.null.dtype)
            keys_values = [t for layer in self.transformer_layers for t in layer.keys_values(rows)]
        if self.anchor_mlp is not None and anchor is None:
            anchor = self.anchor_mlp(description)
        anchors = [] if anchor is None else [anchor]
        return self.as_conditioning([*film, *keys_values, *anchors], encoder_attention_mask)

    def as_conditioning(self, tensors: Sequence[torch.Tensor], mask: torch.Tensor | None = None) -> Conditioning:
        """Make a conditioning of what `Conditioning.tensors` lists, the mask apart."""
        films = 2 * len(self.residual_blocks)
        others = 2 * len(self.transformer_layers)
        pairs = list(zip(tensors[: films + others : 2], tensors[1 : films + others : 2]))
        anchor = tensors[-1] if len(tensors) > films + others else None
        return Conditioning(pairs[: films // 2], anchor, pairs[films // 2 :], mask)

    def features(self, sample: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Compute the activated features (N, C, H, W) that both heads read, for R (N, Cz, H, W)."""
        film, keys_values = iter(conditioning.film), iter(conditioning.keys_values)

        def run(part: Any, h: torch.Tensor, skips: list[torch.Tensor] | None = None) -> torch.Tensor:
            for module in part:
                if isinstance(module, ResidualBlock):
                    h = module(h, next(film), skips.pop() if skips is not None else None)
                elif isinstance(module, TransformerBlock):
                    own, *further = (next(keys_values) for _ in module.layers)
                    h = module(h, own, conditioning.mask, *([further] if further else []))
                elif isinstance(module, SelfAttention):
                    h = module(h)
                else:  # a convolution, whatever it has been wrapped in
                    h = module(h if skips is None else F.interpolate(h, scale_factor=2.0, mode="nearest"))
            return h

        config = self.config
        if (
            sample.ndim != 4
            or sample.shape[1] != config.latent_channels
            or any(side % self.downsampling for side in sample.shape[2:])
        ):
            expected = f"(N, {config.latent_channels}, H, W), H and W multiples of {self.downsampling}"
            raise ValueError(f"sample has shape {tuple(sample.shape)}; expected {expected}")
        x = sample.to(self.null.dtype)
        h = self.conv_in(x if conditioning.anchor is None else torch.cat([x, conditioning.anchor.to(x.dtype)], 1))
        skips = [h]
        for part in self.down:
            h = run(part, h)
            skips.append(h)
        h = run(self.mid, h)
        for part in self.up:
            h = run(part, h, skips)
        features: torch.Tensor = self.norm_out(h)
        return features

    def forward(
        self,
        sample: torch.Tensor,
        description: torch.Tensor | Conditioning,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> CoalescerUNetOutput | tuple[torch.Tensor, torch.Tensor]:
        """Evaluate the network.

        Args:
            sample: R (N, Cz, H, W).
            description: (N, D), or what `condition` has made of descriptions.
            encoder_hidden_states: as of `condition`.
            encoder_attention_mask: as of `condition`.
            return_dict: whether to return a `CoalescerUNetOutput` and not a tuple.

        Returns:
            Direction (N, Cz, H, W) and distance (N,).
        """
        if isinstance(description, Conditioning):
            conditioning = description
        else:
            conditioning = self.condition(description, encoder_hidden_states, encoder_attention_mask)
        features, anchor = self.features(sample, conditioning), conditioning.anchor
        direction, distance = self._heads(features, None if anchor is None else sample, anchor)
        if residual := self.config.get("sample_residual", 0.0):
            direction = direction + residual * sample
        return CoalescerUNetOutput(direction, distance) if return_dict else (direction, distance)

    def _heads(
        self, h: torch.Tensor, sample: torch.Tensor | None, anchor: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run both heads: by `ops.dual_head`, or by calling the layers if they are not plain."""
        to_direction, to_distance = self.direction_head, self.distance_head
        if is_plain(to_direction, to_distance):
            weights: Any = to_direction.weight, to_direction.bias, to_distance.weight, to_distance.bias
            return ops.dual_head(h, *weights, sample=sample, anchor=anchor, backend=self.backend)
        return combine(to_direction(h), to_distance(h.mean((2, 3))).squeeze(1), sample, anchor)
