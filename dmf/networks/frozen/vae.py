"""The autoencoder of Stable Diffusion and FLUX, from images to latents and back.

It is diffusers' `AutoencoderKL` (Rombach et al. 2022, arXiv 2112.10752).

A latent has two scales, and every name tells which. `encode` and `decode` use *unscaled* latents.
A *scaled* latent is scale * (unscaled - shift), and has about unit variance.
The numbers are `VAEConfig.scale` and `VAEConfig.shift`.
Flows are trained on scaled latents, and their samples are scaled.
The function `sample_latent` makes scaled latents of an encoding.
The function `unscaled` brings them back for `decode`.

Precision: All products follow the caller's `jax.default_matmul_precision`.
Trace under "highest" where images are scored.
By default an accelerator rounds factors to 8 or 11 bits, and images show it.

Parameter names follow diffusers, with '/' for '.'. A number that indexes a list follows '_':
`encoder.down_blocks.0.resnets.1.conv1.weight` is encoder/down_blocks_0/resnets_1/conv1/kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.fields import INF, LEAST, MOST_BLOCKS, WIDEST, choice, limited
from dmf.networks import attention, layers

PARTS = ("both", "decoder")
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The autoencoder's shape. The defaults are those of Stable Diffusion 1 and 2.

    These have 83,653,863 parameters, 49,490,199 of them in the decoder.

        channels      one entry per level, finest first; a level is half as fine as the one before
        blocks        residual blocks of the encoder per level; the decoder has one more
        groups        of every GroupNorm
        scale, shift  scaled latent = scale * (unscaled latent - shift)
        part          "both", or "decoder" for no encoder
        quant         whether 1x1 convolutions stand at both ends of the latent; SD3 has none
    """

    kind: str = "vae"
    channels: tuple[int, ...] = limited((128, 256, 512, 512), 1, WIDEST, empty=False)
    blocks: int = limited(2, 1, MOST_BLOCKS)
    latent_channels: int = limited(4, 1, WIDEST)
    image_channels: int = limited(3, 1, WIDEST)
    groups: int = limited(32, 1, WIDEST)
    scale: float = limited(0.18215, LEAST, INF)
    part: str = choice("both", PARTS)
    shift: float = limited(0.0, -INF, INF)
    quant: bool = True

    @property
    def factor(self) -> int:
        """The side of an image over the side of its latent."""
        return 2 ** (len(self.channels) - 1)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """The shape of a square image's latent. Raises DmfError unless `factor` divides it."""
        if size % self.factor:
            raise DmfError(
                f"size is {size}: expected a multiple of {self.factor}, by which the autoencoder "
                "shrinks an image"
            )
        return size // self.factor, size // self.factor, self.latent_channels


class VAE(NamedTuple):
    """An autoencoder as pure functions. Other kinds have the same (`dmf.networks.frozen.rae`).

    init(key) -> params: A nested dict of float32 arrays.

    encode(params, x) -> (mean, logvar): The normal law of the *unscaled* latent.
    Both are (B, H / factor, W / factor, latent_channels). `logvar` is clamped to [-30, 20].
    `x` is (B, H, W, image_channels) in [-1, 1], with H and W multiples of `factor`.

    decode(params, latent) -> image: `latent` is *unscaled*, (B, h, w, latent_channels).
    The image is (B, factor h, factor w, image_channels), about [-1, 1] and not clamped.

    scale, shift: scaled latent = scale * (unscaled latent - shift), for `sample_latent` and
    `unscaled`.

    Results are float32, or float64 if params and inputs are.
    Raises DmfError for wrong shapes, and for encoding without an encoder.
    """

    init: Callable[[jax.Array], dict[str, Any]]
    encode: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    decode: Callable[[Any, jax.Array], jax.Array]
    scale: float
    shift: float = 0.0


def sample_latent(
    mean: jax.Array, logvar: jax.Array, noise: jax.Array, scale: float, shift: float = 0.0
) -> jax.Array:
    """A *scaled* latent drawn from an encoding: scale * (mean - shift + exp(logvar / 2) * noise).

    noise: Standard normal, with the shape of `mean`. Zeros give the mode.
    """
    return scale * (mean - shift + jnp.exp(logvar / 2) * noise)


def unscaled(latent: jax.Array, scale: float, shift: float = 0.0) -> jax.Array:
    """The unscaled latent, for `decode`, of a scaled one: latent / scale + shift."""
    return latent / scale + shift if shift else latent / scale


