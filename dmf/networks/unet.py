"""EDM's SongUNet as u(z, r, t): MeanFlow's U-Net on CIFAR-10; by other fields DDPM++ and NCSN++.

Parameter names follow the official state dict, '.' read as '/': enc/32x32_block0/conv0/kernel.
The first layer of the embedding is the exception. Officially it acts on
[features(t) | features(t - r)]. Here its two column blocks are two parameters:

    map_layer0   for t, with the bias
    interval     for t - r

A network without an interval is therefore this network with `interval` = 0.

With time_routing = "decoupled", ours after Decoupled MeanFlow (arXiv 2510.24474), there is no
`interval`: encoder and middle see t, and the decoder sees r, by the same layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.fields import BELOW_1, INF, LEAST, MOST_BLOCKS, MOST_CLASSES, WIDEST, choice, limited
from dmf.method.flow import Condition
from dmf.networks import layers

SKIP_SCALE = math.sqrt(0.5)
RESAMPLE = {
    "binomial": {"keep": lambda x: x, "down": layers.blur_down, "up": layers.blur_up},
    "box": {"keep": lambda x: x, "down": layers.box_down, "up": layers.box_up},
}
EMBEDDINGS = ("positional", "fourier")
TIME_INPUTS = ("t", "log_sigma")
PRECONDS = ("none", "edm", "ect")
ECT_SIGMA = 0.003  # sigma_min of ECT: in evaluation its denoiser gives x back at this sigma

Raw = Callable[[jax.Array], jax.Array]  # the network inside a denoiser


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The U-Net's shape. The defaults are the CIFAR-10 network: 55,932,419 parameters at 32x32x3.

        channel_mult      one entry per resolution; each is half of the one before
        blocks            of the encoder per resolution; the decoder has one more
        augment_dim       length of the augmentation label, 0 for none
        num_classes       0 for none, else a row per class and one of the null class join the
                          features of t
        interval_init     "zero" makes u(z, r, t) = u(z, t, t) at the start, bit for bit
        resample          filter: "binomial" is [1, 3, 3, 1], "box" is [1, 1]
        residual_encoder  the input, shrunk, joins every lower resolution (NCSN++)
        embedding_mult    t and t - r have this many times `channels` features each
        embedding         features of t: "positional", or "fourier" with fixed random frequencies
        time_input        features are of time_scale * t, or of ln(sigma) / 4, sigma = t / (1 - t)
        time_routing      "decoupled": u(z, t, t) is the flow model's velocity, bit for bit
        precond           the network is the F of a denoiser, see `edm_velocity`, `ect_velocity`

    `make_unet` refuses fields that do not go together.
    """

    kind: str = "unet"  # tells the networks apart
    channels: int = limited(128, 1, WIDEST)  # at full resolution, times channel_mult
    # one factor per resolution, each half of the one before
    channel_mult: tuple[int, ...] = limited((2, 2, 2), 1, MOST_BLOCKS, empty=False)
    blocks: int = limited(4, 1, MOST_BLOCKS)  # of the encoder per resolution
    attention_resolutions: tuple[int, ...] = limited((16,), 1, WIDEST)  # in pixels
    dropout: float = limited(0.2, 0, BELOW_1)  # * u and u' of a row share the mask
    # * length of the augmentation label; 6 with data.augment, else 0 will do
    augment_dim: int = limited(6, 0, WIDEST)
    # * zero | random: the branch of t - r at the start
    interval_init: str = choice("zero", layers.INTERVAL_INITS)
    # binomial | box: filter of the resampling blocks
    resample: str = choice("binomial", RESAMPLE)
    residual_encoder: bool = False  # the shrunk input joins every lower resolution
    embedding: str = choice("positional", EMBEDDINGS)  # positional | fourier: features of t
    # features of t, and of t - r, as a multiple of channels
    embedding_mult: int = limited(2, 1, MOST_BLOCKS)
    time_input: str = choice("t", TIME_INPUTS)  # t | log_sigma: what the features are of
    time_scale: float = limited(1.0, LEAST, INF)  # factor on t before its features
    # none | edm: the network is the F of EDM's denoiser | ect: the same in ECT's form of evaluation
    precond: str = choice("none", PRECONDS)
    sigma_data: float = limited(0.5, LEAST, INF)  # EDM's, with precond = "edm" or "ect"
    num_classes: int = limited(0, 0, MOST_CLASSES)  # of the data; 0 = no label
    # interval: every layer sees t and the branch | decoupled: encoder and middle see t, decoder r
    time_routing: str = choice("interval", layers.TIME_ROUTINGS)
    logvar: bool = False  # a head for the log variance of the loss (`loss.logvar`)

    @property
    def noise_width(self) -> int:
        """Number of features of t, and of t - r."""
        return self.embedding_mult * self.channels


