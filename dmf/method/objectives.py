"""Targets: the identity that each kind of stage enforces on the average velocity u(z, r, t).

Every kind gives a residual e per row, u minus a target. sg stops the gradient: it flows through
the first u only. Here a is the share of t - r that a row steps back (`dmf.method.intervals`):

    flow, all_pairs  e = u - v, flow matching; flow has r = t on every row
    teacher_path     the same, v from a teacher's path (`dmf.method.teacher`)
    discrete         e = u - T,  T = w v + (1 - w) sg u',  w = a / (1 + c a)
                     u' = u(z - D v, r, t - D),  D = a (t - r)
                     c = 1: arXiv 2604.08837 Eq. 5; c = 0: alpha-Flow
    jvp              e = u - sg(v - (t - r) du/dt), the MeanFlow identity, arXiv 2505.13447
    central          e = u - sg(v - (t - r) (u+ - u-) / (2 delta))
                     u+- = u(z +- delta v, r, t +- delta); du/dt from two evaluations, no JVP
    split            e = u - T,  T = a sg u2 + (1 - a) sg u1,  a drawn for each row
                     u2 = u(z, s, t), u1 = u(z - (t - s) u2, r, s), s = t - a (t - r)
                     the additivity of average velocities, arXiv 2507.16884
    midpoint         the same with a = 1/2, as in shortcut models, arXiv 2410.12557
    terminal         e = u - sg(u(X, r, r) + (t - r) du/dr),  X = z - (t - r) u
    lagrangian       the same with a gradient through du/dr (`dmf.method.endpoint`)

Rows with r = t always have the target v. `LossConfig.tangent` may name another direction than v.
The step back and the derivative follow that direction, and the target keeps v.
As a -> 0, the discrete residual divided by w tends to the jvp residual. The scale "unit" divides
by w, so that residuals of all kinds have one scale. The paper's scale "raw" shrinks with w.
`KINDS` has one row per kind. No other file compares the name of a kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.method import endpoint, intervals
from dmf.method.flow import VELOCITY, Net, Rows, RowSplit, Sides, Tangent, Whole, expand
from dmf.method.velocity import mixed
from dmf.method.weights import LossConfig

Array = jax.Array
sg = jax.lax.stop_gradient

# Keeps "unit" finite where a = 0 exactly (t = 1 under dagger). There u = u', and e = 0 / TINY = 0.
TINY = 1e-12


class Residuals(NamedTuple):
    """Residuals of one batch, rows with r = t and rows with r < t apart.

        border     of r = t rows, None where the batch has no such row
        pairs      of r < t rows, None where the batch has no such row
        change     mean change of u along the step back, relative to |u|, of r < t rows
        products   (n_pairs, 2): <e, u - v> and |e|^2 of r < t rows, with e in unit scale
        share      (n_pairs,) the a of r < t rows, None of kinds whose rows have none

        head_border, head_pairs   of the velocity head, v_head - v, None without such a head

    The change is |u - u'| where the kind steps back, and |(t - r) du/dt| of other kinds. Flow
    matching has None. Only kinds that step back have products, for `dmf.method.intervals`.
    """

    border: Array | None
    pairs: Array | None
    change: Array | None
    products: Array | None = None
    share: Array | None = None
    head_border: Array | None = None
    head_pairs: Array | None = None

    def beside(self, e: Array | None, split: RowSplit) -> Residuals:
        """With the residuals e of the velocity head, of all rows; None without such a head."""
        if e is None:
            return self
        border = split.border_of(e) if split.n_border else None
        return self._replace(
            head_border=border, head_pairs=split.pairs_of(e) if split.n_pairs else None
        )


class Rule(NamedTuple):
    """What the target of a stage depends on, besides its kind.

        loss      the loss section of the config
        share     (r, t) -> a, the part of t - r that a row steps back, all (B,)
        tangent   direction of the step back and of the derivative, None for v
        whole     the network with its side outputs, None for a network without any
        joint     one pass with gradient over all rows, and what r < t rows need without gradient

    The share is an interval rule at the rho of the step. Only kinds that step back ask for it.
    """

    loss: LossConfig
    share: Callable[[Array, Array], Array]
    tangent: Tangent | None = None
    whole: Whole | None = None
    joint: bool = False

    def first(self, net: Net, params: object, rows: Rows) -> tuple[Array, Sides]:
        """u and the side outputs, of the evaluation that the gradient flows through."""
        return (net(params, rows), {}) if self.whole is None else self.whole(params, rows)

    def velocities(self, rows: Rows) -> tuple[Array, Array]:
        """(the velocity along which these rows step back, v in their target), both (B, ...)."""
        if self.tangent is None:
            return rows.v, rows.v
        u, v = self.tangent(rows), rows.v
        if self.loss.target_data != 1:  # rows with r = t keep v
            v = jnp.where(expand(rows.r < rows.t, v), mixed(v, u, self.loss.target_data), v)
        return mixed(rows.v, u, self.loss.tangent_data), v


Residual = Callable[[Net, object, Rows, RowSplit, Rule], Residuals]

# How the rows of a step go through the network; the numbers are equal up to rounding.
SPLIT, SHARED, JOINT, WHOLE = LAYOUTS = ("split", "shared", "joint", "whole")
AUTO = "auto"  # the fastest of these, which a run decides before its first step


def discrete_weight(a: Array, r: Array, t: Array, c: float) -> Array:
    """w = a / (1 + c a), and 1 where r = t. All (B,).

    With w = 1 a row has the target v, whatever its interval.
    """
    return jnp.where(r < t, a / (1 + c * a), 1.0)


def discrete_residual(
    u: Array, u_next: Array, v: Array, w: Array, scale: str, clip: float = 0.0
) -> Array:
    """e = u - T with T = w v + (1 - w) sg u', or that divided by w.

    u, u_next, v: (B, ...); w: (B,). u_next is u'. scale: "raw", or "unit", which divides by w.
    "unit" has de/du = 1: a stop-gradient keeps the factor 1 / w out of the gradient.
    clip: T is cut to +-clip where w < 1; 0 cuts nothing.
    Raises DmfError for another scale.
    """
    wb = expand(w, u)
    target = wb * v + (1 - wb) * u_next
    if clip:
        target = jnp.where(wb < 1, jnp.clip(target, -clip, clip), target)
    raw = u - sg(target)
    if scale == "raw":
        return raw
    if scale == "unit":
        return u + sg(raw / jnp.maximum(wb, TINY) - u)
    raise DmfError(f"config.loss.residual_scale = {scale!r}: expected 'raw' or 'unit'")


def shift_back(rows: Rows, a: Array) -> Rows:
    """The rows moved back along rows.v: (z - D v, r, t - D), D = a (t - r).

    a: (B,) in [0, 1]. Condition and random keys stay, so both evaluations share a dropout mask.
    Two masks would make more noise than the small difference u - u' of a fine stage.
    """
    D = a * (rows.t - rows.r)
    t_next = jnp.maximum(rows.t - D, rows.r)  # a = 1 may round to just below r
    return rows._replace(z=rows.z - expand(D, rows.z) * rows.v, t=t_next)


def flow_matching(net: Net, params: object, rows: Rows, split: RowSplit, rule: Rule) -> Residuals:
    """e = u(z, r, t) - v on every row, r as drawn."""
    u, sides = rule.first(net, params, rows)
    e = u - rows.v
    return _apart(split, e, e, None).beside(_of_head(sides, rows), split)


def discrete(net: Net, params: object, rows: Rows, split: RowSplit, rule: Rule) -> Residuals:
    """Finite-difference MeanFlow. The second evaluation u', with sg, runs on r < t rows only."""
    u, sides = rule.first(net, params, rows)
    pairs, u_pairs = split.pairs_of(rows), split.pairs_of(u)
    # A pair may have r = t after all, by rounding or by its law of times. It does not step back.
    a = jnp.where(pairs.r < pairs.t, rule.share(pairs.r, pairs.t), 0.0)
    along, v = rule.velocities(pairs)
    u_next = net(sg(params), shift_back(pairs._replace(v=along), a))
    w = discrete_weight(a, pairs.r, pairs.t, rule.loss.product_rule)
    e = discrete_residual(u_pairs, u_next, v, w, rule.loss.residual_scale, rule.loss.target_clip)
    found = _apart(split, u - rows.v, e, _relative(u_pairs - u_next, u_pairs), pairs_cut=True)
    found = found._replace(products=intervals.products(u_pairs, u_next, v, a), share=a)
    return found.beside(_of_head(sides, rows), split)


