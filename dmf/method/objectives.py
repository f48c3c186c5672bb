"""Targets: the identity that each kind of stage enforces on the average velocity u(z, r, t).

Every kind gives a residual per row whose gradient flows through the first u only:

    flow, trajectory   e = u - v                                            flow matching; for r = t, or for every r
    discrete           e = u - T,  T = w v + (1 - w) sg u',  w = a / (1 + c a)
                       u' = u(z - D v, r, t - D),  D = a (t - r)            c = 1: arXiv 2604.08837 Eq. 5; c = 0: alpha-Flow
    jvp                e = u - sg(v - (t - r) du/dt)                        the MeanFlow identity, arXiv 2505.13447

The step back and the derivative may go along another velocity than v, `LossConfig.tangent`; the target keeps v. Rows with
r = t always have the target v. With a -> 0 the discrete residual divided by w tends to the jvp residual, so
`residual_scale = "unit"` makes all kinds commensurate, while "raw" (the paper's) shrinks with w.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.fields import INF, LEAST, choice, limited
from dmf.method.flow import Rows, RowSplit, expand

Array = jax.Array
Net = Callable[[object, Rows], Array]  # (params, rows) -> u(z, r, t), (B, ...)
Tangent = Callable[
    [Rows], Array
]  # rows -> the velocity along which they step back or are differentiated, (B, ...)
sg = jax.lax.stop_gradient

# Keeps "unit" finite where a = 0 exactly (t = 1 under dagger): there u = u', so the residual is 0 / 1e-12 = 0.
TINY = 1e-12


@dataclass(frozen=True)
class LossConfig:
    """The loss. Unknown in the paper and taken from the official MeanFlow recipes: p and eps."""

    p: float = limited(0.75, 0, 2)  # * adaptive weight 1 / (|e|^2 + eps)^p; 0 = squared error
    # * in the weight; calibrated to the sum over pixels, not the mean
    eps: float = limited(1e-3, LEAST, INF)
    # c in w = a / (1 + c a): 1 = discrete MeanFlow, 0 = alpha-Flow
    product_rule: float = limited(1.0, 0, 1)
    # raw = the paper's u - T; unit = (u - T) / w with unit derivative in u
    residual_scale: str = choice("raw", ("raw", "unit"))
    # direction of u' and du/dt: data = v | own = u(z, t, t) | ema = u(z, t, t) of the evaluated
    # EMA; the target keeps v
    tangent: str = choice("data", ("data", "own", "ema"))


class Residuals(NamedTuple):
    """Residuals of one batch, rows with r = t and rows with r < t apart (None where the batch has none of a kind).

    change: mean over the r < t rows of |u - u'| / |u| (discrete) or of |(t - r) du/dt| / |u| (jvp), else None.
    products: (n_pairs, 2) of the r < t rows <e, u - v> and |e|^2, e in unit scale (discrete), else None: for `dmf.method.intervals`.
    """

    border: Array | None
    pairs: Array | None
    change: Array | None
    products: Array | None = None


def passes(config: LossConfig) -> int:
    """Forward passes that the velocity of `config.tangent` costs a row with r < t."""
    return 0 if config.tangent == "data" else 1


def along_data(rows: Rows) -> Array:
    """The conditional velocity v of the rows themselves: the paper's direction."""
    return rows.v


def along_own(net: Net, params: object) -> Tangent:
    """The direction u(z, t, t) of given weights: what they hold to be the mean of v at z. No gradient reaches params.

    net: the network in evaluation mode, without dropout. The direction of improved MeanFlow (arXiv 2512.02012), here also for
    the finite difference: the residual loses the part of v's noise that the network's Jacobian passes on.
    """
    return lambda rows: net(sg(params), rows._replace(r=rows.t))


class Rule(NamedTuple):
    """What, besides its kind, makes the target of a stage.

    share: (r, t) -> a, the part of t - r that a row steps back, all (B,): an interval rule at the rho of the step. Only the
    kind "discrete" asks for it. tangent: along which velocity.
    """

    loss: LossConfig
    share: Callable[[Array, Array], Array]
    tangent: Tangent = along_data


def discrete_weight(a: Array, r: Array, t: Array, c: float) -> Array:
    """w = a / (1 + c a), and 1 where r = t, so that such rows have the target v whatever the interval. All (B,)."""
    return jnp.where(r < t, a / (1 + c * a), 1.0)


def discrete_residual(u: Array, u_next: Array, v: Array, w: Array, scale: str) -> Array:
    """e = u - T with T = w v + (1 - w) sg u'; scale "unit": the same divided by w, with unit derivative in u.

    u, u_next, v: (B, ...); w: (B,). Dividing by w without the stop-gradient would bring the factor 1/w back into the
    gradient, which is what "unit" is there to remove.
    """
    wb = expand(w, u)
    raw = u - sg(wb * v + (1 - wb) * u_next)
    if scale == "raw":
        return raw
    if scale == "unit":
        return u + sg(raw / jnp.maximum(wb, TINY) - u)
    raise DmfError(f"config.loss.residual_scale = {scale!r}: expected 'raw' or 'unit'")