def edm_velocity(z: jax.Array, t: jax.Array, sigma_data: float, raw: Raw) -> jax.Array:
    """The velocity (z - D(x, sigma)) / t of EDM's denoiser D.

        x = z / (1 - t)
        sigma = t / (1 - t)
        D = c_skip x + c_out F(c_in x)
        n^2 = t^2 + s^2 (1 - t)^2
        v = (t - s^2 (1 - t)) / n^2 z - s / n F(z / n)

    s = sigma_data; raw = F; z, v: (B, ...); t: (B,).
    The division by t is carried out, so both ends are regular.
    """
    t = layers.at_least_float32(t).reshape(-1, *(1,) * (z.ndim - 1))
    n = jnp.sqrt(t**2 + (sigma_data * (1 - t)) ** 2)
    return (t - sigma_data**2 * (1 - t)) / n**2 * z - sigma_data / n * raw(z / n)


def ect_velocity(z: jax.Array, t: jax.Array, sigma_data: float, raw: Raw) -> jax.Array:
    """The same of ECT's denoiser in evaluation, with sigma - m for sigma outside of roots.

    With m = ECT_SIGMA and a = t - m (1 - t):

        v = (a^2 / t - s^2 (1 - t)) / (a^2 + s^2 (1 - t)^2) z - a / t s / n F(z / n)
    """
    # Below sigma = m, where D is not defined, v keeps its value there, -x.
    t = jnp.maximum(layers.at_least_float32(t), ECT_SIGMA / (1 + ECT_SIGMA))
    t = t.reshape(-1, *(1,) * (z.ndim - 1))
    n = jnp.sqrt(t**2 + (sigma_data * (1 - t)) ** 2)
    a = t - ECT_SIGMA * (1 - t)
    skip = (a**2 / t - sigma_data**2 * (1 - t)) / (a**2 + (sigma_data * (1 - t)) ** 2)
    return skip * z - a / t * sigma_data / n * raw(z / n)


VELOCITIES = {"edm": edm_velocity, "ect": ect_velocity}


def _group_norm(x: jax.Array, name: str, dtype: jnp.dtype | None) -> nn.GroupNorm:
    """GroupNorm for `x`: at most 32 groups of at least 4 channels, statistics in float32."""
    width = x.shape[-1]
    groups = max(1, min(32, width // 4))
    if width % groups:
        raise DmfError(
            f"config.network.channels: a layer of {width} channels does not split into {groups} "
            "groups; expected a multiple of 4 in layers below 128 channels, and of 32 above."
        )
    return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


def _conv(width: int, size: int, name: str, dtype: jnp.dtype | None, gain: float = 1.0) -> nn.Conv:
    return nn.Conv(width, (size, size), dtype=dtype, kernel_init=layers.xavier(gain), name=name)


class Block(nn.Module):
    """Residual block, optionally with resampling before and single-head attention after it."""

    width: int
    config: UNetConfig
    dtype: jnp.dtype | None
    how: layers.Execution
    resample: str = "keep"
    attend: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, rngs: jax.Array | None) -> jax.Array:
        """Map x (B, H, W, C) to (B, H', W', width), shifted by a projection of emb (B, E)."""
        resample = RESAMPLE[self.config.resample][self.resample]
        y = nn.silu(_group_norm(x, "norm0", self.dtype)(x))
        y = _conv(self.width, 3, "conv0", self.dtype)(resample(y))
        shift = nn.Dense(self.width, dtype=self.dtype, kernel_init=layers.xavier(), name="affine")(
            emb
        )
        y = y + shift[:, None, None, :]
        y = nn.silu(_group_norm(y, "norm1", self.dtype)(y))
        y = layers.RowDropout(self.config.dropout, name="dropout")(y, rngs)
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
        y = self.how.attend(q, k, v).reshape(x.shape)
        return _conv(channels, 1, "proj", self.dtype, gain=1e-5)(y)


class Encoder(nn.Module):
    """The way down; returns every intermediate result, the decoder's skips."""

    config: UNetConfig
    dtype: jnp.dtype | None
    how: layers.Execution

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, rngs: jax.Array | None) -> list[jax.Array]:
        """Map z (B, R, R, C) to the list of skips, finest first."""
        c, size, skips, aux = self.config, x.shape[1], [], x
        make = self.how.block(Block)
        for level, mult in enumerate(c.channel_mult):
            res, width = size >> level, c.channels * mult
            tag = f"{res}x{res}"
            if level == 0:
                x = _conv(c.channels, 3, f"{tag}_conv", self.dtype)(x)
            else:
                x = make(x.shape[-1], c, self.dtype, self.how, "down", name=f"{tag}_down")(
                    x, emb, rngs
                )
                if c.residual_encoder:
                    x = aux = (
                        x + self._shrunk(aux, x.shape[-1], f"{tag}_aux_residual")
                    ) * SKIP_SCALE
            skips.append(x)
            attend = res in c.attention_resolutions
            for k in range(c.blocks):
                block = make(width, c, self.dtype, self.how, attend=attend, name=f"{tag}_block{k}")
                x = block(x, emb, rngs)
                skips.append(x)
        return skips

    def _shrunk(self, aux: jax.Array, width: int, name: str) -> jax.Array:
        """3 x 3 convolution of the zero-extended image, then its halving.

        The filter sees beyond the border.
        """
        beyond = nn.Conv(
            width, (3, 3), padding=3, dtype=self.dtype, kernel_init=layers.xavier(), name=name
        )(aux)
        return RESAMPLE[self.config.resample]["down"](beyond)[:, 1:-1, 1:-1]


