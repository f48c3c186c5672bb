"""Shared by the networks: how they are computed, time features, dropout, resampling, checks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dmf.errors import DmfError
from dmf.networks import attention

Initializer = Callable[..., jax.Array]

INTERVAL_INITS = ("zero", "random")
# Who sees r: a branch of its own, or the later layers in the place of t.
TIME_ROUTINGS = ("interval", "decoupled")
FOURIER_SCALE = 16.0  # standard deviation of EDM's random frequencies
# EDM is trained and sampled in this range. Outside it, c_noise keeps the value of its end.
SIGMA_RANGE = (0.002, 80.0)
TIME_FEATURES = 256  # of a transformer's time embedder


def _is_matmul(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Whether repeating it costs much: a convolution, or a product with one matrix for all rows."""
    products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive is jax.lax.conv_general_dilated_p or products(primitive, *operands, **params)


# What the forward pass keeps of a block for the backward pass, besides the block's input.
REMAT: dict[str, Callable[..., bool]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "dots": _is_matmul,
}


@dataclass(frozen=True)
class Execution:
    """How a network is computed. Values differ by rounding only.

    attend: the attention kernel, of q, k, v (B, N, heads, head_dim) each.
    remat: what the backward pass computes again. "none" keeps everything, "blocks" repeats all
        inside a block, "dots" all except its convolutions and matrix products.
    scan: a DiT's blocks as one compiled block, run depth times.
    """

    attend: attention.Kernel = attention.xla
    remat: str = "none"
    scan: bool = False

    def block(self, kind: type[nn.Module]) -> Any:
        """The class `kind`, whose modules keep for the backward pass what `remat` says."""
        return kind if self.remat == "none" else nn.remat(kind, policy=REMAT[self.remat])

    def scan_body(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The same for a function that jax.lax.scan will run.

        A scan needs no guard against merging equal results.
        """
        return (
            step
            if self.remat == "none"
            else jax.checkpoint(step, prevent_cse=False, policy=REMAT[self.remat])
        )


PLAIN = Execution()


def check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    """Raise DmfError unless `value` is one of `choices`."""
    if value not in choices:
        raise DmfError(f"{field} is {value!r}; expected one of {', '.join(map(repr, choices))}.")


def check_positive(field: str, value: int) -> None:
    """Raise DmfError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DmfError(f"{field} is {value!r}; expected an integer of at least 1.")


def check_levels(name: str, config: Any, image_shape: tuple[int, ...]) -> None:
    """Raise DmfError unless a U-Net's resolutions size, size / 2, ... fit images (R, R, C).

    name: of the network, for the message.
    """
    if len(image_shape) != 3 or image_shape[0] != image_shape[1]:
        raise DmfError(f"image_shape is {image_shape}; the {name} expects square images (R, R, C).")
    if not config.channel_mult:
        raise DmfError("config.network.channel_mult is empty; expected one factor per resolution.")
    for field in ("channels", "blocks"):
        check_positive(f"config.network.{field}", getattr(config, field))
    for mult in config.channel_mult:
        check_positive("config.network.channel_mult", mult)
    size, levels = image_shape[0], len(config.channel_mult)
    if size % 2 ** (levels - 1):
        raise DmfError(
            f"config.network.channel_mult has {levels} resolutions, so the image size must be "
            f"divisible by {2 ** (levels - 1)}; got {size}."
        )
    known = [size >> level for level in range(levels)]
    for found in config.attention_resolutions:
        if found not in known:
            raise DmfError(
                f"config.network.attention_resolutions has {found}; expected some of "
                f"{', '.join(map(str, known))}, the resolutions of a network of {levels} levels "
                f"on images of {size} pixels."
            )
    if not 0.0 <= config.dropout < 1.0:
        raise DmfError(f"config.network.dropout is {config.dropout}; expected 0 <= dropout < 1.")


def at_least_float32(x: jax.Array) -> jax.Array:
    """Lift half precision to float32; float32 and float64 pass through unchanged."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def frequencies(count: int, *, endpoint: bool) -> np.ndarray:
    """Geometric frequencies in radians per unit of time, from 1 down to 1e-4.

        f_k = 1e4 ** (-k / n), k = 0 .. count - 1

    With `endpoint` n = count - 1 (EDM). Without it n = count (DiT).
    """
    steps = count - 1 if endpoint else count
    return 1e4 ** (-np.arange(count) / max(steps, 1))


def time_features(time: jax.Array, freqs: np.ndarray | jax.Array, *, sin_first: bool) -> jax.Array:
    """Sine and cosine of raw times: (B,) -> (B, 2 * len(freqs)), never below float32."""
    time = at_least_float32(time)
    angle = time[:, None] * jnp.asarray(freqs, time.dtype)
    halves = (jnp.sin(angle), jnp.cos(angle)) if sin_first else (jnp.cos(angle), jnp.sin(angle))
    return jnp.concatenate(halves, axis=-1)


def log_sigma(t: jax.Array) -> jax.Array:
    """EDM's c_noise of times t (B,): ln(sigma) / 4, sigma = t / (1 - t) in SIGMA_RANGE.

    EDM, table 1. Value and derivative are finite at every t; outside the range the slope is 0.
    """
    low, high = (sigma / (1 + sigma) for sigma in SIGMA_RANGE)
    t = jnp.clip(at_least_float32(t), low, high)
    return (jnp.log(t) - jnp.log1p(-t)) / 4


def position_embedding(height: int, width: int, dim: int) -> np.ndarray:
    """Fixed embedding (height * width, dim), float64: [sin | cos] of column, then of row."""
    freqs = frequencies(dim // 4, endpoint=False)

    def one_axis(position: np.ndarray) -> np.ndarray:
        angle = position.reshape(-1, 1) * freqs
        return np.concatenate((np.sin(angle), np.cos(angle)), axis=1)

    row, column = np.mgrid[:height, :width].astype(np.float64)
    return np.concatenate((one_axis(column), one_axis(row)), axis=1)


VARIANCE = "logvar_linear"  # the head's name among the parameters
VARIANCE_FEATURES = 128  # of t, and of r


def variance_start() -> dict[str, jax.Array]:
    """The parameters of the head `log_variance`, which gives 0 at the start."""
    return {"kernel": jnp.zeros((2 * VARIANCE_FEATURES, 1)), "bias": jnp.zeros(1)}


def log_variance(head: Mapping[str, jax.Array], r: jax.Array, t: jax.Array) -> jax.Array:
    """A linear map of the features of t and r, (B,) -> (B,): the scale of the loss at these times.

    Decoupled MeanFlow, arXiv 2510.24474. It does not see z, so no derivative of u passes it.
    """
    freqs = frequencies(VARIANCE_FEATURES // 2, endpoint=False)
    features = [time_features(time, freqs, sin_first=False) for time in (t, r)]
    return (jnp.concatenate(features, axis=-1) @ head["kernel"] + head["bias"])[:, 0]


class FourierFeatures(nn.Module):
    """Sine and cosine, in this order, at fixed random frequencies that no gradient reaches."""

    width: int
    scale: float
    spread: float = FOURIER_SCALE

    @nn.compact
    def __call__(self, time: jax.Array) -> jax.Array:
        """Map time (B,) to (B, width)."""
        freqs = jax.lax.stop_gradient(
            self.param("freqs", nn.initializers.normal(self.spread), (self.width // 2,))
        )
        return time_features(time, 2 * math.pi * self.scale * freqs, sin_first=True)


def uniform_within(limit: float) -> Initializer:
    """Initialiser U(-limit, limit), for kernels whose fans differ from their shape.

    Drawn flat: a counter-based generator over several axes takes XLA twice as long to compile.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, (math.prod(shape),), dtype, -limit, limit).reshape(shape)

    return init


