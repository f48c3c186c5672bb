"""Frechet distance between two sets of features, each summarised by its mean and covariance.

With Inception features this is the FID. All of it is float64: float32 means alone move the sixth digit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import linalg

from dmf.errors import DmfError

_ROWS_PER_CHUNK = 4096  # bounds the float64 copy of the features: 64 MiB at D = 2048


class Moments(NamedTuple):
    """Number of rows `n`, `mean` (D,) and unbiased covariance `cov` (D, D) of a feature set, float64."""

    n: int
    mean: np.ndarray
    cov: np.ndarray


def check_features(features: np.ndarray, name: str, min_rows: int) -> None:
    """Refuses anything that is not a finite (N, D) array with at least `min_rows` rows (raises DmfError)."""
    if features.ndim != 2:
        raise DmfError(f"{name} must have shape (N, D), got {features.shape}")
    if features.shape[0] < min_rows:
        raise DmfError(f"{name} has {features.shape[0]} rows, at least {min_rows} are needed")
    bad_rows = features.shape[0] - int(np.isfinite(features).all(axis=1).sum())
    if bad_rows:
        raise DmfError(f"{name} has non-finite values in {bad_rows} of {features.shape[0]} rows")


def moments(features: np.ndarray) -> Moments:
    """Mean and unbiased covariance of features (N, D), computed in two passes in float64.

    mean = 1/N sum_i f_i,   cov = 1/(N-1) sum_i (f_i - mean)(f_i - mean)^T

    Raises DmfError if `features` is not two-dimensional, has fewer than 2 rows, or has non-finite values.
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


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet (2-Wasserstein) distance between the Gaussians with moments `a` and `b`.

    d = |mu_a - mu_b|^2 + tr A + tr B - 2 tr((A^1/2 B A^1/2)^1/2)

    The last trace is the sum of the singular values of A^1/2 B^1/2: the same number, which keeps full
    precision when a covariance is singular (fewer rows than dimensions). Small sets score too high although
    their covariances are unbiased: compare only scores of equal sample counts.
    Heusel et al. 2017 (arXiv 1706.08500), equation 6. Raises DmfError on unequal dimensions.
    """
    if a.mean.shape != b.mean.shape:
        dims = f"{a.mean.size} and {b.mean.size}"
        raise DmfError(f"the two feature sets have {dims} dimensions, expected equal numbers")
    cross = linalg.svdvals(_factor(a.cov).T @ _factor(b.cov)).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov) - 2.0 * cross
    return max(float(distance), 0.0)  # equal moments leave rounding of either sign


def _factor(cov: np.ndarray) -> np.ndarray:
    """F (D, rank) with F F^T = cov; A^1/2 B^1/2 and F_A^T F_B have the same nonzero singular values."""
    values, vectors = linalg.eigh(cov)
    # Null directions leave eigh as +-1e-16 relative; their square roots (1e-8) would leak into the distance.
    keep = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])
