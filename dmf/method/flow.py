"""Path and times: z_t, its velocity and the law of (r, t), from data and noise.

The linear path of MeanFlow (arXiv 2505.13447) and of the curriculum (arXiv 2604.08837):

    z_t = (1 - t) x + t e,    v = dz_t/dt = e - x,    e ~ N(0, I),    0 <= r <= t <= 1

t = 1 is noise and t = 0 is data. A `TimeLaw` draws the times.
A fixed pattern (`RowSplit`) says which rows may have r < t, the `pairs`. The others, the `border`,
have r = t. A second evaluation, or a JVP, runs on the pairs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmf.errors import DmfError
from dmf.fields import INF, LEAST, MANY, choice, limited

Array = jax.Array
FAR = 17.0  # a logit whose sigmoid is as near to 1 as float32 tells


def _dyadic(r: Array, t: Array) -> tuple[Array, Array]:
    """An interval [low, low + 2^-k] with low a multiple of 2^-k. k is one of 0 .. 6."""
    length = jnp.ldexp(jnp.ones_like(t), -jnp.minimum(jnp.floor(7 * r), 6).astype(jnp.int32))
    low = jnp.minimum(jnp.floor(t / length) * length, 1 - length)
    return low, low + length


# How two draws become (r, t).
PAIRINGS: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "sorted": lambda r, t: (jnp.minimum(r, t), jnp.maximum(r, t)),
    "min": lambda r, t: (jnp.minimum(r, t), t),
    "zero": lambda r, t: (jnp.zeros_like(r), t),
    "above": lambda r, t: (r, r + (1 - r) * t),
    "dyadic": _dyadic,
}

# The law of one draw: (key, mean, std, count) -> (count,) times.
BASES: dict[str, Callable[[Array, float, float, int], Array]] = {
    "logit_normal": lambda key, mean, std, count: jax.nn.sigmoid(
        mean + std * jax.random.normal(key, (count,))
    ),
    "uniform": lambda key, mean, std, count: jax.random.uniform(key, (count,)),
}
BORDERS = ("pairs", "own")


@dataclass(frozen=True)
class TimeLaw:
    """Law of (r, t): two draws of a base law, a rule that joins them, and the share of r < t.

        pairing "sorted": t = max, r = min of the two draws (MeanFlow).
        pairing "min": t as drawn, r = min(r, t), a later CIFAR recipe. Where r lands on t, the row
            has r = t, so fewer rows keep r < t than the field says.
        pairing "zero": t as drawn, r = 0, for a map that only jumps to the data.
        pairing "above": r as drawn, t a drawn share of the way from r to 1.
        pairing "dyadic": t - r = 2^-k for k = 0 .. 6, and r is a multiple of it (shortcut models).

    The other rows have r = t. A comment that begins with * marks a value that we do not know from
    the paper, here and in the other sections of the config.
    """

    # * sorted: r and t are two draws in order | min: t as drawn, r = min(r, t) | zero: r = 0.
    # Also above: t is above r | dyadic: t - r = 2^-k, and both are multiples of it
    pairing: str = choice("sorted", PAIRINGS)
    # * mean of the normal draw whose sigmoid is t, or of the first draw where two are sorted
    t_mean: float = limited(-0.4, -INF, INF)
    t_std: float = limited(1.0, LEAST, INF)  # * its standard deviation
    r_mean: float = limited(-0.4, -INF, INF)  # * the same for r, or for the second draw
    r_std: float = limited(1.0, LEAST, INF)  # * its standard deviation
    # * exact share of rows that keep r < t; the others have r = t
    r_neq_t_fraction: float = limited(0.25, 0, 1)
    # logit_normal = by the means and deviations above | uniform, which reads none of them
    base: str = choice("logit_normal", BASES)
    # the t of rows with r = t: drawn as the t of the others | own: of a draw of their own
    border: str = choice("pairs", BORDERS)
    border_mean: float = limited(0.0, -INF, INF)  # * own: mean of the draw whose sigmoid is t
    border_std: float = limited(1.0, LEAST, INF)  # * own: its standard deviation
    # both times move to noise, t' = s t / (1 + (s - 1) t), as in latents of many values; 1 = not
    shift: float = limited(1.0, LEAST, INF)
    # * rows with r = t start with the noisiest of so many ranges of t, and get one more at a time
    # (`paced`); 0 = all ranges from the start
    difficulty_clusters: int = limited(0, 0, MANY)
    # * all ranges are in use after this share of the curriculum
    difficulty_share: float = limited(0.25, LEAST, 1)

    @property
    def t_is_drawn(self) -> bool:
        """Whether t is one of the two draws, before any border of its own."""
        return self.pairing in ("sorted", "min", "zero")

    def mean_interval(self) -> float:
        """E[t - r] over the rows with r < t."""
        return _mean_interval(self)

    def mean_on_border(self, f: Callable[[Array], Array]) -> float:
        """E[f(t)] over the rows with r = t. f: times -> values of the same shape."""
        return _mean_on_border(self, f)


# The three laws of the official MeanFlow code, in the order of the fields above. The last number is
# our share of r < t rows. The ImageNet code states the share of r = t rows instead, .75.
TIME_LAWS = {
    "cifar_v0": TimeLaw("sorted", -2.0, 2.0, -2.0, 2.0, 0.75),
    "cifar_v1": TimeLaw("min", -0.6, 1.6, -4.0, 1.6, 0.75),
    "imagenet": TimeLaw("sorted", -0.4, 1.0, -0.4, 1.0, 0.25),
}


class Condition(NamedTuple):
    """The network's inputs besides z, r and t, each with leading axis B, None where absent.

    label: (B,) int32 classes. augment: (B, augment_dim) float32, the augmentation that was used.
    guidance: (B, 3) float32, scale, start and end of guidance; `method/guidance.py` says its use.
    """

    label: Array | None = None
    augment: Array | None = None
    guidance: Array | None = None


class Rows(NamedTuple):
    """A batch of training rows; every leaf has the same leading axis B.

    z: (B, ...) point on the path. r, t: (B,) times. v: (B, ...) conditional velocity.
    keys: (B,) one typed random key per row for the network's own noise, or None.
    own: (B, ...) the network's own velocity at z and t, where guidance has evaluated it already.
    data: (B, ...) the conditional velocity, where v is a teacher's.
    """

    z: Array
    r: Array
    t: Array
    v: Array
    condition: Condition = Condition()
    keys: Array | None = None
    own: Array | None = None
    data: Array | None = None


Net = Callable[[object, Rows], Array]  # (params, rows) -> u(z, r, t), (B, ...)
Sides = dict[str, Array]  # side outputs of a network by name
Whole = Callable[[object, Rows], tuple[Array, Sides]]  # (params, rows) -> u and side outputs
VELOCITY = "velocity"  # the side output v(z, t) of a network's velocity head, (B, ...)
Tangent = Callable[[Rows], Array]  # rows -> a velocity per row, (B, ...)


@dataclass(frozen=True)
class RowSplit:
    """Which of `batch` rows have r < t: the first `pairs` of every `group` rows.

    The other rows, the border, have r = t. A group lies on one device and in one microbatch. Hence
    taking either sort of row needs no communication, and the choice is the same on any devices.
    """

    batch: int
    group: int
    pairs: int

    @property
    def n_pairs(self) -> int:
        """Rows with r < t."""
        return self.batch // self.group * self.pairs

    @property
    def n_border(self) -> int:
        """Rows with r = t."""
        return self.batch - self.n_pairs

    def is_pair(self) -> Array:
        """(B,) bool: True where the row keeps r < t."""
        return jnp.arange(self.batch) % self.group < self.pairs

    def pairs_of(self, tree: Any) -> Any:
        """Rows with r < t of every leaf: (B, ...) -> (n_pairs, ...)."""
        return self._take(tree, slice(0, self.pairs))

    def border_of(self, tree: Any) -> Any:
        """Rows with r = t of every leaf: (B, ...) -> (n_border, ...)."""
        return self._take(tree, slice(self.pairs, self.group))

    def _take(self, tree: Any, part: slice) -> Any:
        def take(x: Array) -> Array:
            rows = x.reshape(-1, self.group, *x.shape[1:])[:, part]
            return rows.reshape(-1, *x.shape[1:])

        return jax.tree.map(take, tree)

    def join(self, pairs: Array, border: Array) -> Array:
        """(n_pairs, ...) and (n_border, ...) -> (B, ...), each row in its place."""
        groups = self.batch // self.group
        both = [x.reshape(groups, -1, *x.shape[1:]) for x in (pairs, border)]
        return jnp.concatenate(both, axis=1).reshape(self.batch, *pairs.shape[1:])

    def microbatches(self, tree: Any, count: int) -> Any:
        """(B, ...) -> (count, B / count, ...), whole groups dealt in turn.

        Each device deals from its own rows.
        """

        def deal(x: Array) -> Array:
            dealt = x.reshape(-1, count, self.group, *x.shape[1:]).swapaxes(0, 1)
            return dealt.reshape(count, -1, *x.shape[1:])

        return jax.tree.map(deal, tree)

    def micro(self, count: int) -> RowSplit:
        """The split of one of `count` microbatches."""
        return RowSplit(self.batch // count, self.group, self.pairs)


def row_split(batch: int, fraction: float, parts: int = 1) -> RowSplit:
    """The finest repeating pattern with exactly `fraction * batch` rows of r < t.

    parts: devices times microbatches. A group stands whole in one of them.
    Raises DmfError where the share is no whole number of rows, or groups do not fit the parts.
    """
    if not 0.0 <= fraction <= 1.0:
        raise DmfError(
            f"config.times.r_neq_t_fraction = {fraction}: expected a share between 0 and 1"
        )
    wanted = fraction * batch
    pairs = round(wanted)
    if abs(wanted - pairs) > 1e-6 * batch:
        low = math.floor(wanted)
        raise DmfError(
            f"config.times.r_neq_t_fraction = {fraction} of batch_size {batch} is {wanted:g} rows, "
            f"expected a whole number: {low / batch:g} or {(low + 1) / batch:g} would do"
        )
    groups = math.gcd(pairs, batch)
    if groups % parts:
        raise DmfError(
            f"config.batch_size = {batch} with {pairs} rows of r < t repeats every "
            f"{batch // groups} rows; that pattern cannot be shared by {parts} devices x "
            f"microbatches: expected a multiple of {batch // groups * parts}"
        )
    return RowSplit(batch, batch // groups, pairs // groups)


def expand(t: Array, like: Array) -> Array:
    """Times (B,) with ones appended, so that they broadcast against (B, ...)."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


