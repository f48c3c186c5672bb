"""The ADM U-Net without classes: the network of TorchCFM's flow models on CIFAR-10.

Parameter names follow the official state dict. '.' reads as '/', and '_' joins the index of a
list to the name before it:

    input_blocks.1.0.in_layers.2.weight   input_blocks_1_0/in_layers_2/kernel

The official network has no `interval`: a second `time_embed`, for h = t - r.
Its output is added to the embedding vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.fields import BELOW_1, MOST_BLOCKS, WIDEST, choice, limited
from dmf.method.flow import Condition
from dmf.networks import layers

GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class ADMConfig:
    """The U-Net's shape. The defaults are TorchCFM's CIFAR-10 network.

    That network has 35,746,307 parameters and an interval branch.

        channel_mult           one entry per resolution; each is half of the one before
        blocks                 of the encoder per resolution; the decoder has one more
        attention_resolutions  attention follows every block there, and stands in the middle
        head_channels          of one head of attention
        interval_init          "zero" makes u(z, r, t) = u(z, t, t) at the start, bit for bit

    Norms have 32 groups. In a layer of 32 channels they remove the shift that brings in the times.
    """

    num_classes = 0  # no field: this network takes no class
    kind: str = "adm"  # tells the networks apart
    channels: int = limited(128, 1, WIDEST)  # at full resolution, times channel_mult
    # one factor per resolution, each half of the one before
    channel_mult: tuple[int, ...] = limited((1, 2, 2, 2), 1, MOST_BLOCKS, empty=False)
    blocks: int = limited(2, 1, MOST_BLOCKS)  # of the encoder per resolution
    attention_resolutions: tuple[int, ...] = limited((16,), 1, WIDEST)  # in pixels
    head_channels: int = limited(64, 1, WIDEST)  # of one head of attention
    dropout: float = limited(0.1, 0, BELOW_1)  # * u and u' of a row share the mask
    # * zero | random: the branch of t - r at the start
    interval_init: str = choice("zero", layers.INTERVAL_INITS)
    logvar: bool = False  # a head for the log variance of the loss (`loss.logvar`)


class Row(NamedTuple):
    """An entry of input_blocks or output_blocks.

    parts: keys of PARTS, in order. inputs, width: channels that enter and leave.
    """

    parts: tuple[str, ...]
    inputs: int
    width: int


def plan(config: ADMConfig, size: int) -> tuple[list[Row], list[Row]]:
    """The rows of the encoder, after its first convolution, and of the decoder.

    size: of the images, in pixels.
    """
    c, encoder, decoder = config, list[Row](), list[Row]()
    width = c.channels * c.channel_mult[0]
    skips = [width]
    levels = [
        (
            level,
            c.channels * mult,
            ("block", "attention") if size >> level in c.attention_resolutions else ("block",),
        )
        for level, mult in enumerate(c.channel_mult)
    ]
    for level, wide, parts in levels:
        if level:
            encoder.append(Row(("down",), width, width))
            skips.append(width)
        for _ in range(c.blocks):
            encoder.append(Row(parts, width, wide))
            skips.append(wide)
            width = wide
    for level, wide, parts in reversed(levels):
        for k in range(c.blocks + 1):
            up = ("up",) if level and k == c.blocks else ()
            decoder.append(Row((*parts, *up), width + skips.pop(), wide))
            width = wide
    return encoder, decoder


def _uniform(fan_in: int) -> layers.Initializer:
    """PyTorch's draw for a layer's weight and its bias, U(-a, a) with a = 1 / sqrt(fan_in)."""
    return layers.uniform_within(1 / math.sqrt(fan_in))


def _dense(
    x: jax.Array, width: int, name: str, dtype: jnp.dtype | None, zero: bool = False
) -> nn.Dense:
    init = nn.initializers.zeros if zero else _uniform(x.shape[-1])
    return nn.Dense(width, dtype=dtype, kernel_init=init, bias_init=init, name=name)


def _conv(
    x: jax.Array,
    width: int,
    size: int,
    name: str,
    dtype: jnp.dtype | None,
    stride: int = 1,
    zero: bool = False,
) -> nn.Conv:
    """Convolution with size // 2 zeros on every side. At stride 2, "SAME" would differ."""
    init = nn.initializers.zeros if zero else _uniform(size * size * x.shape[-1])
    window, padding = (size, size), size // 2
    return nn.Conv(
        width, window, stride, padding, dtype=dtype, kernel_init=init, bias_init=init, name=name
    )


