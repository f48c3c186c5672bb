"""How much a row counts: a weight from its error, its times and the progress of training.

    loss of a row = s * sg(weight(s, r, t, progress)),  s = sum of e^2 over pixels

e is the row's residual. sg stops the gradient, so a weight acts as a constant.
progress runs from 0 to 1 over the curriculum.
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


def weighted_loss(
    e: Array, r: Array, t: Array, progress: float | Array, weight: Weight
) -> tuple[Array, Array]:
    """Loss and sum of squares of every row.

    e: (B, ...) residuals; r, t: (B,) times; progress: a scalar in [0, 1].
    Returns (loss, s), both (B,) float32, or float64 for float64 residuals.
    """
    e = e.astype(jnp.promote_types(e.dtype, jnp.float32))
    s = jnp.sum(jnp.square(e), axis=tuple(range(1, e.ndim)))
    return s * jax.lax.stop_gradient(weight(s, r, t, jnp.asarray(progress))), s