def additive(
    net: Net,
    params: object,
    rows: Rows,
    split: RowSplit,
    rule: Rule,
    share: Callable[[Rows], Array] = intervals.middle_share,
) -> Residuals:
    """SplitMeanFlow: u over [r, t] is the mean of u over [r, s] and over [s, t], with sg.

    s = t - a (t - r), where share gives a of every row. The row jumps to s by u(z, s, t). Both
    other evaluations run on r < t rows only.
    """
    u, sides = rule.first(net, params, rows)
    pairs, u_pairs = split.pairs_of(rows), split.pairs_of(u)
    a = jnp.where(pairs.r < pairs.t, share(pairs), 0.0)
    middle = jnp.clip(pairs.t - a * (pairs.t - pairs.r), pairs.r, pairs.t)
    late = net(sg(params), pairs._replace(r=middle))
    early = net(sg(params), shift_back(pairs._replace(v=late), a))
    w = discrete_weight(a, pairs.r, pairs.t, 0.0)
    v = jnp.where(expand(pairs.r < pairs.t, late), late, pairs.v)
    e = discrete_residual(u_pairs, early, v, w, rule.loss.residual_scale, rule.loss.target_clip)
    found = _apart(split, u - rows.v, e, _relative(u_pairs - early, u_pairs), pairs_cut=True)
    return found._replace(share=a).beside(_of_head(sides, rows), split)


