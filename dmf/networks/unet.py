"""The U-Net of MeanFlow on CIFAR-10: EDM's SongUNet with DDPM++ blocks and [1, 3, 3, 1] resampling.

Parameter names follow the official state dict, '.' read as '/': enc/32x32_block0/conv0/kernel and so on. The
one exception is the first layer of the embedding. Officially it acts on [features(t) | features(t - r)]; here
its two column blocks are two parameters, `map_layer0` (for t, with the bias) and `interval` (for t - r), so
that a network without an interval is this one with `interval` = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.networks import layers

SKIP_SCALE = math.sqrt(0.5)
RESAMPLE = {"keep": lambda x: x, "down": layers.blur_down, "up": layers.blur_up}


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The U-Net's shape; the defaults are the CIFAR-10 network (55,932,419 parameters at 32x32x3).

    `channel_mult` has one entry per resolution, halving from one to the next; `blocks` counts the encoder's
    blocks per resolution (the decoder has one more); `augment_dim` is the length of the augmentation label, 0
    for none; `interval_init` "zero" makes u(z, r, t) = u(z, t, t) at the start, bit for bit.
    """

    kind: str = "unet"
    channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    blocks: int = 4
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.2
    augment_dim: int = 6
    interval_init: str = "zero"


def _group_norm(x: jax.Array, name: str, dtype: jnp.dtype | None) -> nn.GroupNorm:
    """GroupNorm for `x`: at most 32 groups of at least 4 channels, statistics in float32 or better."""
    width = x.shape[-1]
    groups = max(1, min(32, width // 4))
    if width % groups:
        raise DmfError(
            f"config.network.channels: a layer of {width} channels does not split into {groups} groups; "
            "expected channels that are a multiple of 4 below 128 in every layer, and of 32 above."
        )
    return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


def _conv(width: int, size: int, name: str, dtype: jnp.dtype | None, gain: float = 1.0) -> nn.Conv:
    return nn.Conv(width, (size, size), dtype=dtype, kernel_init=layers.xavier(gain), name=name)


class Block(nn.Module):
    """Residual block, optionally resampling, optionally followed by single-head attention over positions."""

    width: int
    dropout: float
    dtype: jnp.dtype | None
    resample: str = "keep"
    attend: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, rngs: jax.Array | None) -> jax.Array:
        """Map x (B, H, W, C) to (B, H', W', width), shifted by a projection of emb (B, E)."""
        resample = RESAMPLE[self.resample]
        y = nn.silu(_group_norm(x, "norm0", self.dtype)(x))
        y = _conv(self.width, 3, "conv0", self.dtype)(resample(y))
        shift = nn.Dense(self.width, dtype=self.dtype, kernel_init=layers.xavier(), name="affine")(emb)
        y = y + shift[:, None, None, :]
        y = nn.silu(_group_norm(y, "norm1", self.dtype)(y))
        y = layers.RowDropout(self.dropout, name="dropout")(y, rngs)
        y = _conv(self.width, 3, "conv1", self.dtype, gain=1e-5)(y)
        if self.resample != "keep" or x.shape[-1] != self.width:
            x = _conv(self.width, 1, "skip", self.dtype)(resample(x))
        x = (x + y) * SKIP_SCALE
        return (x + self._attention(x)) * SKIP_SCALE if self.attend else x

    def _attention(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        y = _group_norm(x, "norm2", self.dtype)(x)
        qkv = _conv(3 * channels, 1, "qkv", self.dtype, gain=math.sqrt(0.2))(y)
        q, k, v = jnp.split(qkv.reshape(batch, height * width, 1, 3 * channels), 3, axis=-1)
        y = layers.attention(q, k, v).reshape(x.shape)
        return _conv(channels, 1, "proj", self.dtype, gain=1e-5)(y)


class Encoder(nn.Module):
    """The way down; returns every intermediate result, the decoder's skips."""

    config: UNetConfig
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, rngs: jax.Array | None) -> list[jax.Array]:
        """Map z (B, R, R, C) to the list of skips, finest first."""
        c, size, skips = self.config, x.shape[1], []
        for level, mult in enumerate(c.channel_mult):
            res, width = size >> level, c.channels * mult
            tag = f"{res}x{res}"
            if level == 0:
                x = _conv(c.channels, 3, f"{tag}_conv", self.dtype)(x)
            else:
                x = Block(x.shape[-1], c.dropout, self.dtype, "down", name=f"{tag}_down")(x, emb, rngs)
            skips.append(x)
            attend = res in c.attention_resolutions
            for k in range(c.blocks):
                block = Block(width, c.dropout, self.dtype, attend=attend, name=f"{tag}_block{k}")
                x = block(x, emb, rngs)
                skips.append(x)
        return skips


class Decoder(nn.Module):
    """The way up; attention in the first block of all and in the last block of an attention resolution."""

    config: UNetConfig
    out_channels: int
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, skips: list[jax.Array], emb: jax.Array, rngs: jax.Array | None) -> jax.Array:
        """Map the encoder's skips to u (B, R, R, out_channels)."""
        c, size, rest, x = self.config, skips[0].shape[1], list(skips), skips[-1]
        for level, mult in reversed(tuple(enumerate(c.channel_mult))):
            res, width = size >> level, c.channels * mult
            tag = f"{res}x{res}"
            if level == len(c.channel_mult) - 1:
                x = Block(x.shape[-1], c.dropout, self.dtype, attend=True, name=f"{tag}_in0")(x, emb, rngs)
                x = Block(x.shape[-1], c.dropout, self.dtype, name=f"{tag}_in1")(x, emb, rngs)
            else:
                x = Block(x.shape[-1], c.dropout, self.dtype, "up", name=f"{tag}_up")(x, emb, rngs)
            for k in range(c.blocks + 1):
                x = jnp.concatenate((x, rest.pop()), axis=-1)
                attend = k == c.blocks and res in c.attention_resolutions
                block = Block(width, c.dropout, self.dtype, attend=attend, name=f"{tag}_block{k}")
                x = block(x, emb, rngs)
        # In bfloat16 the last layer would put u itself on a grid of relative spacing 2^-8.
        x = layers.at_least_float32(x)
        x = nn.silu(_group_norm(x, f"{size}x{size}_aux_norm", None)(x))
        return _conv(self.out_channels, 3, f"{size}x{size}_aux_conv", None, gain=1e-5)(x)