class Decoder(nn.Module):
    """The way up. The first block has attention, and the last one of an attention resolution."""

    config: UNetConfig
    out_channels: int
    dtype: jnp.dtype | None
    how: layers.Execution

    @nn.compact
    def __call__(
        self, skips: list[jax.Array], emb: jax.Array, late: jax.Array, rngs: jax.Array | None
    ) -> jax.Array:
        """Map the skips to u (B, R, R, out_channels). Its first two blocks, the middle, see emb."""
        c, size, rest, x = self.config, skips[0].shape[1], list(skips), skips[-1]
        make = self.how.block(Block)
        for level, mult in reversed(tuple(enumerate(c.channel_mult))):
            res, width = size >> level, c.channels * mult
            tag = f"{res}x{res}"
            if level == len(c.channel_mult) - 1:
                x = make(x.shape[-1], c, self.dtype, self.how, attend=True, name=f"{tag}_in0")(
                    x, emb, rngs
                )
                x = make(x.shape[-1], c, self.dtype, self.how, name=f"{tag}_in1")(x, emb, rngs)
            else:
                x = make(x.shape[-1], c, self.dtype, self.how, "up", name=f"{tag}_up")(
                    x, late, rngs
                )
            for k in range(c.blocks + 1):
                x = jnp.concatenate((x, rest.pop()), axis=-1)
                attend = k == c.blocks and res in c.attention_resolutions
                block = make(width, c, self.dtype, self.how, attend=attend, name=f"{tag}_block{k}")
                x = block(x, late, rngs)
        # In bfloat16 the last layer would put u on a grid of relative spacing 2^-8.
        x = layers.at_least_float32(x)
        x = nn.silu(_group_norm(x, f"{size}x{size}_aux_norm", None)(x))
        return _conv(self.out_channels, 3, f"{size}x{size}_aux_conv", None, gain=1e-5)(x)