def jvp(net: Net, params: object, rows: Rows, split: RowSplit, rule: Rule) -> Residuals:
    """MeanFlow with du/dt along (dz, dr, dt) = (v, 0, 1), or along another tangent.

    The JVP runs on r < t rows only. `rule.joint` evaluates u of these rows once more, with the
    others and with gradient. The JVP then needs none.
    """
    pairs, border = split.pairs_of(rows), split.border_of(rows)
    weights = sg(params) if rule.joint else params

    def along(z: Array, r: Array, t: Array) -> tuple[Array, Sides]:
        return rule.first(net, weights, pairs._replace(z=z, r=r, t=t))

    direction, v = rule.velocities(pairs)
    tangents = (direction, jnp.zeros_like(pairs.r), jnp.ones_like(pairs.t))
    u, dudt, sides = jax.jvp(along, (pairs.z, pairs.r, pairs.t), tangents, has_aux=True)
    drift = expand(pairs.t - pairs.r, dudt) * dudt
    if rule.joint:
        u_all, sides = rule.first(net, params, rows)
        e, change = split.pairs_of(u_all) - sg(v - drift), _relative(drift, u)
        found = _apart(split, u_all - rows.v, e, change, pairs_cut=True)
        return found.beside(_of_head(sides, rows), split)
    e = u - sg(v - drift)
    found = Residuals(None, e, _relative(drift, u), head_pairs=_of_head(sides, pairs))
    return _with_border(found, net, params, border, split, rule)


def central(net: Net, params: object, rows: Rows, split: RowSplit, rule: Rule) -> Residuals:
    """MeanFlow with du/dt by a central difference along (v, 0, 1), or along another tangent.

    Its error is O(delta^2). u+ and u-, with sg, are evaluated on r < t rows only. A row whose
    t +- delta would leave [r, 1] takes a smaller delta. At t = 1 delta is 0, and the target is v.
    """
    (u, sides), pairs = rule.first(net, params, rows), split.pairs_of(rows)
    (along, v), u_pairs = rule.velocities(pairs), split.pairs_of(u)
    delta = jnp.minimum(rule.loss.delta, jnp.minimum(pairs.t - pairs.r, 1 - pairs.t))

    def at(step: Array) -> Array:
        t = jnp.clip(pairs.t + step, pairs.r, 1)  # the sum may round to just beyond an end
        return net(sg(params), pairs._replace(z=pairs.z + expand(step, v) * along, t=t))

    rate = (pairs.t - pairs.r) / jnp.maximum(2 * delta, TINY)
    drift = expand(rate, v) * (at(delta) - at(-delta))
    e = u_pairs - sg(v - drift)
    found = _apart(split, u - rows.v, e, _relative(drift, u_pairs), pairs_cut=True)
    return found.beside(_of_head(sides, rows), split)


def _of_head(sides: Sides, rows: Rows) -> Array | None:
    """v_head - v of these rows, (B, ...); None of a network without a velocity head."""
    return sides[VELOCITY] - rows.v if VELOCITY in sides else None


def at_end(
    net: Net, params: object, rows: Rows, split: RowSplit, rule: Rule, *, through: bool
) -> Residuals:
    """The identity in the end time r. through: with a gradient through its derivative."""
    pairs, first = split.pairs_of(rows), partial(rule.first, net)
    length = expand(pairs.t - pairs.r, pairs.z)
    e, u, drift, sides = endpoint.residual(net, first, params, pairs, length, through)
    found = Residuals(None, e, _relative(drift, u), head_pairs=_of_head(sides, pairs))
    return _with_border(found, net, params, split.border_of(rows), split, rule)


def _with_border(
    found: Residuals, net: Net, params: object, border: Rows, split: RowSplit, rule: Rule
) -> Residuals:
    """With the residuals of r = t rows, evaluated by themselves."""
    if not split.n_border:
        return found
    u, sides = rule.first(net, params, border)
    return found._replace(border=u - border.v, head_border=_of_head(sides, border))


def _apart(
    split: RowSplit, e_border: Array, e_pairs: Array, change: Array | None, pairs_cut: bool = False
) -> Residuals:
    """Residuals of r = t and of r < t rows, each taken from the residuals of all rows.

    pairs_cut: e_pairs holds r < t rows alone already.
    """
    border = split.border_of(e_border) if split.n_border else None
    if not split.n_pairs:
        return Residuals(border, None, change)
    return Residuals(border, e_pairs if pairs_cut else split.pairs_of(e_pairs), change)