class UNet(nn.Module):
    """u(z, r, t) by a U-Net conditioned on t, on h = t - r and on an augmentation label."""

    config: UNetConfig
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, z: jax.Array, r: jax.Array, t: jax.Array, label: jax.Array | None, rngs: jax.Array | None) -> jax.Array:
        """Map z (B, R, R, C), r, t (B,), label (B, augment_dim) or None, keys (B,) or None to u, as z."""
        emb = self._embedding(r, t, label)
        skips = Encoder(self.config, self.dtype, name="enc")(z, emb, rngs)
        return Decoder(self.config, z.shape[-1], self.dtype, name="dec")(skips, emb, rngs)

    def _embedding(self, r: jax.Array, t: jax.Array, label: jax.Array | None) -> jax.Array:
        """The conditioning vector (B, 4 * channels), never below float32: it carries the times."""
        noise_width, width = 2 * self.config.channels, 4 * self.config.channels
        freqs = layers.frequencies(noise_width // 2, endpoint=True)
        of_t = layers.time_features(t, freqs, sin_first=True)
        of_h = layers.time_features(t - r, freqs, sin_first=True)
        if label is not None:
            init = layers.xavier()
            shift = nn.Dense(2 * noise_width, use_bias=False, kernel_init=init, name="map_augment")(label)
            of_t, of_h = of_t + shift[:, :noise_width], of_h + shift[:, noise_width:]
        # Both kernels are column blocks of one official layer, so both count its fan-in, 2 * noise_width.
        half = layers.uniform_within(math.sqrt(6 / (2 * noise_width + width)))
        interval_init = half if self.config.interval_init == "random" else nn.initializers.zeros
        emb = nn.Dense(width, kernel_init=half, name="map_layer0")(of_t)
        emb = emb + nn.Dense(width, use_bias=False, kernel_init=interval_init, name="interval")(of_h)
        return nn.silu(nn.Dense(width, kernel_init=layers.xavier(), name="map_layer1")(nn.silu(emb)))


def make_unet(config: UNetConfig, image_shape: tuple[int, ...], dtype: jnp.dtype | None) -> UNet:
    """Check `config` against images (R, R, C) and return the module; raises DmfError naming the field."""
    if len(image_shape) != 3 or image_shape[0] != image_shape[1]:
        raise DmfError(f"image_shape is {image_shape}; the U-Net expects square images (R, R, C).")
    if not config.channel_mult:
        raise DmfError("config.network.channel_mult is empty; expected one factor per resolution.")
    for field, value in (("channels", config.channels), ("blocks", config.blocks)):
        layers.check_positive(f"config.network.{field}", value)
    for mult in config.channel_mult:
        layers.check_positive("config.network.channel_mult", mult)
    factor = 2 ** (len(config.channel_mult) - 1)
    if image_shape[0] % factor:
        raise DmfError(
            f"config.network.channel_mult has {len(config.channel_mult)} resolutions, so the image size must be "
            f"divisible by {factor}; got {image_shape[0]}."
        )
    if not 0.0 <= config.dropout < 1.0:
        raise DmfError(f"config.network.dropout is {config.dropout}; expected 0 <= dropout < 1.")
    if config.augment_dim < 0:
        raise DmfError(f"config.network.augment_dim is {config.augment_dim}; expected 0 (no label) or more.")
    layers.check_choice("config.network.interval_init", config.interval_init, layers.INTERVAL_INITS)
    return UNet(config, dtype)