def _norm(name: str, dtype: jnp.dtype | None) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=name)


def _time_embed(time: jax.Array, channels: int, zero: bool = False) -> jax.Array:
    """Two-layer MLP on the features of a raw time, (B,) -> (B, 4 * channels), float32 or better."""
    freqs = layers.frequencies(channels // 2, endpoint=False)
    x = layers.time_features(time, freqs, sin_first=False)
    x = nn.silu(_dense(x, 4 * channels, "time_embed_0", None)(x))
    return _dense(x, 4 * channels, "time_embed_2", None, zero)(x)


class Interval(nn.Module):
    """The embedding of h = t - r, which is added to the embedding of t."""

    channels: int
    zero: bool

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Embed intervals (B,) as (B, 4 * channels); identically zero at the start when `zero`."""
        return _time_embed(h, self.channels, self.zero)


class Block(nn.Module):
    """Residual block, its second convolution zero at the start."""

    width: int
    config: ADMConfig
    dtype: jnp.dtype | None
    how: layers.Execution

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, rngs: jax.Array | None) -> jax.Array:
        """Map x (B, H, W, C) to (B, H, W, width), shifted by a projection of emb (B, E)."""
        y = nn.silu(_norm("in_layers_0", self.dtype)(x))
        y = _conv(y, self.width, 3, "in_layers_2", self.dtype)(y)
        y = y + _dense(emb, self.width, "emb_layers_1", self.dtype)(emb)[:, None, None, :]
        y = nn.silu(_norm("out_layers_0", self.dtype)(y))
        y = layers.RowDropout(self.config.dropout, name="out_layers_2")(y, rngs)
        y = _conv(y, self.width, 3, "out_layers_3", self.dtype, zero=True)(y)
        if x.shape[-1] != self.width:
            x = _conv(x, self.width, 1, "skip_connection", self.dtype)(x)
        return x + y


class Attention(nn.Module):
    """Multi-head self-attention over positions, added to its input.

    The columns of qkv are [q | k | v], head by head.
    """

    width: int
    config: ADMConfig
    dtype: jnp.dtype | None
    how: layers.Execution

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, rngs: jax.Array | None) -> jax.Array:
        """Map x (B, H, W, width); `emb` and `rngs` are unused."""
        batch, height, width, channels = x.shape
        y = _norm("norm", self.dtype)(x).reshape(batch, height * width, channels)
        y = _dense(y, 3 * channels, "qkv", self.dtype)(y)
        q, k, v = jnp.split(
            y.reshape(batch, height * width, -1, 3 * self.config.head_channels), 3, axis=-1
        )
        y = self.how.attend(q, k, v).reshape(x.shape)
        return x + _dense(y, channels, "proj_out", self.dtype, zero=True)(y)


class Down(nn.Module):
    """Halving of the resolution by a learned convolution."""

    width: int
    config: ADMConfig
    dtype: jnp.dtype | None
    how: layers.Execution

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, rngs: jax.Array | None) -> jax.Array:
        """Map x (B, H, W, C) to (B, H / 2, W / 2, width); `emb` and `rngs` are unused."""
        return _conv(x, self.width, 3, "op", self.dtype, stride=2)(x)


class Up(nn.Module):
    """Doubling of the resolution: every value four times, then a learned convolution."""

    width: int
    config: ADMConfig
    dtype: jnp.dtype | None
    how: layers.Execution

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, rngs: jax.Array | None) -> jax.Array:
        """Map x (B, H, W, C) to (B, 2 H, 2 W, width); `emb` and `rngs` are unused."""
        x = layers.box_up(x)
        return _conv(x, self.width, 3, "conv", self.dtype)(x)


PARTS: dict[str, type[nn.Module]] = {"block": Block, "attention": Attention, "down": Down, "up": Up}


class ADM(nn.Module):
    """u(z, r, t) by a U-Net conditioned on t and on h = t - r."""

    config: ADMConfig
    dtype: jnp.dtype | None
    how: layers.Execution

    @nn.compact
    def __call__(
        self,
        z: jax.Array,
        r: jax.Array,
        t: jax.Array,
        condition: Condition,
        rngs: jax.Array | None,
    ) -> jax.Array:
        """Map z (B, R, R, C), r, t (B,), keys (B,) or None to u, shaped as z.

        There are no classes, so `condition` is unused.
        """
        c = self.config
        interval = Interval(c.channels, c.interval_init == "zero", name="interval")
        # Officially every block applies this SiLU to the embedding, with the same result.
        emb = nn.silu(_time_embed(t, c.channels) + interval(t - r))
        encoder, decoder = plan(c, z.shape[1])
        x = _conv(z, c.channels * c.channel_mult[0], 3, "input_blocks_0_0", self.dtype)(z)
        skips = [x]
        for n, row in enumerate(encoder, 1):
            x = self._parts(f"input_blocks_{n}", row.parts, row.width, x, emb, rngs)
            skips.append(x)
        x = self._parts("middle_block", ("block", "attention", "block"), x.shape[-1], x, emb, rngs)
        for n, row in enumerate(decoder):
            x = jnp.concatenate((x, skips.pop()), axis=-1)
            x = self._parts(f"output_blocks_{n}", row.parts, row.width, x, emb, rngs)
        # In bfloat16 the last layer would put u on a grid of relative spacing 2^-8.
        x = layers.at_least_float32(x)
        x = nn.silu(_norm("out_0", None)(x))
        return _conv(x, z.shape[-1], 3, "out_2", None, zero=True)(x)

    def _parts(
        self,
        name: str,
        parts: tuple[str, ...],
        width: int,
        x: jax.Array,
        emb: jax.Array,
        rngs: jax.Array | None,
    ) -> jax.Array:
        for i, part in enumerate(parts):
            make = self.how.block(PARTS[part])
            x = make(width, self.config, self.dtype, self.how, name=f"{name}_{i}")(x, emb, rngs)
        return x


def make_adm(
    config: ADMConfig, image_shape: tuple[int, ...], dtype: jnp.dtype | None, how: layers.Execution
) -> ADM:
    """The module for images (R, R, C). Raises DmfError naming the field that does not fit."""
    layers.check_levels("ADM U-Net", config, image_shape)
    layers.check_positive("config.network.head_channels", config.head_channels)
    for mult in config.channel_mult:
        if config.channels % 2 or config.channels * mult % GROUPS:
            raise DmfError(
                f"config.network.channels is {config.channels}; expected an even number that makes "
                f"every resolution's width a multiple of {GROUPS}, the groups of a norm: "
                f"times {mult} it does not."
            )
    _check_heads(config, image_shape[0])
    layers.check_choice("config.network.interval_init", config.interval_init, layers.INTERVAL_INITS)
    return ADM(config, dtype, how)


def _check_heads(config: ADMConfig, size: int) -> None:
    encoder, _ = plan(config, size)
    for width in [row.width for row in encoder if "attention" in row.parts] + [encoder[-1].width]:
        if width % config.head_channels:
            raise DmfError(
                f"config.network.head_channels is {config.head_channels}; "
                f"expected a divisor of the {width} channels of a layer with attention."
            )