def _norm(groups: int, dtype: jnp.dtype | None, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


def _conv(width: int, size: int, dtype: jnp.dtype | None, name: str | None = None) -> nn.Conv:
    return nn.Conv(width, (size, size), dtype=dtype, kernel_init=layers.xavier(), name=name)


class Resnet(nn.Module):
    """Residual block: twice norm, SiLU and 3x3 convolution.

    The skip has a 1x1 convolution where the width changes.
    """

    width: int
    groups: int
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, H, W, C) to (B, H, W, width)."""
        y = _conv(self.width, 3, self.dtype, "conv1")(
            nn.silu(_norm(self.groups, self.dtype, "norm1")(x))
        )
        y = _conv(self.width, 3, self.dtype, "conv2")(
            nn.silu(_norm(self.groups, self.dtype, "norm2")(y))
        )
        if x.shape[-1] != self.width:
            x = _conv(self.width, 1, self.dtype, "conv_shortcut")(x)
        return x + y


class Attention(nn.Module):
    """Residual single-head attention over positions."""

    groups: int
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, H, W, C) to the same shape."""
        batch, height, width, channels = x.shape
        y = _norm(self.groups, self.dtype, "group_norm")(x).reshape(batch, height * width, channels)
        q, k, v = (self._dense(channels, name)(y)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        y = self._dense(channels, "to_out_0")(attention.xla(q, k, v)[:, :, 0])
        return x + y.reshape(x.shape)

    def _dense(self, width: int, name: str) -> nn.Dense:
        return nn.Dense(width, dtype=self.dtype, kernel_init=layers.xavier(), name=name)


class Middle(nn.Module):
    """The coarsest level's block, attention, block."""

    groups: int
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, H, W, C) to the same shape."""
        x = Resnet(x.shape[-1], self.groups, self.dtype, name="resnets_0")(x)
        x = Attention(self.groups, self.dtype, name="attentions_0")(x)
        return Resnet(x.shape[-1], self.groups, self.dtype, name="resnets_1")(x)


class Downsample(nn.Module):
    """Halves both sides by a 3x3 convolution of stride 2.

    It is padded by one row and column of zeros, at the bottom and at the right.
    """

    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, H, W, C) to (B, H / 2, W / 2, C)."""
        padding, init = ((0, 1), (0, 1)), layers.xavier()
        shape = x.shape[-1], (3, 3), 2, padding
        return nn.Conv(*shape, dtype=self.dtype, kernel_init=init, name="conv")(x)


class Upsample(nn.Module):
    """Doubles both sides by repetition, then a 3x3 convolution."""

    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, H, W, C) to (B, 2 H, 2 W, C)."""
        return _conv(x.shape[-1], 3, self.dtype, "conv")(layers.box_up(x))


class Level(nn.Module):
    """The residual blocks of one resolution, then a change of resolution if there is one."""

    width: int
    blocks: int
    groups: int
    dtype: jnp.dtype | None
    resample: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, H, W, C) to (B, H', W', width)."""
        for i in range(self.blocks):
            x = Resnet(self.width, self.groups, self.dtype, name=f"resnets_{i}")(x)
        if self.resample == "down":
            return Downsample(self.dtype, name="downsamplers_0")(x)
        return Upsample(self.dtype, name="upsamplers_0")(x) if self.resample == "up" else x


def _last(x: jax.Array, width: int, groups: int) -> jax.Array:
    """The last layers of encoder and decoder, always float32.

    bfloat16 would put results on a grid of spacing 2^-8.
    """
    x = nn.silu(_norm(groups, None, "conv_norm_out")(layers.at_least_float32(x)))
    return _conv(width, 3, None, "conv_out")(x)


class Encoder(nn.Module):
    """Images to the layer before the moments."""

    config: VAEConfig
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, H, W, image_channels) to (B, H / factor, W / factor, 2 latent_channels)."""
        c = self.config
        x = _conv(c.channels[0], 3, self.dtype, "conv_in")(x)
        for i, width in enumerate(c.channels):
            resample = "down" if i < len(c.channels) - 1 else ""
            x = Level(width, c.blocks, c.groups, self.dtype, resample, name=f"down_blocks_{i}")(x)
        x = Middle(c.groups, self.dtype, name="mid_block")(x)
        return _last(x, 2 * c.latent_channels, c.groups)


class Decoder(nn.Module):
    """Latents to images; levels count from the coarsest here."""

    config: VAEConfig
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, h, w, latent_channels) to (B, factor h, factor w, image_channels)."""
        c = self.config
        x = _conv(c.channels[-1], 3, self.dtype, "conv_in")(x)
        x = Middle(c.groups, self.dtype, name="mid_block")(x)
        for i, width in enumerate(reversed(c.channels)):
            resample = "up" if i < len(c.channels) - 1 else ""
            x = Level(width, c.blocks + 1, c.groups, self.dtype, resample, name=f"up_blocks_{i}")(x)
        return _last(x, c.image_channels, c.groups)


