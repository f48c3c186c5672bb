"""How much a row counts: a weight from its error, its times and the progress of training.

    loss of a row = s * sg(weight(s, r, t, progress, a)),  s = sum of e^2 over pixels

e is the row's residual. sg stops the gradient, so a weight acts as a constant.
Training's progress runs from 0 to 1 over the curriculum. A row looked back by a share a of t - r.

A factor of the times may follow the adaptive weight. Before it, a factor would be lost: with p = 1
and eps = 0 the adaptive weight divides it out again.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
Weight = Callable[[Array, Array, Array, Array, Array], Array]  # (s, r, t, progress, a) -> (B,)
TINY = 1e-12
Factor = Callable[[Array, Array, Array], Array]  # (r, t, progress) -> (B,)


def adaptive(p: float, eps: float) -> Weight:
    """1 / (s + eps)^p, the adaptive weight of MeanFlow (arXiv 2505.13447). p = 0 gives 1."""
    return lambda s, r, t, progress, a: (s + eps) ** -p


def alpha(p: float, eps: float) -> Weight:
    """a / (s + eps)^p, of alpha-Flow's code for s in raw scale (arXiv 2510.20771).

    s shrinks with a^2. Hence with p = 1 no stage weighs more than another, until s meets eps.
    """
    return lambda s, r, t, progress, a: a * (s + eps) ** -p


def norm(p: float, eps: float) -> Weight:
    """(1 - t)(1 - t') / a / (s + eps)^p with t' = t - a (t - r): ECT's weight (arXiv 2406.14548).

    With p = 1/2, r = 0 and s in raw scale, the loss is |D - D'| / (sigma - sigma'). Here D is the
    data that the network predicts, and sigma = t / (1 - t). The gradient is twice that of the norm.
    """

    def weight(s: Array, r: Array, t: Array, progress: Array, a: Array) -> Array:
        back = (1 - t) * (1 - t + a * (t - r)) / jnp.maximum(a, TINY)
        return jnp.where(r < t, back, 1) * (s + eps) ** -p

    return weight


# Name -> what makes the weight of p and eps.
WEIGHTS: dict[str, Callable[[float, float], Weight]] = {
    "adaptive": adaptive,
    "alpha": alpha,
    "norm": norm,
}


def progressive(rate: float, power: float) -> Factor:
    """1 - s + rate s (1 - (t - r)) with s = 1 - progress^power (arXiv 2511.19065).

    Short intervals count more at first, and all count alike at the end. The mean is 1 throughout,
    where rate = 1 / E[1 - (t - r)].
    """

    def factor(r: Array, t: Array, progress: Array) -> Array:
        s = 1 - progress**power
        return 1 - s + rate * s * (1 - (t - r))

    return factor


def min_snr(scale: float, limit: float) -> Factor:
    """scale min((1 - t)^2, limit t^2): min(SNR, limit) of predicted data, for the error of v.

    SNR = ((1 - t) / t)^2, and the error of data is t times the error of v.
    """
    return lambda r, t, progress: scale * jnp.minimum((1 - t) ** 2, limit * t**2)


def times(weight: Weight, pairs: Factor | None, border: Factor | None) -> Weight:
    """The weight times a factor of its own for rows with r < t, and for rows with r = t."""
    if pairs is None and border is None:
        return weight

    def both(s: Array, r: Array, t: Array, progress: Array, a: Array) -> Array:
        of_pair, of_border = (f(r, t, progress) if f else 1.0 for f in (pairs, border))
        return weight(s, r, t, progress, a) * jnp.where(r < t, of_pair, of_border)

    return both


def weighted_loss(
    e: Array,
    r: Array,
    t: Array,
    progress: float | Array,
    weight: Weight,
    share: Array | None = None,
) -> tuple[Array, Array]:
    """Loss and sum of squares of every row.

    e: (B, ...) residuals; r, t: (B,) times; progress: a scalar in [0, 1].
    share: a of the rows, (B,); None where they do not look back, which counts as 1.
    Returns (loss, s), both (B,) float32, or float64 for float64 residuals.
    """
    e = e.astype(jnp.promote_types(e.dtype, jnp.float32))
    s = jnp.sum(jnp.square(e), axis=tuple(range(1, e.ndim)))
    a = jnp.ones_like(s) if share is None else share
    return s * jax.lax.stop_gradient(weight(s, r, t, jnp.asarray(progress), a)), s
