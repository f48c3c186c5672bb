"""Rectification: the law of the generated images is moved towards the law of the data.

    x     = z - t u(z, 0, t)                      a jump of the generator, from a row's z and t
    z'    = (1 - t') x + t' e'                    x noised again, t' uniform in [.02, .98]
    g     = t' (v_real - v_fake) / mean |x - x_real|,   x_real = z' - t' v_real
    loss  = 1/2 mean (x - sg(x - g))^2            so the gradient of x is g

v_real is the generator's own u(z', t', t'), guided where `LossConfig.rectify_guidance` says so.
v_fake is the velocity of a second network. It is trained by flow matching on x, without gradient
into the generator. Both velocities have no gradient here. From FlowConsist (arXiv 2602.06346).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.method.flow import Condition, Net, Rows, expand, interpolate

if TYPE_CHECKING:
    from dmf.method.weights import LossConfig

Array = jax.Array
sg = jax.lax.stop_gradient
TINY = 1e-6
NEAREST, FARTHEST = 0.02, 0.98  # the t' that are drawn
GENERATOR, SECOND = 0x6E12, 0x5EC0  # purposes of a row's key, one per network that is trained


def fits(config: Any) -> bool:
    """True. Raises DmfError where guidance of v_real lacks classes, or the null class."""
    scale = config.loss.rectify_guidance
    if scale != 1 and not (config.num_classes and config.label_dropout):
        raise DmfError(
            f"config.loss.rectify_guidance = {scale}: expected 1, or a network "
            "with classes and config.label_dropout above 0, from which the null class is learnt"
        )
    return True


def jump(net: Net, params: object, rows: Rows) -> Array:
    """x = z - t u(z, 0, t), (B, ...)."""
    return rows.z - expand(rows.t, rows.z) * net(params, rows._replace(r=jnp.zeros_like(rows.r)))


def noised(x: Array, rows: Rows, purpose: int) -> Rows:
    """The rows at (z', t', t') with v = e' - x. Time and noise follow from a row's key."""
    keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, purpose)))(rows.keys)
    draw = lambda key: jax.random.uniform(key, minval=NEAREST, maxval=FARTHEST)  # noqa: E731
    t = jax.vmap(draw)(keys[:, 0])
    e = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys[:, 1])
    z, v = interpolate(x, e, t)
    return rows._replace(z=z, r=t, t=t, v=v, own=None)


def direction(x: Array, rows: Rows, v_real: Array, v_fake: Array) -> Array:
    """g, (B, ...), of images x whose noised rows have these two velocities."""
    t = expand(rows.t, x)
    apart = jnp.mean(jnp.abs(x - (rows.z - t * v_real)), axis=tuple(range(1, x.ndim)))
    return t * (v_real - v_fake) / expand(jnp.maximum(apart, TINY), x)


def toward(x: Array, g: Array) -> Array:
    """1/2 mean (x - sg(x - g))^2 of every row, (B,). Its gradient by x is g / pixels."""
    return 0.5 * jnp.mean(jnp.square(x - sg(x - g)), axis=tuple(range(1, x.ndim)))


def generator_loss(
    net: Net,
    own: Net,
    params: object,
    second: object,
    rows: Rows,
    loss: LossConfig,
    null_class: int,
) -> Array:
    """The rectification of every row, (B,). The gradient reaches params through x alone.

    net: the network as it is trained. own: the same without dropout. second: the second network's
    weights. null_class: for the guidance of v_real.
    """
    scale = loss.rectify_guidance
    x = jump(net, params, rows)
    seen = noised(sg(x), rows, GENERATOR)
    v_real = own(sg(params), seen)
    if scale != 1:
        label = jnp.full_like(jnp.asarray(seen.condition.label), null_class)
        nobody = own(sg(params), seen._replace(condition=seen.condition._replace(label=label)))
        v_real = nobody + scale * (v_real - nobody)
    return toward(x, direction(sg(x), seen, v_real, own(sg(second), seen)))


def second_residual(net: Net, params: object, generator: object, rows: Rows) -> Array:
    """u(z', t', t') - v of the second network, (B, ...), on images of the frozen generator."""
    seen = noised(sg(jump(net, sg(generator), rows)), rows, SECOND)
    return net(params, seen) - seen.v


def untold(rows: Rows) -> Rows:
    """The rows without a guidance that a network might be told."""
    label, augment = rows.condition.label, rows.condition.augment
    return rows._replace(condition=Condition(label, augment))


def weight(loss: LossConfig, progress: float | Array) -> Array:
    """What the rectification counts: it rises from 0 over a share of the curriculum."""
    risen = (jnp.asarray(progress) - loss.rectify_from) / loss.rectify_ramp
    return loss.rectify_weight * jnp.clip(risen, 0, 1)