def shift_back(rows: Rows, a: Array) -> Rows:
    """The rows moved back along their own straight line: (z - D v, r, t - D), D = a (t - r). a: (B,) in [0, 1].

    Same label and same random keys: the two evaluations of a row share their dropout mask, without which the difference
    u - u' of a fine stage drowns in mask noise.
    """
    D = a * (rows.t - rows.r)
    t_next = jnp.maximum(rows.t - D, rows.r)  # a = 1 may round to just below r
    return rows._replace(z=rows.z - expand(D, rows.z) * rows.v, t=t_next)


def flow_matching(net: Net, params: object, rows: Rows, split: RowSplit, rule: Rule) -> Residuals:
    """e = u(z, r, t) - v on every row (r as drawn: kinds "flow" and "trajectory")."""
    e = net(params, rows) - rows.v
    return _apart(split, e, e, None)


def discrete(net: Net, params: object, rows: Rows, split: RowSplit, rule: Rule) -> Residuals:
    """Finite-difference MeanFlow; the frozen second evaluation runs on the rows with r < t only."""
    u = net(params, rows)
    pairs, u_pairs = split.pairs_of(rows), split.pairs_of(u)
    a = jnp.where(
        pairs.r < pairs.t, rule.share(pairs.r, pairs.t), 0.0
    )  # r = t by rounding: nothing to look back to
    u_next = net(sg(params), shift_back(pairs._replace(v=rule.tangent(pairs)), a))
    w = discrete_weight(a, pairs.r, pairs.t, rule.loss.product_rule)
    e = discrete_residual(u_pairs, u_next, pairs.v, w, rule.loss.residual_scale)
    found = _apart(split, u - rows.v, e, _relative(u_pairs - u_next, u_pairs), pairs_cut=True)
    return found._replace(products=_products(u_pairs, u_next, pairs.v, a))


def jvp(net: Net, params: object, rows: Rows, split: RowSplit, rule: Rule) -> Residuals:
    """MeanFlow with du/dt along (dz, dr, dt) = (v, 0, 1), or another tangent; the JVP runs on the rows with r < t only."""
    pairs, border = split.pairs_of(rows), split.border_of(rows)

    def along(z: Array, r: Array, t: Array) -> Array:
        return net(params, pairs._replace(z=z, r=r, t=t))

    tangents = (rule.tangent(pairs), jnp.zeros_like(pairs.r), jnp.ones_like(pairs.t))
    u, dudt = jax.jvp(along, (pairs.z, pairs.r, pairs.t), tangents)
    drift = expand(pairs.t - pairs.r, dudt) * dudt
    e = u - sg(pairs.v - drift)
    e_border = net(params, border) - border.v if split.n_border else None
    return Residuals(e_border, e, _relative(drift, u))


OBJECTIVES = {"flow": flow_matching, "trajectory": flow_matching, "discrete": discrete, "jvp": jvp}


def weighted_loss(e: Array, p: float, eps: float) -> tuple[Array, Array]:
    """Per-row loss s / sg(s + eps)^p with s = sum of e^2 over pixels (the adaptive loss of MeanFlow, arXiv 2505.13447).

    e: (B, ...). Returns (loss, s), both (B,) float32 (float64 for float64 residuals).
    """
    e = e.astype(jnp.promote_types(e.dtype, jnp.float32))
    s = jnp.sum(jnp.square(e), axis=tuple(range(1, e.ndim)))
    return s * sg(s + eps) ** -p, s


def _apart(
    split: RowSplit, e_border: Array, e_pairs: Array, change: Array | None, pairs_cut: bool = False
) -> Residuals:
    """Both kinds of rows apart; `pairs_cut` says that e_pairs already holds the r < t rows alone."""
    border = split.border_of(e_border) if split.n_border else None
    if not split.n_pairs:
        return Residuals(border, None, change)
    return Residuals(border, e_pairs if pairs_cut else split.pairs_of(e_pairs), change)


def _products(u: Array, u_next: Array, v: Array, a: Array) -> Array:
    """(B, 2): <e, u - v> and |e|^2 of e = u + (u - u') / a - v, without gradient."""
    u, u_next, v = (sg(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for x in (u, u_next, v))
    e, axes = u + (u - u_next) / expand(jnp.maximum(a, TINY), u) - v, tuple(range(1, u.ndim))
    return jnp.stack([jnp.sum(e * (u - v), axes), jnp.sum(e * e, axes)], axis=1)


def _relative(change: Array, u: Array) -> Array:
    axes = tuple(range(1, u.ndim))
    norm = jnp.sqrt(jnp.sum(jnp.square(u), axes))
    return sg(jnp.mean(jnp.sqrt(jnp.sum(jnp.square(change), axes)) / jnp.maximum(norm, TINY)))