def xavier(gain: float = 1.0) -> Initializer:
    """Initialiser U(-a, a), a = gain * sqrt(6 / (fan_in + fan_out)).

    A kernel window counts in both fans.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        fans = math.prod(shape[:-2]) * (shape[-2] + shape[-1])
        return uniform_within(gain * math.sqrt(6 / fans))(key, shape, dtype)

    return init


class Dense(nn.Dense):
    """Flax's layer on the tokens of all rows as one matrix.

    The gradient of its kernel is then one plain matrix product. Otherwise XLA on a CPU transposes
    copies of the operands, and a DiT's gradient takes a quarter longer.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (..., inputs) to (..., features)."""
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)


class Attention(nn.Module):
    """Multi-head self-attention; the columns of qkv are [q | k | v], each head-major.

    grid: rows and columns of the tokens, for rotary positions of queries and keys.
    """

    heads: int
    attend: attention.Kernel
    dtype: jnp.dtype | None
    qk_norm: bool = False
    grid: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Mix tokens (B, N, width)."""
        batch, tokens, width = x.shape
        qkv = Dense(3 * width, dtype=self.dtype, kernel_init=xavier(), name="qkv")(x)
        qkv = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.qk_norm:
            q = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name="q_norm")(q)
            k = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name="k_norm")(k)
        if self.grid:
            angle = attention.grid_angles(*self.grid, width // self.heads)
            q, k = attention.rotated(q, angle), attention.rotated(k, angle)
        y = self.attend(q, k, v).reshape(batch, tokens, width)
        return Dense(width, dtype=self.dtype, kernel_init=xavier(), name="proj")(y)


class PatchEmbed(nn.Module):
    """Linear map of patches, (B, H, W, C) -> (B, H/p * W/p, width), row by row."""

    patch: int
    width: int
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Cut z into patches and project them."""
        # Xavier for this matrix (p * p * C, width), not for a sliding convolution.
        limit = math.sqrt(6 / (self.patch**2 * z.shape[-1] + self.width))
        window, init = (self.patch, self.patch), uniform_within(limit)
        proj = nn.Conv(
            self.width, window, window, "VALID", dtype=self.dtype, kernel_init=init, name="proj"
        )
        x = proj(z)
        return x.reshape(x.shape[0], -1, self.width)