class UNet(nn.Module):
    """u(z, r, t) by a U-Net conditioned on t, on h = t - r, on augmentation and on a class."""

    config: UNetConfig
    dtype: jnp.dtype | None
    how: layers.Execution = layers.PLAIN

    @nn.compact
    def __call__(
        self,
        z: jax.Array | None,
        r: jax.Array,
        t: jax.Array,
        condition: Condition,
        rngs: jax.Array | None,
    ) -> jax.Array:
        """Map z (B, R, R, C), r, t (B,), a condition, keys (B,) or None to u, shaped as z.

        Without z it gives the embedding alone, (B, 4 * channels).
        """
        emb = self._embedding(r, t, condition)
        if z is None:
            return emb[0]
        encoder = Encoder(self.config, self.dtype, self.how, name="enc")
        decoder = Decoder(self.config, z.shape[-1], self.dtype, self.how, name="dec")

        def raw(z: jax.Array) -> jax.Array:
            return decoder(encoder(z, emb[0], rngs), *emb, rngs)

        return (
            VELOCITIES[self.config.precond](z, t, self.config.sigma_data, raw)
            if self.config.precond in VELOCITIES
            else raw(z)
        )

    def _embedding(
        self, r: jax.Array, t: jax.Array, condition: Condition
    ) -> tuple[jax.Array, jax.Array]:
        """What encoder and middle see, and what the decoder sees.

        Both (B, 4 * channels), float32 or better: they carry the times.
        """
        noise_width, width = self.config.noise_width, 4 * self.config.channels
        decoupled = self.config.time_routing == "decoupled"
        of_times = [*map(self._features(), (t, r) if decoupled else (t,))]
        freqs = layers.frequencies(noise_width // 2, endpoint=True)
        of_h = layers.time_features(t - r, freqs, sin_first=True)
        xavier, augment, classes = layers.xavier(), condition.augment, self.config.num_classes
        if classes:
            table = layers.LabelEmbedder(classes, noise_width, _label_init, name="map_label")
            of_label = table(condition.label, t.shape[0])
            of_times = [x + of_label for x in of_times]
        if augment is not None:
            project = nn.Dense(
                2 * noise_width, use_bias=False, kernel_init=xavier, name="map_augment"
            )
            shift = project(augment)
            of_times = [x + shift[:, :noise_width] for x in of_times]
            of_h = of_h + shift[:, noise_width:]  # which a decoupled network does not read
        # Both kernels are column blocks of one official layer, so both count its fan-in.
        half = layers.uniform_within(math.sqrt(6 / (2 * noise_width + width)))
        start = half if self.config.interval_init == "random" else nn.initializers.zeros
        first = nn.Dense(width, kernel_init=half, name="map_layer0")
        embs = [*map(first, of_times)]
        if not decoupled:
            branch = nn.Dense(width, use_bias=False, kernel_init=start, name="interval")
            embs = [embs[0] + branch(of_h)]
        last = nn.Dense(width, kernel_init=xavier, name="map_layer1")
        embs = [nn.silu(last(nn.silu(emb))) for emb in embs]
        return embs[0], embs[-1]

    def _features(self) -> Callable[[jax.Array], jax.Array]:
        """The features of times: (B,) -> (B, noise_width)."""
        c = self.config
        if c.embedding == "fourier":
            of: Any = layers.FourierFeatures(c.noise_width, c.time_scale, name="map_noise")
        else:
            freqs = c.time_scale * layers.frequencies(c.noise_width // 2, endpoint=True)
            of = partial(layers.time_features, freqs=freqs, sin_first=True)
        return lambda t: of(layers.log_sigma(t) if c.time_input == "log_sigma" else t)


def _label_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """EDM's start of the label table (n + 1, width): sqrt(n) Xavier rows, the null class zero."""
    classes, width = shape[0] - 1, shape[1]
    draw = layers.uniform_within(math.sqrt(6 * classes / (classes + width)))
    return draw(key, shape, dtype).at[-1].set(0)


def make_unet(
    config: UNetConfig, image_shape: tuple[int, ...], dtype: jnp.dtype | None, how: layers.Execution
) -> UNet:
    """The module for images (R, R, C). Raises DmfError naming the field that does not fit."""
    layers.check_levels("U-Net", config, image_shape)
    layers.check_positive("config.network.embedding_mult", config.embedding_mult)
    for field in ("augment_dim", "num_classes"):
        if (value := getattr(config, field)) < 0:
            raise DmfError(f"config.network.{field} is {value}; expected 0 (no label) or more.")
    layers.check_choice("config.network.interval_init", config.interval_init, layers.INTERVAL_INITS)
    layers.check_choice("config.network.time_routing", config.time_routing, layers.TIME_ROUTINGS)
    layers.check_choice("config.network.resample", config.resample, tuple(RESAMPLE))
    _check_conditioning(config)
    return UNet(config, dtype, how)


def _check_conditioning(config: UNetConfig) -> None:
    """Raises DmfError for fields of the time's features that are wrong or do not go together."""
    c = config
    layers.check_choice("config.network.embedding", c.embedding, EMBEDDINGS)
    layers.check_choice("config.network.time_input", c.time_input, TIME_INPUTS)
    layers.check_choice("config.network.precond", c.precond, PRECONDS)
    for field, value in (("time_scale", c.time_scale), ("sigma_data", c.sigma_data)):
        if not 0 < value < math.inf:
            raise DmfError(f"config.network.{field} is {value}; expected a finite number above 0.")
    if c.noise_width % 2:
        raise DmfError(
            f"config.network.embedding_mult * config.network.channels is {c.noise_width}; "
            "expected an even number, as half of the features are sines."
        )
    if c.time_scale != 1 and c.time_input != "t":
        raise DmfError(
            f"config.network.time_scale is {c.time_scale} with time_input {c.time_input!r}; "
            "expected 1, or time_input 't'."
        )
    if c.precond == "none" and c.sigma_data != UNetConfig.sigma_data:
        raise DmfError(
            f"config.network.sigma_data is {c.sigma_data} with precond {c.precond!r}; "
            f"expected {UNetConfig.sigma_data}, or precond 'edm'."
        )
