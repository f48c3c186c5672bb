"""Frechet distance between two sets of features, each given by its mean and covariance.

With Inception features this is the FID.
Everything is float64. With float32 means the sixth digit would already change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import linalg

from dmf.errors import DmfError, NotFinite

_ROWS_PER_CHUNK = 4096  # bounds the float64 copy of the features: 64 MiB at D = 2048


class Moments(NamedTuple):
    """Number of rows `n`, `mean` (D,) and unbiased covariance `cov` (D, D) of features, float64."""

    n: int
    mean: np.ndarray
    cov: np.ndarray


def check_features(features: np.ndarray, name: str, min_rows: int) -> None:
    """Raises DmfError unless features are a finite (N, D) array of at least `min_rows` rows."""
    if features.ndim != 2:
        raise DmfError(f"{name} must have shape (N, D), got {features.shape}")
    if features.shape[0] < min_rows:
        raise DmfError(f"{name} has {features.shape[0]} rows, at least {min_rows} are needed")
    bad_rows = features.shape[0] - int(np.isfinite(features).all(axis=1).sum())
    if bad_rows:
        raise NotFinite(f"{name} has non-finite values in {bad_rows} of {features.shape[0]} rows")


def moments(features: np.ndarray) -> Moments:
    """Mean and unbiased covariance of features (N, D), computed in two passes in float64.

        mean = 1/N sum_i f_i
        cov = 1/(N-1) sum_i (f_i - mean)(f_i - mean)^T

    Raises DmfError for another number of dimensions, fewer than 2 rows, and non-finite values.
    """
    features = np.asarray(features)
    check_features(features, "features", min_rows=2)
    n, dim = features.shape
    mean = features.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((dim, dim))
    for start in range(0, n, _ROWS_PER_CHUNK):
        centred = features[start : start + _ROWS_PER_CHUNK] - mean
        scatter += centred.T @ centred
    return Moments(n, mean, scatter / (n - 1))


class MomentSums:
    """Mean and covariance of features that arrive in parts, summed in one pass in float64.

        s = sum_i (f_i - p)
        S = sum_i (f_i - p) (f_i - p)^T
        mean = p + s/N
        cov = (S - s s^T/N) / (N - 1)

    The pivot p is the mean of the first part: features far from zero then keep their digits.
    Order and sizes of the parts change the result by rounding only.
    A stop between two parts does not change it.
    """

    def __init__(self) -> None:
        self._count = 0
        self._pivot, self._sum, self._outer = np.zeros(0), np.zeros(0), np.zeros((0, 0))

    def add(self, features: np.ndarray) -> None:
        """Takes the next part (n, D).

        Raises DmfError for a part without rows, non-finite values, or a new D.
        """
        features = np.asarray(features)
        check_features(features, "features", min_rows=1)
        dim = features.shape[1]
        if self._count == 0:
            self._pivot = features.mean(axis=0, dtype=np.float64)
            self._sum, self._outer = np.zeros(dim), np.zeros((dim, dim))
        elif dim != len(self._pivot):
            raise DmfError(
                f"features have {dim} dimensions, expected {len(self._pivot)} as in the parts "
                "before"
            )
        for start in range(0, len(features), _ROWS_PER_CHUNK):
            shifted = features[start : start + _ROWS_PER_CHUNK] - self._pivot
            self._sum += shifted.sum(axis=0)
            self._outer += shifted.T @ shifted
        self._count += len(features)

    def moments(self) -> Moments:
        """Moments of all rows so far. Raises DmfError for fewer than 2 rows."""
        if self._count < 2:
            raise DmfError(
                f"the sums hold {self._count} rows, at least 2 are needed for a covariance"
            )
        shift = self._sum / self._count
        scatter = self._outer - np.outer(self._sum, shift)
        return Moments(self._count, self._pivot + shift, scatter / (self._count - 1))

    def state(self) -> dict[str, np.ndarray]:
        """Copies of count (), pivot (D,), sum (D,) and outer (D, D), for `from_state`."""
        arrays = {"pivot": self._pivot, "sum": self._sum, "outer": self._outer}
        return {"count": np.asarray(self._count, np.int64)} | {
            name: x.copy() for name, x in arrays.items()
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> MomentSums:
        """Sums that continue from a state, bit for bit.

        Raises DmfError where the shapes of its arrays do not fit together.
        """
        shapes = {name: np.shape(x) for name, x in state.items()}
        dims = shapes.get("pivot", ())
        if shapes != {"count": (), "pivot": dims, "sum": dims, "outer": dims * 2} or len(dims) != 1:
            raise DmfError(
                f"the state of moment sums has arrays {shapes}, expected count (), pivot, sum "
                "(D,), outer (D, D)"
            )
        sums = cls()
        sums._count = int(state["count"])
        sums._pivot, sums._sum, sums._outer = (
            np.array(state[k], np.float64) for k in ("pivot", "sum", "outer")
        )
        return sums


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet (2-Wasserstein) distance between the Gaussians with moments `a` and `b`.

        d = |mu_a - mu_b|^2 + tr A + tr B - 2 tr((A^1/2 B A^1/2)^1/2)

    The last trace is computed as the sum of the singular values of A^1/2 B^1/2.
    It is the same number, and stays precise for a singular covariance (fewer rows than dimensions).

    Small sets score too high, although their covariances are unbiased.
    Compare only scores of equal sample counts.

    Heusel et al. 2017 (arXiv 1706.08500), equation 6. Raises DmfError for unequal dimensions.
    """
    if a.mean.shape != b.mean.shape:
        dims = f"{a.mean.size} and {b.mean.size}"
        raise DmfError(f"the two feature sets have {dims} dimensions, expected equal numbers")
    cross = linalg.svdvals(_factor(a.cov).T @ _factor(b.cov)).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov) - 2.0 * cross
    return max(float(distance), 0.0)  # rounding makes it negative for some equal moments


def _factor(cov: np.ndarray) -> np.ndarray:
    """F (D, rank) with F F^T = cov.

    A^1/2 B^1/2 and F_A^T F_B have the same nonzero singular values.
    """
    values, vectors = linalg.eigh(cov)
    # eigh gives null directions relative values of +-1e-16.
    # Their square roots, 1e-8, would show in the distance.
    keep = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])
