"""Guidance: the velocity that replaces v where a stage trains classifier-free guidance.

    v_c = u(z, t, t | label),  v_u = u(z, t, t | null class)   own velocities, without gradient
    v_g = omega v + (1 - omega - kappa) v_u + kappa v_c         in place of v = e - x

The form is MeanFlow's (arXiv 2505.13447 and its official code). kappa mixes a class's own velocity
into its target. Where u(z, t, t | label) has converged to v_g, its mean is v_u + s (v - v_u).
The effective scale is s = omega / (1 - kappa). With a larger kappa, a smaller weight omega on the
noisy v gives the same scale.

A guided kind (`objectives.KINDS`) is its unguided kind with v_g in place of v. That holds in the
target, in the direction of the derivative and in the step back.

`contrast` is the guidance of sampling, for flow models. It needs no training of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.fields import BELOW_1, INF, LEAST, limited
from dmf.method.flow import Net, Rows, RowSplit, expand

Array = jax.Array
EDGE = 1e-6  # by which a time may miss an end of an interval by rounding


@dataclass(frozen=True)
class GuidanceConfig:
    """Guidance of the guided stages. The effective scale is omega / (1 - kappa).

    The defaults guide nothing: v_g = v.
    """

    omega: float = limited(1.0, LEAST, INF)  # weight of v
    kappa: float = limited(0.0, 0, BELOW_1)  # weight of v_c, below 1; 0 = v_c is not evaluated
    t_start: float = limited(0.0, 0, 1)  # only rows with t_start <= t <= t_end are guided
    t_end: float = limited(1.0, 0, 1)  # the other end, above t_start


def passes(config: GuidanceConfig) -> int:
    """Forward passes that v_g costs every row: one for v_u, one for v_c where kappa is not 0."""
    return 2 if config.kappa else 1


def guided_velocity(
    net: Net, params: object, rows: Rows, null_class: int, config: GuidanceConfig
) -> Array:
    """v_g on labelled rows with t_start <= t <= t_end, v elsewhere. Returns (B, ...).

    net: the network in evaluation mode. No gradient reaches params.
    rows.condition.label: (B,) classes, null_class where the label was dropped.
    Raises DmfError for rows without labels.
    """
    label = rows.condition.label
    if label is None:
        raise DmfError(
            "rows.condition.label = None: expected classes, as guidance contrasts a class with none"
        )
    frozen, now = jax.lax.stop_gradient(params), rows._replace(r=rows.t)
    v_u = net(frozen, _of_nobody(now, null_class))
    v_g = config.omega * rows.v + (1 - config.omega - config.kappa) * v_u
    if config.kappa:
        v_g += config.kappa * net(frozen, now)
    return jnp.where(expand(_guided(rows, null_class, config), v_g), v_g, rows.v)


def guided_jointly(
    net: Net, params: object, rows: Rows, null_class: int, config: GuidanceConfig, split: RowSplit
) -> tuple[Array, Array, Array]:
    """(v_g, v_c of r < t rows, what r = t rows still lack), by one pass.

    v_u of all rows and v_c of r < t rows share the pass. On r = t rows v_c is u itself, without
    dropout. So their v_g lacks the last number, (n_border,), times u: see `complete`.
    Arguments as of `guided_velocity`.
    """
    frozen, now = jax.lax.stop_gradient(params), rows._replace(r=rows.t)
    parts = _of_nobody(now, null_class), split.pairs_of(now)
    v = net(frozen, jax.tree.map(lambda *x: jnp.concatenate(x), *parts))
    v_u, v_c = v[: split.batch], v[split.batch :]
    own = split.join(v_c, jnp.zeros_like(split.border_of(v_u)))
    v_g = config.omega * rows.v + (1 - config.omega - config.kappa) * v_u + config.kappa * own
    guided = _guided(rows, null_class, config)
    lack = jnp.where(split.border_of(guided), config.kappa, 0.0)
    return jnp.where(expand(guided, v_g), v_g, rows.v), v_c, lack


def complete(e: Array, v: Array, lack: Array) -> tuple[Array, Array]:
    """(e, v_g) of r = t rows, whose u = e + v, with their own v_c. `guided_jointly` has v, lack."""
    own = jax.lax.stop_gradient(expand(lack, e) * (e + v))
    return e - own, v + own


def _of_nobody(rows: Rows, null_class: int) -> Rows:
    nobody = jnp.full_like(jnp.asarray(rows.condition.label), null_class)
    return rows._replace(condition=rows.condition._replace(label=nobody))


def _guided(rows: Rows, null_class: int, config: GuidanceConfig) -> Array:
    label = rows.condition.label
    return (config.t_start <= rows.t) & (rows.t <= config.t_end) & (label != null_class)


@dataclass(frozen=True)
class Contrast:
    """Classifier-free guidance while a flow model is sampled.

    scale: 1 leaves the conditional velocity as it is.
    start, end: only at times start <= t <= end.
    channels: only the first so many, 0 for all. SiT's code guides the first three.
    """

    scale: float
    start: float = 0.0
    end: float = 1.0
    channels: int = 0


def contrast(v_c: Array, v_u: Array, t: Array, by: Contrast) -> Array:
    """v_u + scale (v_c - v_u) where `by` guides, v_c elsewhere. v: (B, ..., C), t: (B,)."""
    guided = (by.start - EDGE <= t) & (t <= by.end + EDGE)
    kept = jnp.arange(v_c.shape[-1]) < (by.channels or v_c.shape[-1])
    return jnp.where(expand(guided, v_c) & kept, v_u + by.scale * (v_c - v_u), v_c)