class Path(NamedTuple):
    """A path from data to noise: (x, e, t) -> z_t and (x, e, t) -> dz_t/dt, both (B, ...)."""

    sample: Callable[[Array, Array, Array], Array]
    velocity: Callable[[Array, Array, Array], Array]


PATHS = {"linear": Path(lambda x, e, t: (1 - t) * x + t * e, lambda x, e, t: e - x)}


def interpolate(x: Array, e: Array, t: Array, path: str = "linear") -> tuple[Array, Array]:
    """(z_t, v) on a path of `PATHS`. x, e: (B, ...); t: (B,). Returns two of (B, ...)."""
    tb = expand(t, x)
    return PATHS[path].sample(x, e, tb), PATHS[path].velocity(x, e, tb)


def draw_times(
    key: Array, law: TimeLaw, split: RowSplit, progress: float | np.float32 | Array = 1.0
) -> tuple[Array, Array]:
    """(r, t), each (B,) float32: two draws of the base law, joined as the law says.

    Border rows have r = t, by a draw of their own where the law says so. progress: of the
    curriculum, in [0, 1]; `paced` says what it changes.
    Raises DmfError for an unknown pairing.
    """
    key_t, key_r = jax.random.split(key)
    draw = BASES[law.base]
    t = draw(key_t, law.t_mean, law.t_std, split.batch)
    r = draw(key_r, law.r_mean, law.r_std, split.batch)
    if law.pairing not in PAIRINGS:
        raise DmfError(
            f"config.times.pairing = {law.pairing!r}: expected one of {', '.join(PAIRINGS)}"
        )
    r, t = PAIRINGS[law.pairing](r, t)
    if law.border == "own":
        own = draw(key_t, law.border_mean, law.border_std, split.batch)
        t = jnp.where(split.is_pair(), t, own)
    if law.difficulty_clusters and split.pairs:  # flow matching alone, as pretraining, has all t
        t = jnp.where(split.is_pair(), t, paced(t, law, progress))
    if law.shift != 1:
        r, t = shifted(r, law.shift), shifted(t, law.shift)
    return jnp.where(split.is_pair(), r, t), t


