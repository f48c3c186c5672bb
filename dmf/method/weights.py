"""How much a row counts: a weight from its error, its times and the progress of training.

    loss of a row = s * sg(weight(s, r, t, progress, a)),  s = sum of e^2 over pixels

e is the row's residual. sg stops the gradient, so a weight acts as a constant.
Training's progress runs from 0 to 1 over the curriculum. A row looked back by a share a of t - r.

A factor of the times may follow the adaptive weight. Before it, a factor would be lost: with p = 1
and eps = 0 the adaptive weight divides it out again.

`LOG_VARIANCES` has another way: a scale e^lv that a head of the network learns for the times r, t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.fields import BELOW_1, INF, LEAST, choice, limited
from dmf.method.velocity import DATA, TANGENTS, TEACHER

if TYPE_CHECKING:
    from dmf.method.flow import TimeLaw

Array = jax.Array
Weight = Callable[[Array, Array, Array, Array, Array], Array]  # (s, r, t, progress, a) -> (B,)
TINY = 1e-12
Factor = Callable[[Array, Array, Array], Array]  # (r, t, progress) -> (B,)


def adaptive(p: float, eps: float) -> Weight:
    """1 / (s + eps)^p, the adaptive weight of MeanFlow (arXiv 2505.13447). p = 0 gives 1."""
    return lambda s, r, t, progress, a: (s + eps) ** -p


def alpha(p: float, eps: float) -> Weight:
    """a / (s + eps)^p, of alpha-Flow's code for s in raw scale (arXiv 2510.20771).

    s shrinks with a^2. Hence with p = 1 no stage weighs more than another, until s meets eps.
    """
    return lambda s, r, t, progress, a: a * (s + eps) ** -p


def norm(p: float, eps: float) -> Weight:
    """(1 - t)(1 - t') / a / (s + eps)^p with t' = t - a (t - r): ECT's weight (arXiv 2406.14548).

    With p = 1/2, r = 0 and s in raw scale, the loss is |D - D'| / (sigma - sigma'). Here D is the
    data that the network predicts, and sigma = t / (1 - t). The gradient is twice that of the norm.
    """

    def weight(s: Array, r: Array, t: Array, progress: Array, a: Array) -> Array:
        back = (1 - t) * (1 - t + a * (t - r)) / jnp.maximum(a, TINY)
        return jnp.where(r < t, back, 1) * (s + eps) ** -p

    return weight


# Name -> what makes the weight of p and eps.
WEIGHTS: dict[str, Callable[[float, float], Weight]] = {
    "adaptive": adaptive,
    "alpha": alpha,
    "norm": norm,
}


def progressive(rate: float, power: float) -> Factor:
    """1 - s + rate s (1 - (t - r)) with s = 1 - progress^power (arXiv 2511.19065).

    Short intervals count more at first, and all count alike at the end. The mean is 1 throughout,
    where rate = 1 / E[1 - (t - r)].
    """

    def factor(r: Array, t: Array, progress: Array) -> Array:
        s = 1 - progress**power
        return 1 - s + rate * s * (1 - (t - r))

    return factor


def min_snr(scale: float, limit: float) -> Factor:
    """scale min((1 - t)^2, limit t^2): min(SNR, limit) of predicted data, for the error of v.

    SNR = ((1 - t) / t)^2, and the error of data is t times the error of v.
    """
    return lambda r, t, progress: scale * jnp.minimum((1 - t) ** 2, limit * t**2)


def times(weight: Weight, pairs: Factor | None, border: Factor | None) -> Weight:
    """The weight times a factor of its own for rows with r < t, and for rows with r = t."""
    if pairs is None and border is None:
        return weight

    def both(s: Array, r: Array, t: Array, progress: Array, a: Array) -> Array:
        of_pair, of_border = (f(r, t, progress) if f else 1.0 for f in (pairs, border))
        return weight(s, r, t, progress, a) * jnp.where(r < t, of_pair, of_border)

    return both


def paper(m: Array, lv: Array) -> Array:
    """log(1 + m e^-lv) + lv / 2, the paper's. Its minimum over lv is at e^lv = m."""
    return jnp.log1p(m * jnp.exp(-lv)) + lv / 2


def released(m: Array, lv: Array) -> Array:
    """log(m e^-lv + c) + lv with c = .01, the released code's, written as log(m + c e^lv).

    It has no minimum over lv, which falls for ever.
    """
    return jnp.log(m + 0.01 * jnp.exp(lv))


# Forms of the loss of Decoupled MeanFlow (arXiv 2510.24474): (m, lv) -> loss, all (B,). m is the
# mean of e^2 over pixels. "off" leaves the loss to `WEIGHTS`.
OFF = "off"
LOG_VARIANCES: dict[str, Callable[[Array, Array], Array] | None] = {
    OFF: None,
    "paper": paper,
    "released": released,
}


