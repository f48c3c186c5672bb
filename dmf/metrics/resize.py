"""The resizes in front of the feature networks. Each equals the library routine in its name.

Scores of one sample set differ between them by several per cent, so a protocol names one.
All are separable. NumPy builds the weights A and B while a program is traced.

    y[i, j] = sum_hw A[i, h] B[j, w] x[h, w]
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dmf.errors import DmfError


def resize(x: jax.Array, size: int, method: str) -> jax.Array:
    """Images x (B, H, W, C), float32 in 0..255, resized to (B, size, size, C) float32.

    method: a key of `RESIZES`.

        tf1_bilinear        TensorFlow 1, torch-fidelity
                            at i H/size: no half pixel, no antialiasing
        bilinear            MeanFlow in JAX, pytorch-fid, clean-fid legacy_pytorch
                            at (i + 1/2) H/size - 1/2, no antialiasing
        bilinear_antialias  torchmetrics
                            a triangle as wide as the larger of an input and an output pixel
        bicubic_antialias   torch's interpolate
                            the same with Keys' cubic (a = -1/2), which leaves 0..255 at edges
        bicubic_clean       clean-fid: Pillow's BICUBIC of float32 channels
                            the same cubic, clipped to 0..255

    Images that have this size are returned unchanged.
    Parmar et al. 2022 (arXiv 2104.11222) compare the methods.
    Raises DmfError for an unknown method, a size below 1, and x that is not float32 of rank 4.
    """
    if method not in RESIZES:
        raise DmfError(f"unknown resize {method!r}, expected one of {', '.join(RESIZES)}")
    if size < 1:
        raise DmfError(f"the size of resized images must be at least 1, got {size}")
    if x.ndim != 4 or x.dtype != jnp.float32 or 0 in x.shape[1:3]:
        raise DmfError(
            f"images to resize must be float32 of shape (B, H, W, C), got {x.dtype} of shape "
            f"{x.shape}"
        )
    if x.shape[1:3] == (size, size):
        return x
    for axis in (2, 1):  # rows first, as in Pillow
        if x.shape[axis] != size:
            x = _along(x, RESIZES[method](x.shape[axis], size), axis)
    return jnp.clip(x, 0.0, 255.0) if method == "bicubic_clean" else x


def _along(x: jax.Array, weights: np.ndarray, axis: int) -> jax.Array:
    """y[i] = sum_k w[i, k] x[first[i] + k] along an axis, over the nonzero weights only.

    weights: (n_out, n_in). A product with the whole matrix would be 3 to 10 times slower on a CPU,
    from 256 pixels on. Accelerators would also round its factors.
    """
    used = weights != 0.0
    first, last = used.argmax(axis=1), weights.shape[1] - 1 - used[:, ::-1].argmax(axis=1)
    width = int((last - first).max()) + 1
    first = np.minimum(first, weights.shape[1] - width)
    shape = tuple(-1 if a == axis else 1 for a in range(x.ndim))
    total = jnp.zeros((), x.dtype)
    for index in (first + k for k in range(width)):
        share = weights[np.arange(len(index)), index].astype(np.float32).reshape(shape)
        total = total + share * jnp.take(x, index, axis=axis, indices_are_sorted=True, mode="clip")
    return total


def _two_taps(source: np.ndarray, n_in: int) -> np.ndarray:
    """Weights (n_out, n_in) of linear interpolation at positions `source` (n_out,).

    The positions are float32 and not negative.
    """
    low = np.minimum(source.astype(np.int64), n_in - 1)
    share = np.clip(source - low.astype(np.float32), 0.0, 1.0).astype(np.float64)
    weights = np.zeros((len(source), n_in))
    rows = np.arange(len(source))
    weights[rows, low] += 1.0 - share
    weights[rows, np.minimum(low + 1, n_in - 1)] += share
    return weights


def _tf1_bilinear(n_in: int, n_out: int) -> np.ndarray:
    # float32 positions belong to the method: between a black and a white pixel, the last digit
    # of position 500 changes the value by 1e-2.
    return _two_taps(np.arange(n_out, dtype=np.float32) * np.float32(n_in / n_out), n_in)


def _bilinear(n_in: int, n_out: int) -> np.ndarray:
    scale = np.float32(n_in) / np.float32(n_out)
    source = _fused(float(scale), np.arange(n_out, dtype=np.float32) + np.float32(0.5), -0.5)
    return _two_taps(np.maximum(source, np.float32(0.0)), n_in)


def _bilinear_antialias(n_in: int, n_out: int) -> np.ndarray:
    return _window(n_in, n_out, _triangle, 1.0, np.float32)


def _bicubic_antialias(n_in: int, n_out: int) -> np.ndarray:
    return _window(n_in, n_out, _keys_cubic, 2.0, np.float32)


def _bicubic_clean(n_in: int, n_out: int) -> np.ndarray:
    return _window(n_in, n_out, _keys_cubic, 2.0, np.float64)


def _window(
    n_in: int,
    n_out: int,
    kernel: Callable[[np.ndarray], np.ndarray],
    radius: float,
    dtype: type[np.floating],
) -> np.ndarray:
    """Weights (n_out, n_in) of a kernel that widens where the image shrinks.

        A[i, j] = k((j + 1/2 - c_i) / f) / sum_j k(..)
        c_i = (i + 1/2) n_in/n_out
        f = max(n_in/n_out, 1)

    dtype: values are rounded to it at the places where the library does so.
    """
    scale = dtype(n_in) / dtype(n_out)
    widening = max(scale, dtype(1.0))
    shrink, support = np.float64(dtype(1.0) / widening), dtype(radius) * widening
    weights = np.zeros((n_out, n_in))
    for row in range(n_out):
        centre = scale * dtype(row + 0.5)
        low = max(int(np.float64(centre - support) + 0.5), 0)
        high = min(int(np.float64(centre + support) + 0.5), n_in)
        offset = np.arange(low, high).astype(dtype) - centre
        values = kernel(((offset.astype(np.float64) + 0.5) * shrink).astype(dtype))
        # cumsum adds in order; sum would add pairs.
        weights[row, low:high] = values / np.cumsum(values)[-1]
    return weights


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _keys_cubic(x: np.ndarray) -> np.ndarray:
    """Cubic convolution with a = -1/2, by Horner's rule and fused products.

    Keys 1981, equation 15.
    """
    x = np.abs(x)
    inner = _fused(_fused(1.5, x, -2.5) * x, x, 1.0)
    outer = _fused(_fused(_fused(-0.5, x, 2.5), x, -4.0), x, 2.0)
    return np.where(x < 1, inner, np.where(x < 2, outer, np.zeros_like(x)))


def _fused(a: np.ndarray | float, x: np.ndarray, b: float) -> np.ndarray:
    """a x + b, rounded once to x's type, like the fused multiply-add in torch's programs."""
    return (np.multiply(a, x, dtype=np.float64) + b).astype(x.dtype)


RESIZES: dict[str, Callable[[int, int], np.ndarray]] = {
    "tf1_bilinear": _tf1_bilinear,
    "bilinear": _bilinear,
    "bilinear_antialias": _bilinear_antialias,
    "bicubic_antialias": _bicubic_antialias,
    "bicubic_clean": _bicubic_clean,
}