def shifted(t: Any, shift: float) -> Any:
    """Times nearer to noise: s t / (1 + (s - 1) t), with s above 1 (arXiv 2403.03206).

    A latent of many values needs more noise to lose its content. For flows in the features of an
    autoencoder s = sqrt(values / 4096), arXiv 2510.11690: 6.93 for 16 x 16 x 768.
    """
    return shift * t / (1 + (shift - 1) * t)


def paced(t: Array, law: TimeLaw, progress: float | np.float32 | Array) -> Array:
    """Times of rows with r = t, moved into the range of t that is in use: t >= 1 - n / N.

    With N clusters, n rises from 1 to N over `difficulty_share` of the curriculum. So training
    begins with the noisiest times. Each t moves to the time of the restricted law that as large a
    share of draws exceeds. At n = N every time stays. t: (B,) draws of the law; returns (B,).

    This is the curriculum of arXiv 2403.10348, which arXiv 2511.19065 uses as DTD.
    """
    clusters = law.difficulty_clusters
    passed = jnp.floor(progress * clusters / law.difficulty_share + 1e-4)  # against rounding
    n = jnp.clip(1 + passed, 1, clusters)
    low = 1 - n / clusters
    least = jnp.maximum(_logit(low), -FAR)
    wanted = _log_exceeding(_logit(t), law) + _log_exceeding(_logit(low), law)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        beyond = _log_exceeding(middle, law) < wanted
        return jnp.where(beyond, ends[0], middle), jnp.where(beyond, middle, ends[1])

    ends = jnp.full_like(t, least), jnp.full_like(t, FAR)
    moved = jax.nn.sigmoid(jax.lax.fori_loop(0, 40, halve, ends)[1])
    return jnp.where(n == clusters, t, jnp.maximum(moved, low))


