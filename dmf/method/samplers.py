"""Samplers: from noise to data with an average velocity u(z, r, t), or with v(z, t) = u(z, t, t).

    one step     x = e - u(e, 0, 1)                       arXiv 2505.13447, Alg. 2
    few steps    z <- z - (t_i - t_{i+1}) u(z, t_{i+1}, t_i)
    Euler        z <- z - (t_i - t_{i+1}) v(z, t_i)
    Heun         trapezoid of v over the same grid
    restart      jump to data, then back up with fresh noise: z <- (1 - t_i+1) x + t_i+1 e
    gamma        jump below the next time, then up to it with fresh noise; see `gamma`

`u` is a closed function (z, r, t) -> velocity with z (B, ...) and times (B,).
The times t_i run from 1 (noise) to 0 (data), both exact. `TIMES` names the ways to space them, and
`SAMPLERS` each sampler with its cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.method import flow
from dmf.method.flow import expand

Array = jax.Array
Velocity = Callable[[Array, Array, Array], Array]
Move = Callable[[Array, Array, Array, Array], Array]  # (z, r, t, t - r) -> z at r
Times = Callable[[Any, Any], Any]  # (i, number of steps) -> t_i; both may be traced
SHIFT = 3.0  # of the shifted times, as Stable Diffusion 3 samples
SIGMAS, RHO = (80.0, 0.002), 7  # of EDM's times
GAMMA = 0.9  # of the sampler `gamma`, as in the released code


def uniform(i: Any, steps: Any) -> Any:
    """t_i = 1 - i / n."""
    return 1 - i / steps


def shifted(i: Any, steps: Any) -> Any:
    """t' = s t / (1 + (s - 1) t) of the uniform times: more steps near noise, arXiv 2403.03206."""
    return flow.shifted(uniform(i, steps), SHIFT)


def edm(i: Any, steps: Any) -> Any:
    """t = sigma / (1 + sigma) of EDM's noise levels, arXiv 2206.00364, Eq. 5; t_0 is 1.

    x + sigma e = (1 + sigma) z, so the level sigma is the time t of z = (1 - t) x + t e.
    """
    first, last = (sigma ** (1 / RHO) for sigma in SIGMAS)
    sigma = (first + i / jnp.maximum(steps - 1, 1) * (last - first)) ** RHO
    inside = (i > 0) & (i < steps)
    return jnp.where(inside, sigma / (1 + sigma), jnp.where(i > 0, 0.0, 1.0))


TIMES: dict[str, Times] = {"uniform": uniform, "shifted": shifted, "edm": edm}


def one_step(u: Velocity, e: Array) -> Array:
    """x = e - u(e, 0, 1). e: (B, ...) noise; returns (B, ...)."""
    zeros, ones = jnp.zeros(e.shape[:1], e.dtype), jnp.ones(e.shape[:1], e.dtype)
    return e - u(e, zeros, ones)


def few_step(u: Velocity, e: Array, steps: int | Array, times: Times = uniform) -> Array:
    """n jumps of the flow map. e: (B, ...) noise; returns (B, ...)."""
    return _integrate(_jump(u), e, steps, times)


def few_step_on_host(u: Velocity, e: Array, steps: int, times: Times = uniform) -> Array:
    """The jumps of `few_step` in a loop on the host.

    A sampler that decides on the host where to go next takes this form.
    u: a compiled program of its own. e: (B, ...) noise; returns (B, ...).
    """
    jump = _jump(u)
    for i in range(_at_least_one(steps)):
        e = jump(e, *_times(i, steps, e, times))
    return e


def euler(u: Velocity, e: Array, steps: int | Array, times: Times = uniform) -> Array:
    """Explicit Euler on dz/dt = u(z, t, t), first order. e: (B, ...) noise; returns (B, ...)."""
    return _integrate(_straight(u), e, steps, times)


def heun(u: Velocity, e: Array, steps: int | Array, times: Times = uniform) -> Array:
    """Heun's trapezoid on dz/dt = u(z, t, t), second order. e: (B, ...) noise; returns (B, ...)."""
    return _integrate(_trapezoid(u), e, steps, times)


