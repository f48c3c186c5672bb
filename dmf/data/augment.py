"""Training augmentation on the device: mirror images, and the EDM pipe with its label.

The pipe is from Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
Models", appendix F.2. It has the transformations that MeanFlow uses for CIFAR-10:

- x-flip
- isotropic scale
- anisotropic scale
- fractional translation

The label tells the network what was done. Label 0 then asks for unaugmented images.

The warp follows Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data",
appendix B. It reads the image on a grid twice as fine, between two orthogonal wavelet filters.

Row i uses the key fold_in(key, i), so nothing depends on the size or the layout of the batch.
Coordinates are pixels from the image centre, x to the right, y down.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmf.errors import DmfError

FLIP_MULTIPLIER = 1e8
SCALE_LOG2_STD = 0.2
ANISO_ROTATE_PROBABILITY = 0.5
TRANSLATE_STD = 0.125

SYM6 = np.array([
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
])  # fmt: skip
"""The scaling filter of the symlet of order 6: sum sqrt(2), orthonormal to its even shifts."""

_TAPS = len(SYM6)
# Centre of mass of the filter, in fine samples: pixel i sits at 2 i + _DELAY of the fine grid.
_DELAY = float(np.arange(_TAPS) @ SYM6 / SYM6.sum())


class Transform(NamedTuple):
    """What is done to one image. Fields are float32 scalars; all 0 is the identity."""

    flip: jax.Array  # 1: mirrored left to right, else 0
    scale: jax.Array  # w: magnified by 2**(0.2 w)
    # w: stretched by s = 2**(0.2 w) along (cos angle, -sin angle), and by 1/s across it
    aniso: jax.Array
    angle: jax.Array  # direction of the stretch in radians, counter-clockwise as seen, in [-pi, pi)
    shift_x: jax.Array  # w: moved right by 0.125 w widths
    shift_y: jax.Array  # w: moved down by 0.125 w heights


def random_flip(key: jax.Array, x: jax.Array) -> jax.Array:
    """Mirrors each row of x (B, H, W, C) left to right with probability 1/2."""
    flip = jax.vmap(jax.random.bernoulli)(_row_keys(key, x.shape[0]))
    return jnp.where(flip[:, None, None, None], x[:, :, ::-1], x)


def edm_augment(key: jax.Array, x: jax.Array, p: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Applies the EDM pipe, each transformation with probability p.

    The x-flip is drawn with probability 1/2 whenever p > 0.

    Args:
      key: one key for the batch.
      x: (B, H, W, C) float32, H and W at least 2.
      p: probability of each of scale, anisotropic scale and translation; MeanFlow: 0.12.

    Returns:
      The augmented images, and their labels (B, 6) float32 (`transform_label`), zero where nothing
      was done. An image that is at most flipped keeps its values bit for bit. The filters may take
      the values of others a little beyond the input's range.

    Raises:
      DmfError: H or W is 1.
    """
    transforms = jax.vmap(draw_transform, in_axes=(0, None))(_row_keys(key, x.shape[0]), p)
    return jax.vmap(apply_transform)(x, transforms), jax.vmap(transform_label)(transforms)


def _row_keys(key: jax.Array, rows: int) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(rows))


def draw_transform(key: jax.Array, p: float | jax.Array) -> Transform:
    """Draws what is done to one image: flip is 0 or 1, the others N(0, 1) with probability p."""
    gate, draw = jax.random.split(key)
    probability = jnp.stack([FLIP_MULTIPLIER * p, p, p, ANISO_ROTATE_PROBABILITY, p])
    chosen = jax.random.uniform(gate, (5,)) < probability
    flip_key, angle_key, normal_key = jax.random.split(draw, 3)
    scale, aniso, shift_x, shift_y = jax.random.normal(normal_key, (4,))
    angle = jax.random.uniform(angle_key, minval=-jnp.pi, maxval=jnp.pi)
    return Transform(
        flip=jnp.where(chosen[0], jax.random.bernoulli(flip_key).astype(jnp.float32), 0.0),
        scale=jnp.where(chosen[1], scale, 0.0),
        aniso=jnp.where(chosen[2], aniso, 0.0),
        angle=jnp.where(chosen[2] & chosen[3], angle, 0.0),
        shift_x=jnp.where(chosen[4], shift_x, 0.0),
        shift_y=jnp.where(chosen[4], shift_y, 0.0),
    )


