"""The identity in the end time r: how the end point of a jump moves as the jump grows shorter.

    X = z - (t - r) u(z, r, t)                the end point of a row's jump
    dX/dr = u - (t - r) du/dr = v(X, r)       it moves along the flow

With z and t fixed, this is

    u = v(X, r) + (t - r) du/dr

The network's own u(X, r, r) stands for v, because X lies on no known pair of data and noise.
Lagrangian self-distillation (arXiv 2505.18825) and the terminal velocity of
TVM rest on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from dmf.method.flow import Net, Rows, Sides, Whole

Array = jax.Array
sg = jax.lax.stop_gradient


def residual(
    net: Net, first: Whole, params: object, pairs: Rows, length: Array, through: bool
) -> tuple[Array, Array, Array, Sides]:
    """(e, u, (t - r) du/dr, side outputs) of rows with r < t, all (B, ...).

    first: the network with its side outputs. length: t - r, (B, 1, ...).

        through   e = u - (t - r) du/dr - sg u(X, r, r)      a gradient through the derivative
        else      e = u - sg(u(X, r, r) + (t - r) du/dr)

    A row that has r = t after all gets e = u - v.
    """

    def ending(r: Array) -> tuple[Array, Sides]:
        return first(params, pairs._replace(r=r))

    u, dudr, sides = jax.jvp(ending, (pairs.r,), (jnp.ones_like(pairs.r),), has_aux=True)
    drift = length * dudr
    at_end = net(sg(params), pairs._replace(z=sg(pairs.z - length * u), t=pairs.r))
    target = sg(jnp.where(length > 0, at_end, pairs.v))
    return (u - drift - target if through else u - sg(target + drift)), u, drift, sides