def gamma(
    u: Velocity,
    e: Array,
    steps: int | Array,
    times: Times = uniform,
    *,
    keys: Array,
    share: float = GAMMA,
) -> Array:
    """Jumps that go too far and come back with fresh noise (Decoupled MeanFlow, arXiv 2510.24474).

    From t to the next time s, with g = share, by the jump to a time r < s:

        r = s sqrt(1 - g^2),  a = (1 - s) / (1 - r)
        z <- a (z - (t - r) u(z, r, t)) + sqrt(s^2 - (a r)^2) e'

    The noise of z then has the standard deviation s for every g. The released code adds 1 - a of
    noise, which is too little for 0 < g < 1.
    With g = 0 this is `few_step`, and with g = 1 `restart`.
    e: (B, ...) noise; keys: (B,) typed keys of the fresh noise; returns (B, ...).
    """

    def step(i: Array, z: Array) -> Array:
        s, t, _ = _times(i, steps, z, times)
        r = s * (1 - share**2) ** 0.5
        a = (1 - s) / (1 - r)
        # As a product: a difference of squares would leave the root of its rounding error.
        spread = jnp.sqrt(jnp.maximum((s - a * r) * (s + a * r), 0))
        lower = z - expand(t - r, z) * u(z, r, t)
        return expand(a, z) * lower + expand(spread, z) * _fresh(keys, i, z)

    return _loop(step, e, steps)


def restart(
    u: Velocity, e: Array, steps: int | Array, times: Times = uniform, *, keys: Array
) -> Array:
    """`gamma` of share 1: every jump goes to the data, and fresh noise leads to the next time."""
    return gamma(u, e, steps, times, keys=keys, share=1.0)


class Sampler(NamedTuple):
    """A row of `SAMPLERS`.

    draw          (u, noise, steps, times) -> data; times is uniform where it is left out
    evaluations   of the network per step
    on_host       draw loops on the host over a compiled u, so no program can hold it
    averages      draw uses u(z, r, t), not only u(z, t, t)
    fresh_noise   draw also takes keys, (B,) typed random keys, one per row
    """

    draw: Callable[..., Array]
    evaluations: int = 1
    on_host: bool = False
    averages: bool = True
    fresh_noise: bool = False


SAMPLERS = {
    "few_step": Sampler(few_step),
    "euler": Sampler(euler, averages=False),
    "heun": Sampler(heun, evaluations=2, averages=False),
    "few_step_on_host": Sampler(few_step_on_host, on_host=True),
    "restart": Sampler(restart, fresh_noise=True),
    "gamma": Sampler(gamma, fresh_noise=True),
}


def _jump(u: Velocity) -> Move:
    return lambda z, r, t, L: z - L * u(z, r, t)


def _straight(u: Velocity) -> Move:
    return lambda z, r, t, L: z - L * u(z, t, t)


def _trapezoid(u: Velocity) -> Move:
    def step(z: Array, r: Array, t: Array, L: Array) -> Array:
        v = u(z, t, t)
        return z - 0.5 * L * (v + u(z - L * v, r, r))

    return step


# The solvers of a flow model, by the name of their sampler: u -> one step of it.
MOVES: dict[str, Callable[[Velocity], Move]] = {"euler": _straight, "heun": _trapezoid}


def _integrate(step: Move, e: Array, steps: int | Array, times: Times) -> Array:
    """Moves along t_0 = 1 .. t_n = 0, one step each."""
    return _loop(lambda i, z: step(z, *_times(i, steps, z, times)), e, steps)


def _loop(step: Callable[[Array, Array], Array], e: Array, steps: int | Array) -> Array:
    """Steps 0 .. n - 1 on z. n may be traced, so that one program serves every number of steps."""
    if isinstance(steps, int):
        _at_least_one(steps)
    return jax.lax.fori_loop(0, steps, step, e)


def _fresh(keys: Array, i: Array, z: Array) -> Array:
    """The noise of step i, shaped as z. A row's depends on its key and on i alone."""

    def draw(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, i), z.shape[1:], z.dtype)

    return jax.vmap(draw)(keys)


def _times(
    i: int | Array, steps: int | Array, z: Array, times: Times
) -> tuple[Array, Array, Array]:
    """(r, t, t - r) of step i, the times (B,)."""
    t, r = (jnp.asarray(times(j, steps)).astype(z.dtype) for j in (i, i + 1))
    return jnp.broadcast_to(r, z.shape[:1]), jnp.broadcast_to(t, z.shape[:1]), t - r


def _at_least_one(steps: int) -> int:
    if steps < 1:
        raise DmfError(f"sampling steps = {steps}: expected at least 1")
    return steps