def transform_label(t: Transform) -> jax.Array:
    """The label (6,) of one image, in the units of the draws.

    flip, scale, aniso cos(angle), aniso sin(angle), shift_x, shift_y. flip is 0 or 1; the others
    are standard normal or 0.
    """
    cos, sin = t.aniso * jnp.cos(t.angle), t.aniso * jnp.sin(t.angle)
    return jnp.stack([t.flip, t.scale, cos, sin, t.shift_x, t.shift_y])


def apply_transform(x: jax.Array, t: Transform) -> jax.Array:
    """Transforms one image (H, W, C): flip, magnify, stretch, move. Edges act as mirrors."""
    x = jnp.where(t.flip > 0, x[:, ::-1], x)
    still = (t.scale == 0) & (t.aniso == 0) & (t.shift_x == 0) & (t.shift_y == 0)
    return jnp.where(still, x, _warp(x, t))


def _source_of(t: Transform, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where in the input the content of output points (x, y) comes from, without the translation.

    The inverse of 2**(0.2 scale) R(-a) diag(s, 1/s) R(a), with y down and

        R(a) = [[cos a, -sin a], [sin a, cos a]]
    """
    stretch = jnp.exp2(SCALE_LOG2_STD * t.aniso)
    shrink = jnp.exp2(-SCALE_LOG2_STD * t.scale)
    cos, sin = jnp.cos(t.angle), jnp.sin(t.angle)
    along = (cos * x - sin * y) * shrink / stretch
    across = (sin * x + cos * y) * shrink * stretch
    return cos * along + sin * across, cos * across - sin * along


@functools.cache
def _resampling(size: int) -> tuple[np.ndarray, np.ndarray]:
    """One axis's filters as matrices, float32: up (4 (size - 1), size), down (size, 2 size + 10).

    `up` continues the axis by reflection and doubles its resolution. The reflected signal has
    period 2 (size - 1), so one period stands for the whole line, and no transform reaches past a
    margin. The matrix `down` is half the transpose of `up` on the line. The filter is orthonormal
    to its even shifts, so down(up(x)) = x.
    """
    if size < 2:
        raise DmfError(
            f"edm_augment got an image with a side of {size}: expected at least 2 pixels"
        )
    period = 2 * (size - 1)
    up = np.zeros((2 * period, size))
    down = np.zeros((size, 2 * size + _TAPS - 2))
    for tap, value in enumerate(SYM6):
        for i in range(period):
            up[(2 * i + tap) % (2 * period), min(i, period - i)] += np.sqrt(2) * value
        for i in range(size):
            down[i, 2 * i + tap] = value / np.sqrt(2)
    return up.astype(np.float32), down.astype(np.float32)


def _warp(x: jax.Array, t: Transform) -> jax.Array:
    """Warps one image (H, W, C): upsample by 2, read each fine point at its source, downsample."""
    height, width = x.shape[:2]
    (up_y, down_y), (up_x, down_x) = _resampling(height), _resampling(width)
    # Accelerators multiply below float32 by default, which would add noise to every warped image.
    separable = functools.partial(jnp.einsum, "ai,bj,ijc->abc", precision=jax.lax.Precision.HIGHEST)
    fine = separable(up_y, up_x, x)

    centre_y, centre_x = height - 1 + _DELAY, width - 1 + _DELAY
    out_y = jnp.arange(down_y.shape[1]) - centre_y - 2 * TRANSLATE_STD * height * t.shift_y
    out_x = jnp.arange(down_x.shape[1]) - centre_x - 2 * TRANSLATE_STD * width * t.shift_x
    source_x, source_y = _source_of(t, out_x[None, :], out_y[:, None])
    moved = _bilinear(fine, source_x + centre_x, source_y + centre_y)
    return separable(down_y, down_x, moved)


def _bilinear(image: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Reads a periodic image (h, w, C) at the points (x, y), each (a, b), bilinearly: (a, b, C)."""
    height, width, channels = image.shape
    left, top = jnp.floor(x), jnp.floor(y)
    fx, fy = (x - left)[..., None], (y - top)[..., None]
    x0, y0 = left.astype(jnp.int32) % width, top.astype(jnp.int32) % height
    x1, y1 = (x0 + 1) % width, (y0 + 1) % height
    flat = image.reshape(height * width, channels)
    upper = (1 - fx) * flat[y0 * width + x0] + fx * flat[y0 * width + x1]
    lower = (1 - fx) * flat[y1 * width + x0] + fx * flat[y1 * width + x1]
    return (1 - fy) * upper + fy * lower
