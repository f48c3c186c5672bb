"""The Inception-v3 network of the FID: TensorFlow's frozen graph of December 2015.

The weights come from its port to PyTorch.

It differs from the classifier of the paper (arXiv:1512.00567) and from torchvision's.
Average pools leave their padding out of the mean.
The pool branch of the last block takes the maximum. There are 1008 classes.
Every published FID depends on these weights, pt_inception-2015-12-05-6726825d.pth.
Other Inception networks give other numbers.

Input: 299 x 299 RGB, channels last. The caller resizes and scales it.
There are two scalings of bytes b in 0..255, and their statistics cannot be mixed:

    (b - 128) / 128   TTUR, ADM, torch-fidelity, StyleGAN
    2 (b / 255) - 1   pytorch-fid

Their programs also resize to 299 in different ways.

Parameter names follow the PyTorch file, with '/' for '.': Mixed_6b/branch7x7_1/conv/kernel.
Running means and variances are parameters too, as the network is never trained here.
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
from dmf.networks import layers

SIZE = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7
BATCH_NORM_EPS = 1e-3

Window = tuple[int, int]
Step = tuple[int, Window]  # channels out, kernel size


@dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """The FID's Inception network. It has one shape.

    It has 23,850,960 weights and 34,432 running statistics.
    """

    kind: str = "inception"


class Features(NamedTuple):
    """The features that metrics use, all float32.

        pool           (B, 2048)  global mean of the last block
                                  for FID, KID, precision and recall
        spatial        (B, 2023)  for sFID (arXiv:2103.03841)
        logits         (B, 1008)  pool @ kernel, WITHOUT the bias
                                  the inception score takes their softmax
        biased_logits  (B, 1008)  logits + bias, as a classifier has them

    `spatial` is TensorFlow's `mixed_6/conv:0`: the 1x1 branch of Mixed_6d after its ReLU.
    It has the first 7 of 192 channels at 17 x 17 positions, in the order (row, column, channel).
    ADM's reference statistics mu_s and sigma_s have that order.
    """

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array
    biased_logits: jax.Array


class Inception(NamedTuple):
    """The network as two pure functions.

    init(key) -> params: A nested dict of float32 arrays.
    They are random, for tests only: a FID needs the published weights.

    apply(params, x) -> Features: x is (B, 299, 299, 3), in about [-1, 1].
    Products are full float32 ("highest"), also where bfloat16 or TF32 would be faster.
    Raises DmfError for another shape.
    """

    init: Callable[[jax.Array], dict[str, Any]]
    apply: Callable[..., Features]


def _he(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return layers.uniform_within(math.sqrt(6 / math.prod(shape[:-1])))(key, shape, dtype)


class FrozenBatchNorm(nn.Module):
    """(x - mean) scale / sqrt(var + 0.001) + bias with stored mean and variance, per channel."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x (B, H, W, C)."""
        like = x.shape[-1:], jnp.float32
        scale, var = (self.param(name, nn.initializers.ones, *like) for name in ("scale", "var"))
        bias, mean = (self.param(name, nn.initializers.zeros, *like) for name in ("bias", "mean"))
        return (x - mean) * (scale * jax.lax.rsqrt(var + BATCH_NORM_EPS)) + bias


class Unit(nn.Module):
    """Convolution without bias, frozen batch norm, ReLU."""

    width: int
    window: Window
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, H, W, C) to (B, H', W', width)."""
        # On CPU, XLA's fast convolution exists for "SAME" at stride 1 only.
        # To use it and cut off the border is 3 to 7 times faster than "VALID".
        cut = self.padding == "VALID" and self.stride == 1
        conv = nn.Conv(
            self.width,
            self.window,
            self.stride,
            "SAME" if cut else self.padding,
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=_he,
            name="conv",
        )
        y = conv(x)
        if cut:
            top, left = (n // 2 for n in self.window)
            y = y[:, top : y.shape[1] - top, left : y.shape[2] - left]
        return nn.relu(FrozenBatchNorm(name="bn")(y))


def _chain(x: jax.Array, name: str, *steps: Step) -> jax.Array:
    """Units name_1, name_2, ... one after the other, keeping the size."""
    for k, (width, window) in enumerate(steps, start=1):
        x = Unit(width, window, name=f"{name}_{k}")(x)
    return x


def _halve(x: jax.Array, width: int, name: str) -> jax.Array:
    return Unit(width, (3, 3), 2, "VALID", name=name)(x)


def _max_halve(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2))


def _mean(x: jax.Array) -> jax.Array:
    """3x3 mean over the positions inside the image: padding is not counted."""
    inside = jnp.ones_like(x[:1, ..., :1])
    total, count = (nn.pool(y, 0.0, jax.lax.add, (3, 3), (1, 1), "SAME") for y in (x, inside))
    return total / count


def _max(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), padding="SAME")


def _join(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


class Block35(nn.Module):
    """Mixed_5b, 5c and 5d, at 35 x 35 positions."""

    pool_width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, 35, 35, C) to (B, 35, 35, 224 + pool_width)."""
        return _join(
            Unit(64, (1, 1), name="branch1x1")(x),
            _chain(x, "branch5x5", (48, (1, 1)), (64, (5, 5))),
            _chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
            Unit(self.pool_width, (1, 1), name="branch_pool")(_mean(x)),
        )