def _logit(t: Array) -> Array:
    return jnp.log(t) - jnp.log1p(-t)


def _log_exceeding(logit: Array, law: TimeLaw) -> Array:
    """log P(t' > t) for a border row's t', from the logit of t. It keeps its digits near t = 1."""
    first, *other = (_log_above(logit, law.base, *draw) for draw in _draws_on_border(law))
    if not other:
        return first
    return jnp.logaddexp(first, other[0] + jnp.log1p(-jnp.exp(first)))  # the larger of two draws


def _log_above(logit: Array, base: str, mean: float, std: float) -> Array:
    if base == "uniform":
        return jax.nn.log_sigmoid(-logit)
    return jax.scipy.special.log_ndtr((mean - logit) / std)


def _draws_on_border(law: TimeLaw) -> tuple[tuple[float, float], ...]:
    """Mean and deviation of the draws, the larger of which is t of a row with r = t."""
    if law.border == "own":
        return ((law.border_mean, law.border_std),)
    both = (law.t_mean, law.t_std), (law.r_mean, law.r_std)
    return both if law.pairing == "sorted" else both[:1]


@cache
def _mean_interval(law: TimeLaw) -> float:
    """E[t - r] over the rows with r < t, by quadrature."""
    draws = (law.t_mean, law.t_std), (law.r_mean, law.r_std)
    if not law.t_is_drawn:
        (t, of_t), (r, of_r) = (_quadrature(replace(law, shift=1.0), *draw) for draw in draws)
        with jax.ensure_compile_time_eval():  # a number, also while a step is traced
            ends = PAIRINGS[law.pairing](*np.meshgrid(r, t))
            low, high = (shifted(np.asarray(x, np.float64), law.shift) for x in ends)
        return float(of_t @ (high - low) @ of_r)
    (t, of_t), (r, of_r) = (_quadrature(law, *draw) for draw in draws)
    if law.pairing == "zero":
        return float(of_t @ t)
    apart = of_t @ (np.maximum(t[:, None] - r, 0) @ of_r)
    if law.pairing == "sorted":
        return float(2 * apart - of_t @ t + of_r @ r)  # |x| = 2 max(x, 0) - x
    far = (law.t_mean - law.r_mean) / math.hypot(law.t_std, law.r_std)
    kept = 0.5 if law.base == "uniform" else 0.5 * math.erfc(-far / math.sqrt(2))
    return float(apart / kept)  # of those with r < t alone


def _mean_on_border(law: TimeLaw, f: Callable[[Array], Array]) -> float:
    """E[f(t)] over the rows with r = t, by quadrature. f: times -> values of the same shape."""
    grids = [_quadrature(law, *draw) for draw in _draws_on_border(law)]
    times, weight = grids[0]
    if len(grids) == 2:  # the larger of two draws
        times = np.maximum(times[:, None], grids[1][0]).ravel()
        weight = np.outer(weight, grids[1][1]).ravel()
    with jax.ensure_compile_time_eval():  # a number, also while a step is traced
        return float(weight @ np.asarray(f(jnp.asarray(times)), np.float64))


def _quadrature(law: TimeLaw, mean: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    """Times and their weights, which add up to 1, for one draw of a law's base, shifted."""
    if law.base == "uniform":
        times, weight = (np.arange(800) + 0.5) / 800, np.full(800, 1 / 800)
    else:
        x = np.linspace(-8, 8, 801)
        weight = np.exp(-(x**2) / 2)
        times, weight = 1 / (1 + np.exp(-(mean + std * x))), weight / weight.sum()
    return shifted(times, law.shift), weight
