"""Guidance: the velocity that replaces v where a stage trains classifier-free guidance.

    v_c = u(z, t, t | label),  v_u = u(z, t, t | null class)   own velocities, without gradient
    v_g = omega v + (1 - omega - kappa) v_u + kappa v_c         in place of v = e - x

The form is MeanFlow's (arXiv 2505.13447 and its official code). kappa mixes a class's own velocity
into its target. Where u(z, t, t | label) has converged to v_g, its mean is v_u + s (v - v_u).
The effective scale is s = omega / (1 - kappa). With a larger kappa, a smaller weight omega on the
noisy v gives the same scale.

A guided kind (`objectives.KINDS`) is its unguided kind with v_g in place of v. That holds in the
target, in the direction of the derivative and in the step back.

A network may be told the guidance instead (improved MeanFlow, arXiv 2512.02012). Then each row has
a scale w and an interval of times of its own, which `drawn` draws and the network sees:

    v_g = v + (1 - 1 / w) (v_c - v_u)     v_c told w, v_u told 1; w is 1 outside the interval

So one set of weights samples at every scale and interval.

`contrast` is the guidance of sampling, for flow models. It needs no training of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.fields import BELOW_1, INF, LEAST, limited
from dmf.method.flow import Condition, Net, Rows, RowSplit, expand

Array = jax.Array
EDGE = 1e-6  # by which a time may miss an end of an interval by rounding


@dataclass(frozen=True)
class GuidanceConfig:
    """Guidance of the guided stages. The effective scale is omega / (1 - kappa).

    The defaults guide nothing: v_g = v.

    With `most` above 1 the network is told the guidance: each row draws its own scale. Then omega,
    t_start and t_end are what the samples and scores of the run are told, and kappa is 0.
    """

    omega: float = limited(1.0, LEAST, INF)  # weight of v
    kappa: float = limited(0.0, 0, BELOW_1)  # weight of v_c, below 1; 0 = v_c is not evaluated
    t_start: float = limited(0.0, 0, 1)  # only rows with t_start <= t <= t_end are guided
    t_end: float = limited(1.0, 0, 1)  # the other end, above t_start
    most: float = limited(1.0, 1, INF)  # the largest scale that a network is told; 1 = told none
    power: float = limited(1.0, 0, INF)  # the law of the scale: density s^-power on [1, most]

    @property
    def told(self) -> bool:
        """Whether the network is told a guidance that each row draws."""
        return self.most > 1


def passes(config: GuidanceConfig) -> int:
    """Forward passes that v_g costs every row: one for v_u, one for v_c where it is evaluated."""
    return 2 if config.kappa or config.told else 1


def drawn(key: Array, config: GuidanceConfig, split: RowSplit) -> Array:
    """(B, 3) float32: scale, start and end of each row's guidance.

    The scale has density s^-power on [1, most]. The start is uniform in [0, .5] and the end in
    [.5, 1] for rows with r < t. Rows with r = t have the whole interval.
    """
    u, start, end = jax.random.uniform(key, (3, split.batch))
    b = 1 - config.power
    top = jnp.log(config.most)
    log_scale = u * top if b == 0 else jnp.log1p(u * jnp.expm1(b * top)) / b
    pair = split.is_pair()
    ends = jnp.where(pair, start / 2, 0.0), jnp.where(pair, (1 + end) / 2, 1.0)
    return jnp.stack([jnp.exp(log_scale), *ends], axis=1)


def tells(network: Any) -> bool:
    """Whether a network is told its guidance, in the evaluation itself; network: its config."""
    return bool(getattr(network, "takes_guidance", False))


def condition_of(network: Any, label: Array, by: GuidanceConfig | Contrast) -> Condition:
    """What a network is given of labels (B,) and of guidance while it is sampled.

    network: its config. It tells whether there are classes, and whether the network is told.
    """
    classes = label if network.num_classes else None
    if not tells(network):
        return Condition(classes)
    if isinstance(by, Contrast):
        told = by.scale, by.start, by.end
    else:
        told = by.omega, by.t_start, by.t_end
    rows = jnp.broadcast_to(jnp.array(told, jnp.float32), (label.shape[0], 3))
    return Condition(classes, guidance=rows)


def told_velocity(net: Net, params: object, rows: Rows, null_class: int) -> tuple[Array, Array]:
    """(v_g, v_c) of rows that are told their guidance, both (B, ...), without gradient.

    v_g is v where the label was dropped. v_c is told the scale that counts at this row's t.
    net: the network in evaluation mode, or its velocity head.
    """
    label, told = rows.condition.label, rows.condition.guidance
    if label is None or told is None:
        raise DmfError("rows.condition lacks label or guidance: expected both, to tell a network")
    frozen, now = jax.lax.stop_gradient(params), rows._replace(r=rows.t)
    inside = (told[:, 1] <= rows.t) & (rows.t <= told[:, 2])
    scale, ones = jnp.where(inside, told[:, 0], 1.0).astype(told.dtype), jnp.ones_like(told[:, 0])

    def at(label: Array, scale: Array) -> Array:
        guidance = jnp.stack([scale, jnp.zeros_like(ones), ones], axis=1)
        condition = rows.condition._replace(label=label, guidance=guidance)
        return net(frozen, now._replace(condition=condition))

    v_c, v_u = at(label, scale), at(jnp.full_like(label, null_class), ones)
    v_g = rows.v + expand(1 - 1 / scale, v_c) * (v_c - v_u)
    return jnp.where(expand(label != null_class, v_g), v_g, rows.v), v_c


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
