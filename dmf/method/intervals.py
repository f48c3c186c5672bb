"""The adaptive interval: how far a row steps back, read from a table that training itself keeps.

With f = z - (t - r) u(z, r, t), where a row says it will be at r, a step back by D moves f by D e to first order, where

    e = u + (u - u') / a - v,   a = D / (t - r)                         the residual in unit scale

The rule of ADCM (arXiv 2510.17266) for two times weighs that move against what is then still wrong with f:

    E|D e|^2 + lambda E|(t - r)(u - v) - D e|^2  is least at  D = (t - r) lambda / (1 + lambda) E<e, u - v> / E|e|^2

(f is off by -(t - r)(u - v) before the move.) A stage sets lambda / (1 + lambda) = rho,
hence a = rho E<e, u - v> / E|e|^2: the stages go on to shrink the interval, as ADCM's own annealing of lambda from .64 to .01
on ImageNet does, and the table shapes it over (t, t - r). Both means are over the rows of a bin, discounted by visits.

The share is kept in [rho floor, 1]. It may exceed rho: where u is exact the ratio is std(z_t) / std(z_r) for Gaussian data, at
least 1 where data are narrower than noise, so that a bound at rho would leave nothing but linear intervals. The lower bound
stops a bin from going idle: a smaller a makes u - u' a noisier difference, a larger |e| and so a still smaller a.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

BINS = 8  # of t and of t - r, each over (0, 1)


def empty() -> Array:
    """The table before the first step, (2, BINS, BINS): sums of <e, u - v> and of |e|^2 by t and t - r."""
    return jnp.zeros((2, BINS, BINS), jnp.float32)


def share(rho: Array, r: Array, t: Array, sums: Array, floor: float) -> Array:
    """a = rho sum <e, u - v> / sum |e|^2 of the row's bin, in [rho floor, 1]; rho in a bin without rows. r, t: (B,)."""
    dot, square = sums
    ratio = jnp.where(square > 0, dot / jnp.where(square > 0, square, 1), 1).reshape(-1)
    return jnp.clip(rho * ratio[_bin(r, t)], rho * floor, 1)


def tally(r: Array, t: Array, products: Array) -> Array:
    """Sums over the rows with r < t of their products (B, 2) by bin, divided by B: what a step adds to the table."""
    # A sum over a mask rather than a scatter, whose order of additions is not fixed on a GPU.
    mine = (_bin(r, t)[:, None] == jnp.arange(BINS**2)) & (r < t)[:, None]
    seen = jnp.mean(jnp.where(mine[:, :, None], products[:, None], 0), axis=0)
    return seen.T.reshape(2, BINS, BINS)


def update(sums: Array, seen: Array, decay: float) -> Array:
    """The table after a step: bins with rows are discounted and added to, others stay as they are."""
    return jnp.where(seen[1] > 0, decay * sums + seen, sums)


def _bin(r: Array, t: Array) -> Array:
    column, row = (jnp.clip((x * BINS).astype(jnp.int32), 0, BINS - 1) for x in (t - r, t))
    return row * BINS + column
