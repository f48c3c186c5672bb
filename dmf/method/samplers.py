"""Samplers: from noise to data with an average velocity u(z, r, t), or with the velocity v(z, t) = u(z, t, t).

    one step     x = e - u(e, 0, 1)                                     NFE 1    (arXiv 2505.13447, Alg. 2)
    few steps    z <- z - (t_i - t_{i+1}) u(z, t_{i+1}, t_i)            NFE n
    Euler        z <- z - (t_i - t_{i+1}) v(z, t_i)                     NFE n
    Heun         trapezoid of v over the same grid                     NFE 2n

`u` is a closed function (z, r, t) -> velocity with z (B, ...) and times (B,). The grids run from 1 (noise) to 0 (data).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dmf.errors import DmfError

Array = jax.Array
Velocity = Callable[[Array, Array, Array], Array]


def one_step(u: Velocity, e: Array) -> Array:
    """x = e - u(e, 0, 1). e: (B, ...) noise; returns (B, ...)."""
    zeros, ones = jnp.zeros(e.shape[:1], e.dtype), jnp.ones(e.shape[:1], e.dtype)
    return e - u(e, zeros, ones)


def few_step(u: Velocity, e: Array, steps: int | Array) -> Array:
    """n jumps of the flow map over an equal grid; one step is `one_step`. e: (B, ...) noise; returns (B, ...)."""
    return _integrate(lambda z, r, t, L: z - L * u(z, r, t), e, steps)


def euler(u: Velocity, e: Array, steps: int | Array) -> Array:
    """Explicit Euler on dz/dt = u(z, t, t), first order. e: (B, ...) noise; returns (B, ...)."""
    return _integrate(lambda z, r, t, L: z - L * u(z, t, t), e, steps)


def heun(u: Velocity, e: Array, steps: int | Array) -> Array:
    """Heun's trapezoid on dz/dt = u(z, t, t), second order, NFE = 2 steps. e: (B, ...) noise; returns (B, ...)."""

    def step(z: Array, r: Array, t: Array, L: Array) -> Array:
        v = u(z, t, t)
        return z - 0.5 * L * (v + u(z - L * v, r, r))

    return _integrate(step, e, steps)


SAMPLERS = {"few_step": few_step, "euler": euler, "heun": heun}


def _integrate(
    step: Callable[[Array, Array, Array, Array], Array], e: Array, steps: int | Array
) -> Array:
    """The grid t_i = 1 - i / n, both ends exact; n may be traced, so that one program serves every number of steps."""
    if isinstance(steps, int) and steps < 1:
        raise DmfError(f"sampling steps = {steps}: expected at least 1")
    rows = (e.shape[0],)

    def body(i: Array, z: Array) -> Array:
        t, r = ((1 - j / steps).astype(e.dtype) for j in (i, i + 1))
        return step(z, jnp.broadcast_to(r, rows), jnp.broadcast_to(t, rows), t - r)

    return jax.lax.fori_loop(0, steps, body, e)