class TimeEmbedder(nn.Module):
    """Two-layer MLP on the features of a raw time, (B,) -> (B, width), always in float32."""

    width: int
    zero_last: bool = False
    start: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, time: jax.Array) -> jax.Array:
        """Embed times (B,); identically zero at the start when `zero_last`."""
        normal = self.start
        last = nn.initializers.zeros if self.zero_last else normal
        freqs = frequencies(TIME_FEATURES // 2, endpoint=False)
        x = time_features(time, freqs, sin_first=False)
        x = nn.silu(nn.Dense(self.width, kernel_init=normal, name="mlp_0")(x))
        return nn.Dense(self.width, kernel_init=last, name="mlp_2")(x)


class LabelEmbedder(nn.Module):
    """Table of num_classes + 1 rows; the last row is the null class."""

    num_classes: int
    width: int
    start: Initializer

    @nn.compact
    def __call__(self, label: jax.Array | None, batch: int) -> jax.Array:
        """Embed classes (B,). None is the null class; a class beyond the end gives NaN."""
        if label is None:
            label = jnp.full((batch,), self.num_classes, jnp.int32)
        rows = self.num_classes + 1
        return nn.Embed(rows, self.width, embedding_init=self.start, name="embedding_table")(label)


class RowDropout(nn.Module):
    """Dropout with one key per row, so that a row's mask depends on its key alone.

        mask_i = bernoulli(fold_in(rngs[i], crc32(module path)), 1 - rate)

    Two evaluations of the same rows share their masks. One of them may run on a part of the batch,
    or on other devices. A finite difference needs that, because two masks drown it.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, rngs: jax.Array | None) -> jax.Array:
        """Drop entries of `x` (B, ...) with typed keys `rngs` (B,). None drops nothing."""
        if rngs is None or self.rate == 0.0:
            return x
        salt = zlib.crc32("/".join(self.path).encode())
        keep = 1.0 - self.rate

        def row_mask(key: jax.Array) -> jax.Array:
            # float32 also under jax_enable_x64, where a Python float would draw different bits
            return jax.random.bernoulli(
                jax.random.fold_in(key, salt), np.float32(keep), x.shape[1:]
            )

        return jnp.where(jax.vmap(row_mask)(rngs), x / keep, 0)


def _shifted(x: jax.Array, axis: int, by: int) -> jax.Array:
    """Move `x` by `by` places along `axis` and fill with zeros."""
    padding = [(by, -by, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


def blur_down(x: jax.Array) -> jax.Array:
    """Halve (B, H, W, C) as EDM does.

    The depthwise filter is outer([1, 3, 3, 1]) / 64, with stride 2 and padding 1.
    Per axis: y_i = (x_{2i-1} + 3 x_{2i} + 3 x_{2i+1} + x_{2i+2}) / 8.
    These are sums of shifted halves. A grouped convolution would lose precision on accelerators.
    """
    for axis in (1, 2):
        pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
        even, odd = jnp.take(pairs, 0, axis + 1), jnp.take(pairs, 1, axis + 1)
        x = (3 * (even + odd) + _shifted(odd, axis, 1) + _shifted(even, axis, -1)) / 8
    return x


def blur_up(x: jax.Array) -> jax.Array:
    """Double (B, H, W, C) as EDM does.

    The transposed filter is outer([1, 3, 3, 1]) / 16, with stride 2 and padding 1.
    Per axis: y_{2i} = (3 x_i + x_{i-1}) / 4 and y_{2i+1} = (3 x_i + x_{i+1}) / 4, zero outside.
    """
    for axis in (1, 2):
        even, odd = (3 * x + _shifted(x, axis, 1)) / 4, (3 * x + _shifted(x, axis, -1)) / 4
        pairs = jnp.stack((even, odd), axis=axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    return x


def box_down(x: jax.Array) -> jax.Array:
    """Halve (B, H, W, C): the mean of every 2 x 2 block."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def box_up(x: jax.Array) -> jax.Array:
    """Double (B, H, W, C): every value four times, the nearest neighbour."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
