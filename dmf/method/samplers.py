"""Samplers: from noise to data with an average velocity u(z, r, t), or with v(z, t) = u(z, t, t).

    one step     x = e - u(e, 0, 1)                       arXiv 2505.13447, Alg. 2
    few steps    z <- z - (t_i - t_{i+1}) u(z, t_{i+1}, t_i)
    Euler        z <- z - (t_i - t_{i+1}) v(z, t_i)
    Heun         trapezoid of v over the same grid

`u` is a closed function (z, r, t) -> velocity with z (B, ...) and times (B,).
The grids run from 1 (noise) to 0 (data). `SAMPLERS` names each sampler and its cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmf.errors import DmfError

Array = jax.Array
Velocity = Callable[[Array, Array, Array], Array]
Move = Callable[[Array, Array, Array, Array], Array]  # (z, r, t, t - r) -> z at r


def one_step(u: Velocity, e: Array) -> Array:
    """x = e - u(e, 0, 1). e: (B, ...) noise; returns (B, ...)."""
    zeros, ones = jnp.zeros(e.shape[:1], e.dtype), jnp.ones(e.shape[:1], e.dtype)
    return e - u(e, zeros, ones)


def few_step(u: Velocity, e: Array, steps: int | Array) -> Array:
    """n jumps of the flow map over an equal grid. e: (B, ...) noise; returns (B, ...)."""
    return _integrate(_jump(u), e, steps)


def few_step_on_host(u: Velocity, e: Array, steps: int) -> Array:
    """The jumps of `few_step` in a loop on the host.

    A sampler that decides on the host where to go next takes this form.
    u: a compiled program of its own. e: (B, ...) noise; returns (B, ...).
    """
    jump = _jump(u)
    for i in range(_at_least_one(steps)):
        e = jump(e, *_times(i, steps, e))
    return e


def euler(u: Velocity, e: Array, steps: int | Array) -> Array:
    """Explicit Euler on dz/dt = u(z, t, t), first order. e: (B, ...) noise; returns (B, ...)."""
    return _integrate(lambda z, r, t, L: z - L * u(z, t, t), e, steps)


def heun(u: Velocity, e: Array, steps: int | Array) -> Array:
    """Heun's trapezoid on dz/dt = u(z, t, t), second order. e: (B, ...) noise; returns (B, ...)."""

    def step(z: Array, r: Array, t: Array, L: Array) -> Array:
        v = u(z, t, t)
        return z - 0.5 * L * (v + u(z - L * v, r, r))

    return _integrate(step, e, steps)


class Sampler(NamedTuple):
    """A row of `SAMPLERS`.

    draw          (u, noise, steps) -> data
    evaluations   of the network per step
    on_host       draw loops on the host over a compiled u, so no program can hold it
    """

    draw: Callable[..., Array]
    evaluations: int = 1
    on_host: bool = False


SAMPLERS = {
    "few_step": Sampler(few_step),
    "euler": Sampler(euler),
    "heun": Sampler(heun, evaluations=2),
    "few_step_on_host": Sampler(few_step_on_host, on_host=True),
}


def _jump(u: Velocity) -> Move:
    return lambda z, r, t, L: z - L * u(z, r, t)


def _integrate(step: Move, e: Array, steps: int | Array) -> Array:
    """The grid t_i = 1 - i / n, both ends exact.

    n may be traced, so that one program serves every number of steps.
    """
    if isinstance(steps, int):
        _at_least_one(steps)
    return jax.lax.fori_loop(0, steps, lambda i, z: step(z, *_times(i, steps, z)), e)


def _times(i: int | Array, steps: int | Array, z: Array) -> tuple[Array, Array, Array]:
    """(r, t, t - r) of step i, the times (B,)."""
    t, r = (jnp.asarray(1 - j / steps).astype(z.dtype) for j in (i, i + 1))
    return jnp.broadcast_to(r, z.shape[:1]), jnp.broadcast_to(t, z.shape[:1]), t - r


def _at_least_one(steps: int) -> int:
    if steps < 1:
        raise DmfError(f"sampling steps = {steps}: expected at least 1")
    return steps
