"""Guidance: what plays v in a stage that puts classifier-free guidance into the weights of the one-step generator.

    v_c = u(z, t, t | label),  v_u = u(z, t, t | null class)            the network's own velocities, stopped
    v_g = omega v + (1 - omega - kappa) v_u + kappa v_c                 in place of v = e - x

The kappa form of MeanFlow (arXiv 2505.13447 and its official code). Where u(z, t, t | label) has converged to v_g it is
v_u + s (v - v_u) in the mean, with the effective scale s = omega / (1 - kappa): kappa mixes a class's own velocity into
its target, so that one scale can be had with less of the noise of v. A guided stage is the identity of another kind
(`curriculum.GUIDED`) with v_g for v, in the target, in the direction of the derivative and in the step back alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.fields import BELOW_1, INF, LEAST, limited
from dmf.method.flow import Rows, expand

Array = jax.Array
Net = Callable[[object, Rows], Array]  # (params, rows) -> u(z, r, t), (B, ...)


@dataclass(frozen=True)
class GuidanceConfig:
    """Guidance of the guided stages; the defaults are none, v_g = v. Effective scale: omega / (1 - kappa)."""

    omega: float = limited(1.0, LEAST, INF)  # weight of v
    kappa: float = limited(0.0, 0, BELOW_1)  # weight of v_c, below 1; 0 = v_c is not evaluated
    t_start: float = limited(0.0, 0, 1)  # only rows with t_start <= t <= t_end are guided
    t_end: float = limited(1.0, 0, 1)  # the other end, above t_start


def passes(config: GuidanceConfig) -> int:
    """Forward passes that v_g costs every row: v_u, and v_c where kappa is not 0."""
    return 2 if config.kappa else 1


def guided_velocity(
    net: Net, params: object, rows: Rows, null_class: int, config: GuidanceConfig
) -> Array:
    """v_g = omega v + (1 - omega - kappa) v_u + kappa v_c on labelled rows with t_start <= t <= t_end, elsewhere v.

    net: the network in evaluation mode, without dropout; rows.label: (B,) classes, null_class where the label was dropped.
    Returns (B, ...), through which no gradient reaches params. Raises DmfError for rows without labels.
    """
    if rows.label is None:
        raise DmfError(
            "rows.label = None: expected classes, as guidance sets the velocity of a class against that of none"
        )
    frozen, now = jax.lax.stop_gradient(params), rows._replace(r=rows.t)
    v_u = net(frozen, now._replace(label=jnp.full_like(rows.label, null_class)))
    v_g = config.omega * rows.v + (1 - config.omega - config.kappa) * v_u
    if config.kappa:
        v_g += config.kappa * net(frozen, now)
    guided = (config.t_start <= rows.t) & (rows.t <= config.t_end) & (rows.label != null_class)
    return jnp.where(expand(guided, v_g), v_g, rows.v)