def learned_loss(e: Array, lv: Array, form: str) -> tuple[Array, Array]:
    """Loss by a learned log variance lv (B,), and sum of squares, of every row; see above.

    The gradient reaches e and lv. form: a key of LOG_VARIANCES.
    """
    loss, s = LOG_VARIANCES[form], _squares(e)
    assert loss is not None
    return loss(s / (e.size // e.shape[0]), lv), s


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
    # T of finite differences and of split is cut to +- this number; 0 = not at all
    target_clip: float = limited(0.0, 0, INF)
    # what plays v in the target: data = e - x | teacher = the velocity of config.teacher
    velocity: str = choice("data", (DATA, TEACHER))
    # direction of u' and du/dt: data = e - x | own = u(z, t, t) | ema = the same of the EMA.
    # Further: head = the velocity head | teacher = the velocity of config.teacher
    tangent: str = choice("data", TANGENTS)
    # with another tangent than data: the share of v in that direction; 1 is v alone
    tangent_data: float = limited(0.0, 0, 1)
    target_data: float = limited(1.0, 0, 1)  # the share of v in the target; the rest is u(z, t, t)
    # time step of a central difference; the default is MF-RAE's (arXiv 2511.13019)
    delta: float = limited(5e-3, LEAST, 0.5)
    # of a row: adaptive is 1 / (|e|^2 + eps)^p; alpha and norm are alpha-Flow's and ECT's
    weight: str = choice("adaptive", WEIGHTS)
    # a factor for rows with r < t: none | progressive = short intervals count more at first
    interval_weight: str = choice("none", ("none", "progressive"))
    interval_power: float = limited(1.0, LEAST, INF)  # k of the progressive factor
    # a factor for rows with r = t: none | min_snr = little weight near noise, with mean 1
    border_weight: str = choice("none", ("none", "min_snr"))
    snr_limit: float = limited(5.0, LEAST, INF)  # * gamma of min_snr
    # off | paper, released: a learned log variance of r and t in the place of weight, p and eps;
    # it needs network.logvar
    logvar: str = choice(OFF, LOG_VARIANCES)
    # stages of kind rectify: * how much the rectification counts beside the identity
    rectify_weight: float = limited(1.0, 0, INF)
    # * it counts from this share of the curriculum on
    rectify_from: float = limited(0.0, 0, BELOW_1)
    rectify_ramp: float = limited(0.1, LEAST, 1)  # * and rises to its weight over this share
    # * scale of guidance of the velocity that stands for the data; 1 = none
    rectify_guidance: float = limited(1.0, 1, INF)

    def check(self, law: TimeLaw, head: bool) -> None:
        """Raises DmfError for fields that contradict each other, or the law of the times.

        head: the network has a head for the learned log variance, which belongs to logvar.
        """
        if (self.logvar != OFF) != head:
            wanted = f"config.loss.logvar = {OFF!r}, or config.network.logvar = True with it"
            if head:
                wanted = "paper or released, or config.network.logvar = False"
            raise DmfError(
                f"config.loss.logvar = {self.logvar!r} with config.network.logvar = {head}: "
                f"expected {wanted}"
            )
        for name, default in (("tangent_data", 0), ("target_data", 1)):
            if self.tangent == DATA and getattr(self, name) != default:
                raise DmfError(
                    f"config.loss.{name} = {getattr(self, name)} with config.loss.tangent = "
                    f"'{DATA}': expected {default}, or another tangent, which v is mixed with"
                )
        if self.border_weight != "none" and law.difficulty_clusters:
            raise DmfError(
                f"config.loss.border_weight = {self.border_weight!r} with "
                f"config.times.difficulty_clusters = {law.difficulty_clusters}: expected "
                "'none', or 0 clusters, as each of them shifts the times of rows with r = t"
            )
        weighted = self.border_weight != "none" or law.difficulty_clusters
        if weighted and law.border == "pairs" and not law.t_is_drawn:
            raise DmfError(
                f"config.times.pairing = {law.pairing!r} with config.times.border = 'pairs': "
                "expected 'own' for a weight or a pace of rows with r = t"
            )

    def of_row(self, law: TimeLaw) -> Weight:
        """The weight of a row from its error, its times and the progress of training.

        law: the law of the times, from which factors of the times get their mean.
        """
        pairs = border = None
        if self.interval_weight == "progressive":
            pairs = progressive(1 / (1 - law.mean_interval()), self.interval_power)
        if self.border_weight == "min_snr":
            plain = min_snr(1.0, self.snr_limit)
            mean = law.mean_on_border(lambda t: plain(t, t, jnp.zeros(())))
            border = min_snr(1 / mean, self.snr_limit)
        return times(WEIGHTS[self.weight](self.p, self.eps), pairs, border)


def weighted_loss(
    e: Array,
    r: Array,
    t: Array,
    progress: float | Array,
    weight: Weight,
    share: Array | None = None,
) -> tuple[Array, Array]:
    """Loss and sum of squares of every row.

    e: (B, ...) residuals; r, t: (B,) times; progress: a scalar in [0, 1].
    share: a of the rows, (B,); None where they do not look back, which counts as 1.
    Returns (loss, s), both (B,) float32, or float64 for float64 residuals.
    """
    s = _squares(e)
    a = jnp.ones_like(s) if share is None else share
    return s * jax.lax.stop_gradient(weight(s, r, t, jnp.asarray(progress), a)), s


def _squares(e: Array) -> Array:
    """The sum of e^2 over pixels, (B,)."""
    e = e.astype(jnp.promote_types(e.dtype, jnp.float32))
    return jnp.sum(jnp.square(e), axis=tuple(range(1, e.ndim)))