def on_all_rows(residual: Residual) -> Residual:
    """A kind's residual with all rows evaluated as rows of r < t are; the same up to rounding.

    A row with r = t neither steps back nor drifts, so that its target is v anyway.
    """

    def whole(net: Net, params: object, rows: Rows, split: RowSplit, rule: Rule) -> Residuals:
        found = residual(net, params, rows, RowSplit(split.batch, split.group, split.group), rule)
        e, change = found.pairs, found.change
        if change is not None:  # a mean over all rows, of which the border changes by 0
            change = change * (split.batch / split.n_pairs)
        cut = split.pairs_of({"products": found.products, "share": found.share})
        e_head = found.head_pairs
        found = _apart(split, jnp.asarray(e), jnp.asarray(e), change)._replace(**cut)
        return found.beside(e_head, split)

    return whole


def _relative(change: Array, u: Array) -> Array:
    axes = tuple(range(1, u.ndim))
    norm = jnp.sqrt(jnp.sum(jnp.square(u), axes))
    return sg(jnp.mean(jnp.sqrt(jnp.sum(jnp.square(change), axes)) / jnp.maximum(norm, TINY)))


class Kind(NamedTuple):
    """The facts about one kind of stage.

        residual     (net, params, rows, split, rule) -> Residuals
        arithmetic   "plain", "difference" or "derivative"
        extra        forward passes of an r < t row beyond `passes`
        steps_back   the kind looks back over an interval that shrinks with rho
        v_only       every row has r = t and the interval branch is frozen, so u = v stays
        taught       rows are pairs of states of a teacher's path (`dmf.method.teacher`)
        unguided     the same kind without guidance, "" where this kind has no guidance
        limit        the kind whose residual this one tends to as a -> 0, or ""
        passes       forward passes of every row
        second       a second network is trained beside (`dmf.method.rectify`)

    A backward pass counts as two forward passes, and a JVP's tangent as one.
    """

    residual: Residual
    arithmetic: str
    extra: int = 0
    steps_back: bool = False
    v_only: bool = False
    taught: bool = False
    unguided: str = ""
    limit: str = ""
    passes: int = 3
    second: bool = False

    def laid_out(self, layout: str) -> Residual:
        """The residual in a layout of `LAYOUTS`."""
        return on_all_rows(self.residual) if layout == WHOLE and self.extra else self.residual

    @property
    def guided(self) -> bool:
        """Whether `dmf.method.guidance` replaces v in the target."""
        return bool(self.unguided)

    @property
    def repeats(self) -> bool:
        """Whether the joint layout evaluates u of r < t rows a second time."""
        return self.residual is jvp

    @property
    def flow_matching(self) -> bool:
        """Whether the kind fits v directly, without a target from its own weights."""
        return self.residual is flow_matching


KINDS: dict[str, Kind] = {
    "flow": Kind(flow_matching, "plain", v_only=True),
    "all_pairs": Kind(flow_matching, "plain"),
    "teacher_path": Kind(flow_matching, "plain", taught=True),
    "discrete": Kind(discrete, "difference", extra=1, steps_back=True, limit="jvp"),
    "jvp": Kind(jvp, "derivative", extra=1),
    "central": Kind(central, "difference", extra=2),
    "rectify": Kind(jvp, "derivative", extra=10, second=True),
    "terminal": Kind(partial(at_end, through=False), "derivative", extra=2),
    "lagrangian": Kind(partial(at_end, through=True), "derivative", extra=4),  # 2 of its gradient
    "guided_discrete": Kind(
        discrete, "difference", 1, True, unguided="discrete", limit="guided_jvp"
    ),
    "guided_jvp": Kind(jvp, "derivative", extra=1, unguided="jvp"),
    "split": Kind(additive, "difference", extra=2),
    "midpoint": Kind(partial(additive, share=intervals.half), "difference", extra=2),
    "guided_flow": Kind(flow_matching, "plain", v_only=True, unguided="flow"),
    "guided_split": Kind(additive, "difference", extra=2, unguided="split"),
}
GUIDED = tuple(name for name, kind in KINDS.items() if kind.guided)
FORMER = {"trajectory": "all_pairs"}  # names in old configs and work directories -> names now

# The kinds of the paper: of pretraining; of the first stage, of those between, of the last one.
PRETRAINING = "flow"
FIRST, BETWEEN, LAST = "all_pairs", "discrete", "jvp"


def kind_of(name: str) -> Kind:
    """The facts about a kind, also by a former name, as old files have it."""
    return KINDS[FORMER.get(name, name)]
