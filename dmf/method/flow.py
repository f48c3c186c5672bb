"""Path and times: how z_t, its velocity and the law of (r, t) come from data and noise.

The linear path of MeanFlow (Geng et al., arXiv 2505.13447) and of the curriculum (Hsu & Wood, arXiv 2604.08837):

    z_t = (1 - t) x + t e,    v = dz_t/dt = e - x,    e ~ N(0, I),    0 <= r <= t <= 1,

with t = 1 noise and t = 0 data. Times are drawn by a `TimeLaw`; which rows have r = t is no coin toss but an exact,
static pattern (`RowSplit`), so that the second evaluation or the JVP runs only on the rows that need it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.fields import INF, LEAST, choice, limited

Array = jax.Array


@dataclass(frozen=True)
class TimeLaw:
    """Law of (r, t): two logit-normal draws, joined by `pairing`, and the exact share of rows that keep r < t.

    pairing "sorted": t = max, r = min of the two draws (MeanFlow). "min": r = min(r, t), t as drawn (later CIFAR recipe);
    a row whose r lands on t is then an r = t row as well, so the effective share of r < t is smaller than the field.
    """

    # * sorted: t and r are the larger and the smaller of two draws | min: t as drawn, r = min(r, t)
    pairing: str = choice("sorted", ("sorted", "min"))
    # * mean of the normal draw whose sigmoid is t, or of the first draw where two are sorted
    t_mean: float = limited(-0.4, -INF, INF)
    t_std: float = limited(1.0, LEAST, INF)  # * its standard deviation
    r_mean: float = limited(-0.4, -INF, INF)  # * the same for r, or for the second draw
    r_std: float = limited(1.0, LEAST, INF)  # * its standard deviation
    # * exact share of rows that keep r < t; the others have r = t
    r_neq_t_fraction: float = limited(0.25, 0, 1)


# The three official laws. ImageNet counts its r = t rows (.75), CIFAR its r < t rows (.75): here always r < t.
TIME_LAWS = {
    "cifar_v0": TimeLaw("sorted", -2.0, 2.0, -2.0, 2.0, 0.75),
    "cifar_v1": TimeLaw("min", -0.6, 1.6, -4.0, 1.6, 0.75),
    "imagenet": TimeLaw("sorted", -0.4, 1.0, -0.4, 1.0, 0.25),
}


class Rows(NamedTuple):
    """A batch of training rows; every leaf has the same leading axis B.

    z: (B, ...) point on the path; r, t: (B,) times; v: (B, ...) conditional velocity; label: what the network takes, or
    None; keys: (B,) one typed random key per row for the network's own noise, or None.
    """

    z: Array
    r: Array
    t: Array
    v: Array
    label: Array | None = None
    keys: Array | None = None


@dataclass(frozen=True)
class RowSplit:
    """Which rows of a batch have r < t: the first `pairs` of every `group` rows, `batch` rows in all.

    The pattern repeats every `group` rows and never crosses a device or microbatch boundary, hence taking either kind of
    row needs no communication, and the same rows are chosen whatever the number of devices.
    """

    batch: int
    group: int
    pairs: int

    @property
    def n_pairs(self) -> int:
        return self.batch // self.group * self.pairs

    @property
    def n_border(self) -> int:
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

    def microbatches(self, tree: Any, count: int) -> Any:
        """(B, ...) -> (count, B / count, ...), whole groups dealt in turn so that each device deals from its own rows."""

        def deal(x: Array) -> Array:
            dealt = x.reshape(-1, count, self.group, *x.shape[1:]).swapaxes(0, 1)
            return dealt.reshape(count, -1, *x.shape[1:])

        return jax.tree.map(deal, tree)

    def micro(self, count: int) -> RowSplit:
        """The split of one of `count` microbatches."""
        return RowSplit(self.batch // count, self.group, self.pairs)


def row_split(batch: int, fraction: float, parts: int = 1) -> RowSplit:
    """The finest repeating pattern with exactly `fraction * batch` rows of r < t.

    parts: devices on the data axis times microbatches; a group must not straddle two of them.
    Raises DmfError where the share is not a whole number of rows, or the pattern does not fit into the parts.
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
            f"config.times.r_neq_t_fraction = {fraction} of batch_size {batch} is {wanted:g} rows, expected a whole number: "
            f"{low / batch:g} or {(low + 1) / batch:g} would do"
        )
    groups = math.gcd(pairs, batch)
    if groups % parts:
        raise DmfError(
            f"config.batch_size = {batch} with {pairs} rows of r < t repeats every {batch // groups} rows; that "
            f"pattern cannot be shared by {parts} devices x microbatches: expected a multiple of {batch // groups * parts}"
        )
    return RowSplit(batch, batch // groups, pairs // groups)


def expand(t: Array, like: Array) -> Array:
    """Times (B,) with ones appended, so that they broadcast against (B, ...)."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def interpolate(x: Array, e: Array, t: Array) -> tuple[Array, Array]:
    """z_t = (1 - t) x + t e and v = e - x. x, e: (B, ...); t: (B,). Returns (z, v), both (B, ...)."""
    tb = expand(t, x)
    return (1 - tb) * x + tb * e, e - x


def draw_times(key: Array, law: TimeLaw, split: RowSplit) -> tuple[Array, Array]:
    """(r, t), each (B,) float32: two logit-normal draws joined by the law's pairing; r = t on the border rows."""
    key_t, key_r = jax.random.split(key)
    t = jax.nn.sigmoid(law.t_mean + law.t_std * jax.random.normal(key_t, (split.batch,)))
    r = jax.nn.sigmoid(law.r_mean + law.r_std * jax.random.normal(key_r, (split.batch,)))
    if law.pairing == "sorted":
        r, t = jnp.minimum(r, t), jnp.maximum(r, t)
    elif law.pairing == "min":
        r = jnp.minimum(r, t)
    else:
        raise DmfError(f"config.times.pairing = {law.pairing!r}: expected 'sorted' or 'min'")
    return jnp.where(split.is_pair(), r, t), t