class Autoencoder(nn.Module):
    """Encoder and decoder, with the 1x1 convolutions between them where there are any."""

    config: VAEConfig
    dtype: jnp.dtype | None

    def setup(self) -> None:
        """Names the parts; a decoder alone has no parameters of an encoder."""
        c = self.config
        if c.part == "both":
            self.encoder = Encoder(c, self.dtype)
        if c.part == "both" and c.quant:
            self.quant_conv = _conv(2 * c.latent_channels, 1, None)
        if c.quant:
            self.post_quant_conv = _conv(c.latent_channels, 1, self.dtype)
        self.decoder = Decoder(c, self.dtype)

    def __call__(self, x: jax.Array, latent: jax.Array) -> Any:
        """Runs all parts, for the initialisation."""
        return (self.encode(x) if self.config.part == "both" else None), self.decode(latent)

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map x (B, H, W, image_channels) to mean and clamped log-variance."""
        moments = self.encoder(x)
        moments = self.quant_conv(moments) if self.config.quant else moments
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latent: jax.Array) -> jax.Array:
        """Map an unscaled latent (B, h, w, latent_channels) to an image."""
        return self.decoder(self.post_quant_conv(latent) if self.config.quant else latent)


def build_vae(config: VAEConfig, dtype: Any = jnp.float32) -> VAE:
    """Builds the autoencoder. The sides of its images are multiples of `config.factor`.

    dtype: The compute dtype, float32 or bfloat16.
    Parameters, norm statistics, softmax, the last layers and results are float32 in both cases.
    With float32, parameters and inputs in float64 give a computation in float64.

    Raises DmfError that names a wrong field.
    """
    _check(config)
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise DmfError(f"dtype is {jnp.dtype(dtype).name}; expected float32 or bfloat16.")
    # Linen follows parameters and inputs where dtype is None. This allows float64.
    module = Autoencoder(config, None if jnp.dtype(dtype) == jnp.float32 else jnp.bfloat16)

    def init(key: jax.Array) -> dict[str, Any]:
        x = jax.ShapeDtypeStruct(
            (1, config.factor, config.factor, config.image_channels), jnp.float32
        )
        latent = jax.ShapeDtypeStruct((1, 1, 1, config.latent_channels), jnp.float32)
        return module.lazy_init(key, x, latent)["params"]

    def encode(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if config.part != "both":
            raise DmfError(
                f"VAEConfig.part is {config.part!r}: there is no encoder; "
                "expected 'both' for encode."
            )
        _check_input("x", x, config.image_channels, config.factor)
        moments: Any = module.apply({"params": params}, x, method="encode")
        return moments

    def decode(params: Any, latent: jax.Array) -> jax.Array:
        _check_input("latent", latent, config.latent_channels, 1)
        image: Any = module.apply({"params": params}, latent, method="decode")
        return image

    return VAE(init, encode, decode, config.scale, config.shift)


def _check(config: VAEConfig) -> None:
    layers.check_choice("VAEConfig.part", config.part, PARTS)
    if not config.channels:
        raise DmfError("VAEConfig.channels is empty; expected one width per level.")
    for field in ("blocks", "latent_channels", "image_channels", "groups"):
        layers.check_positive(f"VAEConfig.{field}", getattr(config, field))
    for width in config.channels:
        layers.check_positive("VAEConfig.channels", width)
        if width % config.groups:
            raise DmfError(
                f"VAEConfig.channels has a level of {width}; "
                f"expected a multiple of groups, {config.groups}."
            )
    if not isinstance(config.scale, int | float) or not 0 < config.scale < math.inf:
        raise DmfError(f"VAEConfig.scale is {config.scale!r}; expected a number above 0.")
    if not isinstance(config.shift, int | float) or not math.isfinite(config.shift):
        raise DmfError(f"VAEConfig.shift is {config.shift!r}; expected a finite number.")


def _check_input(name: str, x: jax.Array, channels: int, factor: int) -> None:
    fits = (
        x.ndim == 4
        and x.shape[-1] == channels
        and not any(side == 0 or side % factor for side in x.shape[1:3])
    )
    if not fits:
        sides = f" with H and W multiples of {factor}" if factor > 1 else ""
        raise DmfError(f"{name} has shape {x.shape}; expected (B, H, W, {channels}){sides}.")
