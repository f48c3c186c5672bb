"""How far a finite difference looks back: by D = a (t - r), with a share a for each row.

    linear     a = rho everywhere
    dagger     rho is the share of the noise ratio t / (1 - t), and a follows from it
    sigmoid    dagger, with a larger rho where there is less noise
    fixed      rho is the time D itself, whatever t - r
    floor      dagger, with a least a
    adaptive   rho times a ratio from a table that training itself keeps

rho belongs to the stage and shrinks from one stage to the next. The paper calls it d.

The adaptive table follows ADCM (arXiv 2510.17266). Let f = z - (t - r) u(z, r, t).
A step back by D moves f by D e, to first order. Here e is the residual in unit scale:

    e = u + (u - u') / a - v

Before the move, f is wrong by -(t - r)(u - v). ADCM weighs the move against the error that is left:

    E|D e|^2 + lambda E|(t - r)(u - v) - D e|^2  is least at
    D = (t - r) lambda / (1 + lambda) E<e, u - v> / E|e|^2

A stage sets lambda / (1 + lambda) = rho. This gives a = rho E<e, u - v> / E|e|^2. Both means are
over the rows of a bin of (t, t - r). So a shrinks with rho from stage to stage, and its shape over
t and t - r comes from the table. ADCM shrinks it by lambda: from .64 to .01 on ImageNet.

The share a stays in [rho * floor, 1]. It may exceed rho. Where u is exact and data are Gaussian,
the ratio is std(z_t) / std(z_r). It is at least 1 where data are narrower than noise.
With rho as upper bound, a would then be rho everywhere: the linear rule.
Without a lower bound, a could shrink without end. A smaller a makes u - u' noisier and |e| larger,
which makes the next a smaller again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from dmf.method.flow import Rows

Array = jax.Array
Interval = Callable[[Array, Array, Array], Array]  # (rho, r, t) -> a (B,), times (B,)

TINY = 1e-30
LEAST = 1e-12  # of a share that divides
BINS = 8  # of t and of t - r, each over (0, 1)
ADAPTIVE = "adaptive"
MIDDLE = 0x5917  # the purpose of a row's key from which its middle time is drawn


def linear(rho: Array, r: Array, t: Array) -> Array:
    """a = rho: the same share of t - r everywhere (arXiv 2604.08837, Eq. 5). r, t: (B,)."""
    return rho + 0 * (t - r)  # shaped as the times


def dagger(rho: Array, r: Array, t: Array) -> Array:
    """a = rho (1 - t) / ((1 - rho)(1 - r) + rho (1 - t)): the paper's dagger variant.

    It is the closed form of these lines, with t - t' = a (t - r):

        F(t) = t / (1 - t)
        s' = F(t) - rho (F(t) - F(r))
        t' = s' / (1 + s')

    The literal form is inf / inf at t = 1 and loses half its digits near it.
    This form is finite on all of 0 <= r <= t <= 1. Where it is 0 / 0 it gives 0.

    rho in (0, 1]; r, t: (B,). Returns a (B,) in [0, rho].
    """
    return rho * (1 - t) / jnp.maximum((1 - rho) * (1 - r) + rho * (1 - t), TINY)


def floored(rho: Array, r: Array, t: Array, floor: float) -> Array:
    """a = max(dagger, rho * floor). Near t = 1 dagger alone would hardly step back.

    floor in (0, 1]; 1 is linear. r, t: (B,).
    """
    return jnp.maximum(dagger(rho, r, t), rho * floor)


def sigmoid(rho: Array, r: Array, t: Array) -> Array:
    """dagger at rho (1 + 8 sigmoid(-n)), at most 1, with the noise ratio n = t / (1 - t).

    At r = 0 it is ECT's map for fine-tuning (arXiv 2406.14548). r, t: (B,).
    """
    noise = t / jnp.maximum(1 - t, TINY)
    return dagger(jnp.minimum(rho * (1 + 8 * jax.nn.sigmoid(-noise)), 1), r, t)


def fixed(rho: Array, r: Array, t: Array) -> Array:
    """a = rho / (t - r), at most 1: D = rho, as in Euler Mean Flows (arXiv 2602.02571)."""
    return jnp.minimum(rho / jnp.maximum(t - r, TINY), 1)


INTERVALS: dict[str, Interval] = {
    "linear": linear,
    "dagger": dagger,
    "sigmoid": sigmoid,
    "fixed": fixed,
}
RULES = (*INTERVALS, "floor", ADAPTIVE)


def interval_rule(name: str, floor: float, sums: Any = ()) -> Interval:
    """The rule of this name: (rho, r, t) -> a.

    floor: as `floored` and `share` take it. sums: the table of the adaptive rule.
    """
    if name == "floor":
        return lambda rho, r, t: floored(rho, r, t, floor)
    if name == ADAPTIVE:
        return lambda rho, r, t: share(rho, r, t, sums, floor)
    return INTERVALS[name]


def half(rows: Rows) -> Array:
    """1/2 for every row, (B,)."""
    return jnp.full_like(rows.t, 0.5)


def middle_share(rows: Rows) -> Array:
    """A share of t - r for every row, uniform in (0, 1) by its key; 1/2 of rows without keys."""
    if rows.keys is None:
        return half(rows)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, MIDDLE))(rows.keys)
    return jax.vmap(lambda key: jax.random.uniform(key, minval=1e-12))(keys)


def empty() -> Array:
    """The table before the first step: sums of <e, u - v> and of |e|^2 by t and t - r.

    Shape (2, BINS, BINS).
    """
    return jnp.zeros((2, BINS, BINS), jnp.float32)


def share(rho: Array, r: Array, t: Array, sums: Array, floor: float) -> Array:
    """a = rho sum <e, u - v> / sum |e|^2 over the row's bin, in [rho * floor, 1].

    A bin without rows gives rho. sums: the table, as `empty` shapes it. r, t: (B,).
    """
    dot, square = sums
    ratio = jnp.where(square > 0, dot / jnp.where(square > 0, square, 1), 1).reshape(-1)
    return jnp.clip(rho * ratio[_bin(r, t)], rho * floor, 1)


def products(u: Array, u_next: Array, v: Array, a: Array) -> Array:
    """(B, 2): <e, u - v> and |e|^2 of e = u + (u - u') / a - v, without gradient.

    u, u_next, v: (B, ...); a: (B,). u_next is u'.
    """
    u, u_next, v = (
        jax.lax.stop_gradient(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        for x in (u, u_next, v)
    )
    share = jnp.maximum(a, LEAST).reshape(a.shape + (1,) * (u.ndim - a.ndim))
    e, axes = u + (u - u_next) / share - v, tuple(range(1, u.ndim))
    return jnp.stack([jnp.sum(e * (u - v), axes), jnp.sum(e * e, axes)], axis=1)


def tally(r: Array, t: Array, products: Array) -> Array:
    """What a step adds to the table: sums by bin of `Residuals.products` (B, 2), divided by B.

    Only rows with r < t count.
    """
    # A sum over a mask, because the order of a scatter's additions varies on a GPU.
    mine = (_bin(r, t)[:, None] == jnp.arange(BINS**2)) & (r < t)[:, None]
    seen = jnp.mean(jnp.where(mine[:, :, None], products[:, None], 0), axis=0)
    return seen.T.reshape(2, BINS, BINS)


def update(sums: Array, seen: Array, decay: float) -> Array:
    """The table after a step. A bin that the step saw decays and gets its sums; others stay."""
    return jnp.where(seen[1] > 0, decay * sums + seen, sums)


def _bin(r: Array, t: Array) -> Array:
    column, row = (jnp.clip((x * BINS).astype(jnp.int32), 0, BINS - 1) for x in (t - r, t))
    return row * BINS + column
