"""How much a row counts: a weight from its error, its times and the progress of training.

    loss of a row = s * sg(weight(s, r, t, progress)),  s = sum of e^2 over pixels

e is the row's residual. sg stops the gradient, so a weight acts as a constant.
progress runs from 0 to 1 over the curriculum.

`LOG_VARIANCES` has another way: a scale e^lv that a head of the network learns for the times r, t.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
Weight = Callable[[Array, Array, Array, Array], Array]  # (s, r, t, progress) -> (B,)


def adaptive(p: float, eps: float) -> Weight:
    """1 / (s + eps)^p, the adaptive weight of MeanFlow (arXiv 2505.13447). p = 0 gives 1."""
    return lambda s, r, t, progress: (s + eps) ** -p


# Name -> what makes the weight of p and eps.
WEIGHTS: dict[str, Callable[[float, float], Weight]] = {"adaptive": adaptive}


def paper(m: Array, lv: Array) -> Array:
    """log(1 + m e^-lv) + lv / 2, the paper's. Its minimum over lv is at e^lv = m."""
    return jnp.log1p(m * jnp.exp(-lv)) + lv / 2


def released(m: Array, lv: Array) -> Array:
    """log(m e^-lv + c) + lv with c = .01, the released code's, written as log(m + c e^lv).

    It has no minimum over lv, which falls for ever.
    """
    return jnp.log(m + 0.01 * jnp.exp(lv))


# Forms of the loss of Decoupled MeanFlow (arXiv 2510.24474): (m, lv) -> loss, all (B,). m is the
# mean of e^2 over pixels. "off" leaves the loss to `WEIGHTS`.
OFF = "off"
LOG_VARIANCES: dict[str, Callable[[Array, Array], Array] | None] = {
    OFF: None,
    "paper": paper,
    "released": released,
}


def learned_loss(e: Array, lv: Array, form: str) -> tuple[Array, Array]:
    """Loss by a learned log variance lv (B,), and sum of squares, of every row; see above.

    The gradient reaches e and lv. form: a key of LOG_VARIANCES.
    """
    loss, s = LOG_VARIANCES[form], _squares(e)
    assert loss is not None
    return loss(s / (e.size // e.shape[0]), lv), s


def weighted_loss(
    e: Array, r: Array, t: Array, progress: float | Array, weight: Weight
) -> tuple[Array, Array]:
    """Loss and sum of squares of every row.

    e: (B, ...) residuals; r, t: (B,) times; progress: a scalar in [0, 1].
    Returns (loss, s), both (B,) float32, or float64 for float64 residuals.
    """
    s = _squares(e)
    return s * jax.lax.stop_gradient(weight(s, r, t, jnp.asarray(progress))), s


def _squares(e: Array) -> Array:
    """The sum of e^2 over pixels, (B,)."""
    e = e.astype(jnp.promote_types(e.dtype, jnp.float32))
    return jnp.sum(jnp.square(e), axis=tuple(range(1, e.ndim)))