class To17(nn.Module):
    """Mixed_6a, from 35 x 35 to 17 x 17 positions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, 35, 35, 288) to (B, 17, 17, 768)."""
        y = _chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)))
        return _join(_halve(x, 384, "branch3x3"), _halve(y, 96, "branch3x3dbl_3"), _max_halve(x))


class Block17(nn.Module):
    """Mixed_6b to 6e, at 17 x 17 positions, with kernels 1x7 and 7x1."""

    inner: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, 17, 17, 768) to the same shape; channels 0-191 are the 1x1 branch."""
        c, row, column = self.inner, (1, 7), (7, 1)
        return _join(
            Unit(192, (1, 1), name="branch1x1")(x),
            _chain(x, "branch7x7", (c, (1, 1)), (c, row), (192, column)),
            _chain(x, "branch7x7dbl", (c, (1, 1)), (c, column), (c, row), (c, column), (192, row)),
            Unit(192, (1, 1), name="branch_pool")(_mean(x)),
        )


class To8(nn.Module):
    """Mixed_7a, from 17 x 17 to 8 x 8 positions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, 17, 17, 768) to (B, 8, 8, 1280)."""
        y = _chain(x, "branch3x3", (192, (1, 1)))
        z = _chain(x, "branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)))
        return _join(_halve(y, 320, "branch3x3_2"), _halve(z, 192, "branch7x7x3_4"), _max_halve(x))


class Block8(nn.Module):
    """Mixed_7b and 7c, at 8 x 8 positions."""

    pool: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, 8, 8, C) to (B, 8, 8, 2048)."""
        y = _chain(x, "branch3x3", (384, (1, 1)))
        z = _chain(x, "branch3x3dbl", (448, (1, 1)), (384, (3, 3)))
        return _join(
            Unit(320, (1, 1), name="branch1x1")(x),
            Unit(384, (1, 3), name="branch3x3_2a")(y),
            Unit(384, (3, 1), name="branch3x3_2b")(y),
            Unit(384, (1, 3), name="branch3x3dbl_3a")(z),
            Unit(384, (3, 1), name="branch3x3dbl_3b")(z),
            Unit(192, (1, 1), name="branch_pool")(self.pool(x)),
        )


class Head(nn.Module):
    """The linear classifier, with its bias kept apart."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map x (B, 2048) to the logits (B, 1008) without and with the bias."""
        kernel = self.param("kernel", _he, (x.shape[-1], CLASSES), jnp.float32)
        logits = jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST)
        return logits, logits + self.param("bias", nn.initializers.zeros, (CLASSES,), jnp.float32)


class InceptionNetwork(nn.Module):
    """The blocks in order, from the image to the features."""

    @nn.compact
    def __call__(self, x: jax.Array) -> Features:
        """Map x (B, 299, 299, 3) to Features."""
        x = Unit(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Unit(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = _max_halve(Unit(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = Unit(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = _max_halve(Unit(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x))
        for letter, pool_width in zip("bcd", (32, 64, 64), strict=True):
            x = Block35(pool_width, name=f"Mixed_5{letter}")(x)
        x = To17(name="Mixed_6a")(x)
        for letter, inner in zip("bcd", (128, 160, 160), strict=True):
            x = Block17(inner, name=f"Mixed_6{letter}")(x)
        spatial = x[..., :SPATIAL_CHANNELS]
        x = To8(name="Mixed_7a")(Block17(192, name="Mixed_6e")(x))
        # The maximum in 7c is probably a mistake, and the weights were trained with it.
        x = Block8(_max, name="Mixed_7c")(Block8(_mean, name="Mixed_7b")(x))
        pool = x.mean(axis=(1, 2))
        return Features(pool, spatial.reshape(len(spatial), -1), *Head(name="fc")(pool))


def build_inception(config: InceptionConfig) -> Inception:
    """Builds the network. Raises DmfError for a config of another kind."""
    if not isinstance(config, InceptionConfig) or config.kind != "inception":
        raise DmfError(
            f"config.kind is {config.kind!r} in a {type(config).__name__}; "
            "expected 'inception', InceptionConfig."
        )
    module = InceptionNetwork()
    shape = (SIZE, SIZE, 3)

    def init(key: jax.Array) -> dict[str, Any]:
        return module.lazy_init(key, jax.ShapeDtypeStruct((1, *shape), jnp.float32))["params"]

    def apply(params: dict[str, Any], x: jax.Array) -> Features:
        if x.ndim != 4 or x.shape[1:] != shape:
            raise DmfError(
                f"x has shape {x.shape}; expected (B, {SIZE}, {SIZE}, 3), resized and scaled."
            )
        return Features(*module.apply({"params": params}, x.astype(jnp.float32)))

    return Inception(init, apply)
